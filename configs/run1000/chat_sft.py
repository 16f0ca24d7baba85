"""One pass over the full mixture."""

mixture = "full"
device_batch_size = 4
save_every = 200
