"""Loss of the small base model."""

dataset = "embedded"
device = "cpu"
device_batch_size = 8
split_tokens = 65_536
