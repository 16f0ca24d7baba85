"""Depth 16 on two GPUs: a config to copy and change.

torchrun --nproc_per_node=2 scripts/base_train.py config_dual_gpu.py

Not measured:
python -m scripts.plan config_dual_gpu.py --gpu="RTX 4090" --num_gpus=2
forecast: batch 8, 12.2 of 22.5 GiB, 104,539 to 133,329 tokens/s, 14 to 17.8 hours
"""

run = "dual_gpu"
depth = 16
max_seq_len = 2048
device_batch_size = 8
total_batch_size = 262_144  # 8 sequences x 2048 tokens x 2 GPUs, 8 micro-batches

embedding_lr = 0.2
unembedding_lr = 0.004
matrix_lr = 0.02
weight_decay = 0.0
grad_clip = 1.0

eval_every = 100
eval_tokens = 1_048_576
sample_every = 100
use_dummy_wandb = True
