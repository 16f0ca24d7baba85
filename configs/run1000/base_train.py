"""Depth 32, 1.9 billion parameters, on 37.6 billion tokens."""

run = "dummy"
dataset = "fineweb-edu"
depth = 32
device_batch_size = 8
total_batch_size = 524_288
target_param_data_ratio = 20.0
compile = True
save_every = 1000
core_metric_every = 2000
