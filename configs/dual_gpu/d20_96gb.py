"""Depth 20 on two 96 GB cards (RTX PRO 6000).

torchrun --nproc_per_node=2 scripts/base_train.py configs/dual_gpu/d20_96gb.py

Not measured:
python -m scripts.plan configs/dual_gpu/d20_96gb.py --gpu="RTX PRO 6000" --num_gpus=2
forecast: batch 32, 52.1 of 93.1 GiB, 140,959 to 194,878 tokens/s, 16 to 22.1 hours
"""

run = "dual_gpu_d20_96gb"
depth = 20
max_seq_len = 2048
device_batch_size = 32
total_batch_size = 524_288  # 32 sequences x 2048 tokens x 2 GPUs, 4 micro-batches
compile = True
grad_clip = 1.0

eval_every = 250
eval_tokens = 1_048_576
sample_every = 1000
save_every = 500
use_dummy_wandb = True
