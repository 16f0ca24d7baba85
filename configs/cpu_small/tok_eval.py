"""Compression on the embedded corpus and on other kinds of text."""

dataset = "embedded"
