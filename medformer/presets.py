"""Ready-made sizes; any field of `BackboneConfig` can be overridden: `small_3d(attention="softmax")`.

3D presets cut 8-voxel patches every 4 voxels and use performer attention; 2D presets cut 16-pixel patches
every 8 pixels and use softmax attention. Either way patches overlap, and a size that is a multiple of the
stride gives a grid of size / stride tokens.
"""

from __future__ import annotations

from typing import Any

from medformer.backbone import Backbone, BackboneConfig

__all__ = ["base_2d", "base_3d", "large_2d", "large_3d", "small_2d", "small_3d", "tiny_2d", "tiny_3d"]

_VOLUME: dict[str, Any] = {
    "dims": 3,
    "patch_size": 8,
    "patch_stride": 4,
    "patch_padding": 2,
    "attention": "performer",
}
_IMAGE: dict[str, Any] = {
    "dims": 2,
    "patch_size": 16,
    "patch_stride": 8,
    "patch_padding": 4,
    "attention": "softmax",
}
_TINY: dict[str, Any] = {"width": 192, "depth": 4, "heads": 6}
_SMALL: dict[str, Any] = {"width": 384, "depth": 12, "heads": 6}
_BASE: dict[str, Any] = {"width": 768, "depth": 12, "heads": 12}
_LARGE: dict[str, Any] = {"width": 1024, "depth": 24, "heads": 16}


def tiny_3d(**overrides: Any) -> Backbone:
    """Width 192, depth 4, 6 heads: small enough to train on a CPU."""
    return Backbone(BackboneConfig(**{**_VOLUME, **_TINY, **overrides}))


def small_3d(**overrides: Any) -> Backbone:
    """Width 384, depth 12, 6 heads: the dimensions of ViT-S."""
    return Backbone(BackboneConfig(**{**_VOLUME, **_SMALL, **overrides}))


def base_3d(**overrides: Any) -> Backbone:
    """Width 768, depth 12, 12 heads: the dimensions of ViT-B."""
    return Backbone(BackboneConfig(**{**_VOLUME, **_BASE, **overrides}))


def large_3d(**overrides: Any) -> Backbone:
    """Width 1024, depth 24, 16 heads: the dimensions of ViT-L."""
    return Backbone(BackboneConfig(**{**_VOLUME, **_LARGE, **overrides}))


def tiny_2d(**overrides: Any) -> Backbone:
    """Width 192, depth 4, 6 heads: small enough to train on a CPU."""
    return Backbone(BackboneConfig(**{**_IMAGE, **_TINY, **overrides}))


def small_2d(**overrides: Any) -> Backbone:
    """Width 384, depth 12, 6 heads: the dimensions of ViT-S."""
    return Backbone(BackboneConfig(**{**_IMAGE, **_SMALL, **overrides}))


def base_2d(**overrides: Any) -> Backbone:
    """Width 768, depth 12, 12 heads: the dimensions of ViT-B."""
    return Backbone(BackboneConfig(**{**_IMAGE, **_BASE, **overrides}))


def large_2d(**overrides: Any) -> Backbone:
    """Width 1024, depth 24, 16 heads: the dimensions of ViT-L."""
    return Backbone(BackboneConfig(**{**_IMAGE, **_LARGE, **overrides}))
