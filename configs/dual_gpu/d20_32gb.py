"""Depth 20 on two 32 GB cards (RTX 5090). The batch size is an estimate, not measured.

torchrun --nproc_per_node=2 scripts/base_train.py configs/dual_gpu/d20_32gb.py
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
