"""Training and evaluation loops: tensors and callables in, tensors out, no configuration."""
