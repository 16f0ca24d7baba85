"""Depth 12 on two 24 GB cards (RTX 3090, RTX 4090).

torchrun --nproc_per_node=2 scripts/base_train.py configs/dual_gpu/d12_24gb.py

Not measured:
python -m scripts.plan configs/dual_gpu/d12_24gb.py --gpu="RTX 4090" --num_gpus=2
forecast: batch 16, 11.3 of 22.5 GiB, 208,356 to 261,313 tokens/s, 3.95 to 4.95 hours
"""

run = "dual_gpu_d12_24gb"
depth = 12
max_seq_len = 2048
device_batch_size = 16
total_batch_size = 524_288  # 16 sequences x 2048 tokens x 2 GPUs, 8 micro-batches
compile = True
grad_clip = 1.0

eval_every = 250
eval_tokens = 1_048_576
sample_every = 500
save_every = 500
use_dummy_wandb = True
