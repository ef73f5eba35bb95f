"""Fused Triton kernels for long medical token sequences."""
