"""Operations: mathematics in, tensors out. Nothing here knows of models."""
