"""Depth 14 on two GPUs of which about 26 GB are free: a long context at a safe batch size.

torchrun --nproc_per_node=2 scripts/base_train.py configs/dual_gpu/stable_26gb.py

Not measured:
python -m scripts.plan configs/dual_gpu/stable_26gb.py --gpu="RTX 5090" --num_gpus=2 \
    --gpu_memory_gib=26
forecast: batch 18, 21.6 of 24.5 GiB, 173,202 to 227,968 tokens/s, 6.15 to 8.09 hours
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
