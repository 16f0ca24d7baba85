"""Fine-tuning of the small model."""

mixture = "local"
device = "cpu"
device_batch_size = 16
target_examples_per_step = 16
init_lr_frac = 0.3
packing = "packed"
eval_every = 40
eval_steps = 8
save_every = 20
