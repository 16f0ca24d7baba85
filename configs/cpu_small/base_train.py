"""A small model for two CPU cores: a few minutes of training on the embedded corpus."""

dataset = "embedded"
device = "cpu"
depth = 4
max_seq_len = 256
device_batch_size = 8
total_batch_size = 4096
num_iterations = 320
eval_every = 80
eval_tokens = 65_536
sample_every = 160
save_every = 40
warmdown_ratio = 0.4
profile = 3
