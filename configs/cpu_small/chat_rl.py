"""Reinforcement learning of the small model on counting letters."""

task = "SpellingBee"
device = "cpu"
num_iterations = 16
examples_per_step = 8
num_samples = 8
device_batch_size = 64
max_new_tokens = 200
init_lr_frac = 0.1
eval_every = -1
eval_examples = 32
eval_samples = 4
save_every = 4
