"""Depth 12 on two 24 GB cards (RTX 3090, RTX 4090).

torchrun --nproc_per_node=2 scripts/base_train.py configs/dual_gpu/d12_24gb.py

Not measured:
python -m scripts.plan configs/dual_gpu/d12_24gb.py --gpu="RTX 4090" --num_gpus=2
forecast: batch 16, 10.9 of 22.5 GiB, 203,643 to 255,273 tokens/s, 4.04 to 5.06 hours
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
