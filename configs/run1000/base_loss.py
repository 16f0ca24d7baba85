"""Bits per byte of both splits."""

dataset = "fineweb-edu"
