"""One question to the small model at the end of its training."""

prompt = "Who are you?"
device = "cpu"
temperature = 0.0
max_tokens = 64
