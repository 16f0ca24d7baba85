"""Experiments: research on top of the house; nothing in the house imports them."""
