"""Depth 14 on two GPUs of which about 26 GB are free: a long context at a safe batch size.

torchrun --nproc_per_node=2 scripts/base_train.py configs/dual_gpu/stable_26gb.py
"""

run = "dual_gpu_stable_26gb"
depth = 14
max_seq_len = 3072
device_batch_size = 18
total_batch_size = 110_592  # 18 sequences x 3072 tokens x 2 GPUs, one micro-batch

eval_every = 100
eval_tokens = 110_592
sample_every = 100
use_dummy_wandb = True
