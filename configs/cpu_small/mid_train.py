"""Mid-training of the small model: spelling, sums with the calculator, and who it is."""

mixture = "local"
device = "cpu"
device_batch_size = 8
total_batch_size = 4096
eval_every = 100
eval_tokens = 32_768
save_every = 40
