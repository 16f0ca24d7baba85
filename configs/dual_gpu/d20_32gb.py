"""Depth 20 on two 32 GB cards (RTX 5090).

torchrun --nproc_per_node=2 scripts/base_train.py configs/dual_gpu/d20_32gb.py

Not measured:
python -m scripts.plan configs/dual_gpu/d20_32gb.py --gpu="RTX 5090" --num_gpus=2
forecast: batch 8, 18.8 of 30.4 GiB, 86,030 to 106,404 tokens/s, 29.3 to 36.2 hours
"""

run = "dual_gpu_d20_32gb"
depth = 20
max_seq_len = 2048
device_batch_size = 8
total_batch_size = 524_288  # 8 sequences x 2048 tokens x 2 GPUs, 16 micro-batches
compile = True
grad_clip = 1.0

eval_every = 250
eval_tokens = 1_048_576
sample_every = 1000
save_every = 500
use_dummy_wandb = True
