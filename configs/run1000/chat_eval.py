"""The six tasks of ChatCORE."""

batch_size = 8
