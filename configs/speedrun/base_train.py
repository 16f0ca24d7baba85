"""Depth 20, 561 million parameters, on 11.2 billion tokens."""

run = "dummy"
dataset = "fineweb-edu"
depth = 20
device_batch_size = 32
total_batch_size = 524_288
target_param_data_ratio = 20.0
compile = True
save_every = 1000
core_metric_every = 2000
