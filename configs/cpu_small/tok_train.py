"""Tokenizer of the small model."""

dataset = "embedded"
vocab_size = 4096
