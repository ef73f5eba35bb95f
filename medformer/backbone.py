"""The backbone: overlapping patches, class and register tokens, positions, blocks, one final norm.

Shape legend: B batch, Cin image channels, C model width, H heads, R registers, N patch tokens, Z Y X voxels,
gz gy gx token grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medformer.attention import PerformerAttention, SoftmaxAttention
from medformer.blocks import Block
from medformer.patch_embed import PatchEmbed
from medformer.position import LearnedPosition, SinCosPosition

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["Backbone", "BackboneConfig", "Features"]


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Everything that decides the shape and the random features of a `Backbone`."""

    dims: int = 3
    """Spatial axes of the input: 3 for volumes (Z, Y, X), 2 for images (Y, X)."""
    in_channels: int = 1
    """Channels of the input, one per modality, window or colour."""
    patch_size: int | tuple[int, ...] = 8
    """Patch kernel in voxels: one number, or one per axis in zyx order."""
    patch_stride: int | tuple[int, ...] = 4
    """Step between patches in voxels; below patch_size the patches overlap. One number, or one per
    axis."""
    patch_padding: int | tuple[int, ...] = 2
    """Zeros added on both ends of each axis, in voxels, less than the patch kernel. One number, or one per
    axis."""
    patch_dilation: int | tuple[int, ...] = 1
    """Step between the voxels inside one patch. One number, or one per axis, zyx."""
    width: int = 384
    """Channels of a token."""
    depth: int = 12
    """Number of transformer blocks."""
    heads: int = 6
    """Attention heads; must divide width."""
    mlp_ratio: float = 4.0
    """Hidden channels of each MLP, as a multiple of width."""
    attention: Literal["performer", "softmax"] = "performer"
    """performer: FAVOR+, cost linear in the tokens. softmax: exact, cost quadratic in the tokens."""
    num_features: int | None = None
    """Random features per head of performer attention; null takes D ln D rounded to a multiple of 64,
    where D is the head width."""
    class_token: bool = True
    """Prepend a learned class token; without it the summary of a scan is the mean of its patch tokens."""
    registers: int = 4
    """Learned register tokens, scratch space that keeps the patch tokens clean; 0 for none."""
    mask_token: bool = False
    """Hold a learned token that replaces masked patches (iBOT, masked modelling)."""
    position: Literal["learned", "sincos"] = "learned"
    """learned: a table over position_grid, stretched to the grid of each input. sincos: fixed waves of the
    token index."""
    position_grid: int | tuple[int, ...] | None = None
    """Base grid of the learned table in tokens: one number, one per axis in zyx order, or null for 8 (3D) and
    16 (2D)."""
    drop_path: float = 0.0
    """Stochastic depth: probability of skipping the last block's branches in training, falling linearly to 0
    at the first block."""
    layer_scale: float | None = None
    """Start value of a learned gain per channel on every branch, for example 1e-5; null for none."""
    qk_norm: bool = False
    """LayerNorm queries and keys over each head: steadier training at large width or low precision."""
    seed: int = 0
    """Of the random features of performer attention; the weights follow torch's own generator."""

    def __post_init__(self) -> None:
        _check(self.dims in (2, 3), f"dims={self.dims} must be 2 or 3")
        for name in ("in_channels", "width", "depth", "heads"):
            _check_int(name, getattr(self, name), least=1)
        _check_int("registers", self.registers, least=0)
        _check_int("seed", self.seed, least=0)
        _check(self.seed < 2**31, f"seed={self.seed} must be below 2**31")
        for name, least in (
            ("patch_size", 1),
            ("patch_stride", 1),
            ("patch_padding", 0),
            ("patch_dilation", 1),
        ):
            self._check_axes(name, least=least)
        _check(
            all(p < d * (k - 1) + 1 for p, d, k in zip(self.padding, self.dilation, self.kernel, strict=True)),
            f"patch_padding={self.patch_padding} must be below the patch kernel: a patch must see a voxel",
        )
        if self.position_grid is not None:
            self._check_axes("position_grid", least=1)
        if self.width % self.heads:
            divisors = [h for h in range(1, self.width + 1) if self.width % h == 0]
            near = [h for h in divisors if h < self.heads][-1:] + [h for h in divisors if h > self.heads][:1]
            choice = " or ".join(str(h) for h in near)
            _check(False, f"heads={self.heads} must divide width={self.width}; use {choice}")
        _check(
            math.isfinite(self.mlp_ratio) and round(self.width * self.mlp_ratio) >= 1,
            f"mlp_ratio={self.mlp_ratio} must leave at least one hidden channel at width={self.width}",
        )
        _check_choice("attention", self.attention, ("performer", "softmax"))
        _check_choice("position", self.position, ("learned", "sincos"))
        if self.num_features is not None:
            _check_int("num_features", self.num_features, least=1)
            _check(
                self.attention == "performer",
                f"num_features={self.num_features} needs attention='performer', not '{self.attention}'",
            )
        _check(
            self.position == "learned" or self.position_grid is None,
            f"position_grid={self.position_grid} needs position='learned', not '{self.position}'",
        )
        _check(
            self.position == "learned" or self.width >= 2 * self.dims,
            f"width={self.width} must be at least {2 * self.dims} with position='{self.position}'",
        )
        _check(0.0 <= self.drop_path < 1.0, f"drop_path={self.drop_path} must be at least 0 and below 1")
        _check(
            self.layer_scale is None or (math.isfinite(self.layer_scale) and self.layer_scale > 0),
            f"layer_scale={self.layer_scale} must be above 0, or None",
        )

    @property
    def kernel(self) -> tuple[int, ...]:
        """patch_size for every axis."""
        return self._axes(self.patch_size)

    @property
    def stride(self) -> tuple[int, ...]:
        """patch_stride for every axis."""
        return self._axes(self.patch_stride)

    @property
    def padding(self) -> tuple[int, ...]:
        """patch_padding for every axis."""
        return self._axes(self.patch_padding)

    @property
    def dilation(self) -> tuple[int, ...]:
        """patch_dilation for every axis."""
        return self._axes(self.patch_dilation)

    @property
    def base_grid(self) -> tuple[int, ...]:
        """position_grid for every axis."""
        default = 8 if self.dims == 3 else 16
        return self._axes(default if self.position_grid is None else self.position_grid)

    def _axes(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return (value,) * self.dims if isinstance(value, int) else value

    def _check_axes(self, name: str, *, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, list):  # from JSON or YAML
            value = tuple(value)
            object.__setattr__(self, name, value)
        if isinstance(value, tuple):
            _check(
                len(value) == self.dims,
                f"{name}={value} must be one number or {self.dims} numbers, one per axis (dims={self.dims})",
            )
        for number in value if isinstance(value, tuple) else (value,):
            _check_int(name, number, least=least)


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


class Backbone(nn.Module):
    """A transformer over a volume (or image) of any size at least as large as one patch.

    >>> model = Backbone(BackboneConfig(width=48, depth=2, heads=3))
    >>> model(torch.zeros(1, 1, 33, 20, 24)).shape
    torch.Size([1, 48])

    Attributes:
        config: what it was built from.
        checkpoint_activations: in training, keep only each block's input and compute the rest again in
            backward.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        width = config.width
        self.patch_embed = PatchEmbed(
            config.in_channels,
            width,
            kernel=config.kernel,
            stride=config.stride,
            padding=config.padding,
            dilation=config.dilation,
        )
        self.class_token = nn.Parameter(torch.empty(width)) if config.class_token else None
        self.register_tokens = nn.Parameter(torch.empty(config.registers, width)) if config.registers else None
        self.mask_token = nn.Parameter(torch.zeros(width)) if config.mask_token else None
        if config.position == "learned":
            self.position = LearnedPosition(width, config.base_grid, class_token=config.class_token)
        else:
            self.position = SinCosPosition(width, config.dims)
        self.blocks = nn.ModuleList(
            Block(
                width,
                _attention(config, layer),
                mlp_hidden=round(width * config.mlp_ratio),
                drop_path=config.drop_path * layer / max(config.depth - 1, 1),
                layer_scale=config.layer_scale,
            )
            for layer in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self._init_weights()

    def forward(self, x: Float[Tensor, "B Cin *size"]) -> Float[Tensor, "B C"]:
        """One vector per scan: `forward_features(x).cls`."""
        return self.forward_features(x).cls

    def forward_features(self, x: Float[Tensor, "B Cin *size"], *, mask: Bool[Tensor, "B N"] | None = None) -> Features:
        """Class, register and patch tokens.

        Args:
            x: volumes (B, Cin, Z, Y, X) or images (B, Cin, Y, X), floating point, of roughly zero mean
                and unit variance.
            mask: True where a patch token is replaced by the learned mask token; needs `mask_token=True` in
                the config. Flatten a (B, gz, gy, gx) mask with `.flatten(1)`.

        Raises:
            ValueError: `x` or `mask` has the wrong shape, or an axis is shorter than one patch.
        """
        x, grid = self._embed(x, mask)
        for block in self.blocks:
            if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        x = self.norm(x)
        prefix = x.shape[1] - math.prod(grid)
        first_register = int(self.class_token is not None)
        patches = x[:, prefix:]
        cls = patches.mean(dim=1) if self.class_token is None else x[:, 0]
        return Features(cls=cls, registers=x[:, first_register:prefix], patches=patches, grid=grid)

    @torch.no_grad()
    def attention_map(self, x: Float[Tensor, "B Cin *size"], layer: int = -1) -> Float[Tensor, "B H *grid"]:
        """How much the class token reads each patch token at one layer.

        Exact for both attentions: the softmax row, or for performer attention the normalised row
        phi(q) phi(k_j). A row sums to 1 together with its class and register columns, which are left out.
        Call `.eval()` first.

        Args:
            x: as for `forward_features`.
            layer: block to look at; negative numbers count from the end.

        Raises:
            ValueError: the model has no class token.
            IndexError: no such layer.
        """
        if self.class_token is None:
            raise ValueError("Backbone.attention_map: this model has no class token; build it with class_token=True")
        depth = len(self.blocks)
        if not -depth <= layer < depth:
            raise IndexError(f"Backbone.attention_map: layer={layer} must be from {-depth} to {depth - 1}")
        x, grid = self._embed(x, None)
        stop = layer % depth
        for block in self.blocks[:stop]:
            x = block(x)
        block = self.blocks[stop]
        assert isinstance(block, Block)
        row = block.attention.attention_row(block.norm1(x), query=0)
        return row[..., row.shape[-1] - math.prod(grid) :].unflatten(-1, grid)

    def grid_of(self, size: Sequence[int]) -> tuple[int, ...]:
        """Token grid (gz, gy, gx) for a volume of `size` voxels (zyx); ValueError when under one patch."""
        return self.patch_embed.grid_of(size)

    def _embed(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[int, ...]]:
        """All tokens with their positions, in the order class, registers, patches; and the patch grid."""
        tokens = self.patch_embed(x)
        grid = self.grid_of(x.shape[2:])
        batch = tokens.shape[0]
        if mask is not None:
            if self.mask_token is None:
                raise ValueError(
                    "Backbone.forward_features: mask is given but this model has no mask token; "
                    "build it with mask_token=True"
                )
            if mask.dtype != torch.bool or mask.shape != tokens.shape[:2]:
                raise ValueError(
                    f"Backbone.forward_features: mask of shape {tuple(mask.shape)} and dtype {mask.dtype} "
                    f"must be bool of shape {tuple(tokens.shape[:2])}, one entry per token of grid {grid}"
                )
            tokens = torch.where(mask[..., None], self.mask_token, tokens)
        # Under autocast the tokens are in low precision and the parameters are not: the sum, and with it the
        # residual stream, is in the dtype of the parameters.
        parts = [tokens + self.position(grid).to(self.norm.weight.dtype)]
        if self.register_tokens is not None:
            parts.insert(0, self.register_tokens.expand(batch, -1, -1))
        if self.class_token is not None:
            cls = self.class_token if self.position.cls is None else self.class_token + self.position.cls
            parts.insert(0, cls.expand(batch, 1, -1))
        return torch.cat(parts, dim=1), grid

    def _init_weights(self) -> None:
        """Truncated normal of deviation 0.02 for matrices and tokens, 0 for biases and the mask token."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.class_token, self.register_tokens):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)


def _attention(config: BackboneConfig, layer: int) -> PerformerAttention | SoftmaxAttention:
    if config.attention == "softmax":
        return SoftmaxAttention(config.width, config.heads, qk_norm=config.qk_norm)
    return PerformerAttention(
        config.width,
        config.heads,
        num_features=config.num_features,
        qk_norm=config.qk_norm,
        # Far apart, so that layer 1 of seed 0 is not layer 0 of seed 1.
        seed=config.seed * 1_000_003 + layer,
    )


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"BackboneConfig: {message}")


def _check_int(name: str, value: object, *, least: int) -> None:
    _check(
        isinstance(value, int) and not isinstance(value, bool) and value >= least,
        f"{name}={value!r} must be a whole number of at least {least}",
    )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    _check(value in choices, f"{name}={value!r} must be one of {', '.join(choices)}")
