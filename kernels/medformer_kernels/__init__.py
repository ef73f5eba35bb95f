"""Fused Triton kernels for long sequences of tokens, each with a plain PyTorch reference."""

from medformer_kernels import _versions  # noqa: F401  # first: an old PyTorch ends the import in one line
from medformer_kernels._linear import linear
from medformer_kernels.disentangled import (
    axis_expansion,
    disentangled_attention,
    disentangled_attention_reference,
    disentangled_maps,
    log_buckets,
)
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
    PerformerState,
    default_num_features,
    orthogonal_features,
    performer_attention,
    performer_attention_reference,
    performer_block_attention,
    performer_block_attention_reference,
    performer_features,
    performer_prefill,
    performer_step,
)
from medformer_kernels.performer.accuracy import approximation_error
from medformer_kernels.tnt import (
    TNTInnerWeights,
    tnt_inner_block,
    tnt_inner_block_reference,
    tnt_inner_to_outer,
    tnt_inner_to_outer_reference,
)

__all__ = [
    "PerformerState",
    "TNTInnerWeights",
    "Window",
    "approximation_error",
    "axis_expansion",
    "default_num_features",
    "disentangled_attention",
    "disentangled_attention_reference",
    "disentangled_maps",
    "hu_window",
    "linear",
    "log_buckets",
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
    "performer_block_attention",
    "performer_block_attention_reference",
    "performer_features",
    "performer_prefill",
    "performer_step",
    "tnt_inner_block",
    "tnt_inner_block_reference",
    "tnt_inner_to_outer",
    "tnt_inner_to_outer_reference",
    "token_centres_mm",
    "token_coverage",
    "token_grid",
    "z_score",
]
