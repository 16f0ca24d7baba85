"""Reinforcement learning on GSM8K."""

task = "GSM8K"
