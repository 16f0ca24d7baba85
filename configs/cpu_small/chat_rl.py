"""Reinforcement learning of the small model on sums."""

task = "Arithmetic"
device = "cpu"
num_iterations = 12
examples_per_step = 8
num_samples = 8
device_batch_size = 64
max_new_tokens = 40
eval_every = 6
eval_examples = 64
eval_samples = 4
save_every = 4
