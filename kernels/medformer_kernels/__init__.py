"""Fused Triton kernels for long sequences of tokens, each with a plain PyTorch reference beside it."""

from medformer_kernels.nystrom import (
    nystrom_attention,
    nystrom_attention_reference,
    nystrom_pinv,
    nystrom_residual,
)
from medformer_kernels.patch_embed import (
    Window,
    hu_window,
    patch_embed,
    patch_embed_choice,
    patch_embed_reference,
    patch_unembed,
    patch_unembed_reference,
    patch_voxels,
    token_centres_mm,
    token_coverage,
    token_grid,
    z_score,
)
from medformer_kernels.performer import (
    default_num_features,
    orthogonal_features,
    performer_attention,
    performer_attention_reference,
    performer_features,
)

__all__ = [
    "Window",
    "default_num_features",
    "hu_window",
    "nystrom_attention",
    "nystrom_attention_reference",
    "nystrom_pinv",
    "nystrom_residual",
    "orthogonal_features",
    "patch_embed",
    "patch_embed_choice",
    "patch_embed_reference",
    "patch_unembed",
    "patch_unembed_reference",
    "patch_voxels",
    "performer_attention",
    "performer_attention_reference",
    "performer_features",
    "token_centres_mm",
    "token_coverage",
    "token_grid",
    "z_score",
]
