"""Denoising of blocks without an end: the rollout over layers, what self-attention remembers, CUDA graphs."""
