"""Fused Triton kernels for long sequences of tokens, each with a plain PyTorch reference beside it."""

from medformer_kernels.nystrom import (
    nystrom_attention,
    nystrom_attention_reference,
    nystrom_pinv,
    nystrom_residual,
)
from medformer_kernels.performer import (
    default_num_features,
    orthogonal_features,
    performer_attention,
    performer_attention_reference,
    performer_features,
)

__all__ = [
    "default_num_features",
    "nystrom_attention",
    "nystrom_attention_reference",
    "nystrom_pinv",
    "nystrom_residual",
    "orthogonal_features",
    "performer_attention",
    "performer_attention_reference",
    "performer_features",
]
