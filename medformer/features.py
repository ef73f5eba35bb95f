"""What every backbone returns, and how it is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["Features", "layers_of", "rows_wanted", "split_tokens", "whole_mask"]


@dataclass(frozen=True)
class Features:
    """What a backbone knows about a batch, after its final norm."""

    cls: Float[Tensor, "B C"]
    """The class token, or the mean of the patch tokens where the model has none."""
    registers: Float[Tensor, "B R C"]
    """The register tokens."""
    patches: Float[Tensor, "B N C"]
    """The patch tokens, x fastest."""
    grid: tuple[int, ...]
    """(gz, gy, gx) or (gy, gx); its product is N."""


def split_tokens(
    x: Float[Tensor, "B P+N C"], grid: tuple[int, ...], class_token: bool, prefix: int,
    key_padding_mask: Bool[Tensor, "B N"] | None,
) -> Features:  # fmt: skip
    """Class, register and patch tokens of a sequence, whose first `prefix` are not patches."""
    patches = x[:, prefix:]
    if class_token:
        cls = x[:, 0]
    elif key_padding_mask is None:
        cls = patches.mean(dim=1)
    else:
        real = key_padding_mask[..., None]
        cls = torch.where(real, patches, 0.0).sum(dim=1) / real.sum(dim=1).clamp(min=1)
    return Features(cls=cls, registers=x[:, int(class_token) : prefix], patches=patches, grid=grid)


def whole_mask(
    name: str, key_padding_mask: Tensor | None, shape: tuple[int, int], grid: tuple[int, ...], prefix: int
) -> Bool[Tensor, "B P+N"] | None:
    """The mask of `shape` (B, N) with class and register tokens in front, which are real."""
    if key_padding_mask is None:
        return None
    if key_padding_mask.dtype != torch.bool or tuple(key_padding_mask.shape) != shape:
        raise ValueError(
            f"{name}: key_padding_mask of shape {tuple(key_padding_mask.shape)} and dtype {key_padding_mask.dtype} "
            f"must be bool of shape {shape}, True where a token of grid {grid} is real"
        )
    return pad(key_padding_mask, (prefix, 0), value=True)


def layers_of(name: str, layers: int | Sequence[int], depth: int) -> list[int]:
    """Numbers of the last `layers` blocks, or of those listed; IndexError where there is no such block."""
    wanted = list(range(depth - layers, depth)) if isinstance(layers, int) else list(layers)
    fits = 0 < layers <= depth if isinstance(layers, int) else all(-depth <= layer < depth for layer in wanted)
    if not fits:
        raise IndexError(f"{name}.get_intermediate_layers: layers={layers} must name some of {depth} blocks")
    return [layer % depth for layer in wanted]


def rows_wanted(
    name: str, layer: int, queries: Sequence[int] | None, depth: int, config: Any, tokens: int
) -> tuple[int, list[int]]:
    """Which block's attention, and which of its `tokens` tokens: the class token, or the patches in `queries`."""
    if queries is None and not config.class_token:
        raise ValueError(
            f"{name}.attention_map: this model has no class token; give queries, or build it with class_token=True"
        )
    if not -depth <= layer < depth:
        raise IndexError(f"{name}.attention_map: layer={layer} must be from {-depth} to {depth - 1}")
    patches = range(config.prefix, tokens)
    for query in queries or ():
        if not -len(patches) <= query < len(patches):
            raise IndexError(f"{name}.attention_map: queries={queries} must be patches of {len(patches)}")
    return layer % depth, [0] if queries is None else [patches[query] for query in queries]
