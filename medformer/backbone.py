"""The backbone: a stem if any, patches, class and register tokens, positions, blocks, one final norm, a head if any.

Shape legend: B batch, Cin image channels, C model width, H heads, R registers, N patch tokens, P class and register
tokens, Z Y X voxels, gz gy gx token grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medformer.attention import PerformerAttention, SelfAttention, SoftmaxAttention
from medformer.blocks import Block
from medformer.config import BackboneConfig
from medformer.disentangled_attention import DisentangledAttention
from medformer.features import Features, layers_of, rows_wanted, split_tokens, whole_mask
from medformer.hopfield import HopfieldAttention
from medformer.mlp import MLP, GatedMLP
from medformer.moe import SwitchMLP
from medformer.nystrom_attention import NystromAttention
from medformer.patch_embed import PatchEmbed
from medformer.position import LearnedPosition, RotaryPosition, SinCosPosition
from medformer.resnet import ResNet, ResNetConfig, spread

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["Backbone", "BackboneConfig", "Features"]


class Backbone(nn.Module):
    """A transformer over a volume (or image) of any size at least as large as one patch.

    >>> model = Backbone(BackboneConfig(width=48, depth=2, heads=3))
    >>> model(torch.zeros(1, 1, 33, 20, 24)).shape
    torch.Size([1, 48])

    Attributes:
        config: what it was built from.
        checkpoint_activations: in training, keep only each block's input and compute the rest again in
            backward; in a stem too.
    """

    origin: object = None
    """Of weights that others trained: `medformer.weights.Origin`."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.stem = None
        if config.stem is not None:
            self.stem = ResNet(
                ResNetConfig(
                    dims=config.dims, in_channels=config.in_channels, depth=cast(Any, int(config.stem[6:])),
                    stages=config.stem_stages or 2,
                )
            )  # fmt: skip
        self.checkpoint_activations = False
        self.patch_embed = PatchEmbed(
            config.in_channels if self.stem is None else self.stem.config.width,
            width,
            kernel=config.kernel,
            stride=config.stride,
            padding=config.padding,
            dilation=config.dilation,
            transposed=config.patch_transposed,
        )
        self.class_token = nn.Parameter(torch.empty(width)) if config.class_token else None
        self.register_tokens = nn.Parameter(torch.empty(config.registers, width)) if config.registers else None
        self.mask_token = nn.Parameter(torch.zeros(width)) if config.mask_token else None
        self.position = self.rotary = None
        if config.position == "learned":
            self.position = LearnedPosition(width, config.base_grid, class_token=config.class_token)
        elif config.position == "sincos":
            self.position = SinCosPosition(width, config.dims)
        elif config.position == "rotary":
            self.rotary = RotaryPosition(
                width // config.heads, config.dims, periods=config.rotary_periods, coordinates=config.rotary_coordinates
            )
        self.blocks = nn.ModuleList(
            Block(
                width,
                _attention(config, layer),
                _mlp(config, layer),
                drop_path=config.drop_path * layer / max(config.depth - 1, 1),
                layer_scale=config.layer_scale,
                norm_eps=config.norm_eps,
            )
            for layer in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.head = nn.Linear(width, config.classes) if config.classes else None
        self._init_weights()

    @property
    def checkpoint_activations(self) -> bool:
        return self._checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, value: bool) -> None:
        self._checkpoint_activations = value
        if self.stem is not None:
            self.stem.checkpoint_activations = value

    def forward(self, x: Float[Tensor, "B Cin *size"]) -> Float[Tensor, "B C"]:
        """One vector per scan: `forward_features(x).cls`, or the head's outputs where there is one."""
        cls = self.forward_features(x).cls
        return cls if self.head is None else self.head(cls)

    def forward_features(
        self,
        x: Float[Tensor, "B Cin *size"],
        *,
        mask: Bool[Tensor, "B N"] | None = None,
        key_padding_mask: Bool[Tensor, "B N"] | None = None,
    ) -> Features:
        """Class, register and patch tokens.

        Args:
            x: volumes (B, Cin, Z, Y, X) or images (B, Cin, Y, X), floating point, of roughly zero mean
                and unit variance.
            mask: True where a patch token is replaced by the learned mask token; needs `mask_token=True` in
                the config. Flatten a (B, gz, gy, gx) mask with `.flatten(1)`.
            key_padding_mask: True where a patch is real, for scans of several sizes in one batch, or to leave air
                out. The others are never read, exactly, and their own features mean nothing. Positions are
                those of the whole grid.

        Raises:
            ValueError: `x` or a mask has the wrong shape, or an axis is shorter than one patch.
        """
        return self._intermediate(x, [len(self.blocks) - 1], mask, key_padding_mask, norm=True)[0]

    def get_intermediate_layers(
        self,
        x: Float[Tensor, "B Cin *size"],
        layers: int | Sequence[int] = 1,
        *,
        norm: bool = True,
        mask: Bool[Tensor, "B N"] | None = None,
        key_padding_mask: Bool[Tensor, "B N"] | None = None,
    ) -> list[Features]:
        """What several blocks give, first block first; the names of DINOv2.

        Args:
            x: as for `forward_features`.
            layers: how many blocks, counted from the end, or which ones (negative numbers count from the end).
            norm: apply the final norm to each.
            mask: as for `forward_features`.
            key_padding_mask: as for `forward_features`.

        Raises:
            IndexError: no such block.
        """
        wanted = layers_of("Backbone", layers, len(self.blocks))
        return self._intermediate(x, wanted, mask, key_padding_mask, norm=norm)

    def _intermediate(
        self, x: Tensor, layers: Sequence[int], mask: Tensor | None, key_padding_mask: Tensor | None, *, norm: bool
    ) -> list[Features]:
        x, grid, context = self._embed(x, mask, key_padding_mask)
        found = []
        for layer, block in enumerate(self.blocks):
            if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(block, x, use_reentrant=False, **context))
            else:
                x = block(x, **context)
            if layer in layers:
                tokens = self.norm(x) if norm else x
                found.append(split_tokens(tokens, grid, self.config.class_token, self.config.prefix, key_padding_mask))
        return found

    @torch.no_grad()
    def attention_map(
        self,
        x: Float[Tensor, "B Cin *size"],
        layer: int = -1,
        *,
        queries: Sequence[int] | None = None,
        key_padding_mask: Bool[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B H *grid"]:
        """How much the class token, or chosen patches, read each patch token at one layer.

        Exact for every attention: the gradient of its output by the values. For performer attention that is the
        normalised row phi(q) phi(k_j); for nystrom a row of F pinv(A) G plus its convolution, with negative
        weights too. A row sums to 1 (but for nystrom) together with its class and register columns, which are left
        out. Call `.eval()` first.

        Args:
            x: as for `forward_features`.
            layer: block to look at; negative numbers count from the end.
            queries: indices of patch tokens; then the result is (B, H, queries, *grid). None: the class token.
            key_padding_mask: as for `forward_features`.

        Raises:
            ValueError: no queries are given and the model has no class token.
            IndexError: no such layer or patch.
        """
        x, grid, context = self._embed(x, None, key_padding_mask)
        stop, chosen = rows_wanted("Backbone", layer, queries, len(self.blocks), self.config, x.shape[1])
        for block in self.blocks[:stop]:
            x = block(x, **context)
        block = cast(Block, self.blocks[stop])
        rows = block.attention.attention_rows(block.norm1(x), chosen, **context)
        rows = rows[..., self.config.prefix :].unflatten(-1, grid)
        return rows[:, :, 0] if queries is None else rows

    @torch.no_grad()
    def rollout(
        self, x: Float[Tensor, "B Cin *size"], *, key_padding_mask: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B *grid"]:  # noqa: UP037
        """How much of each patch token reaches the class vector through all layers.

        The class row of the product of (A_l + 1) / 2, where A_l is the mean over the heads of layer l. Computed from
        the last layer to the first by products of one row with each A_l, none of which is written out: linear in the
        tokens wherever the attention is. Source: Abnar and Zuidema 2020, eq. (1). Call `.eval()` first.

        Args:
            x: as for `forward_features`.
            key_padding_mask: as for `forward_features`.
        """
        x, grid, context = self._embed(x, None, key_padding_mask)
        inputs = []
        for block in self.blocks:
            inputs.append(x)
            x = block(x, **context)
        prefix = self.config.prefix
        row = x.new_zeros(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))
        if self.class_token is not None:
            row[:, 0] = 1.0
        elif key_padding_mask is None:
            row[:, prefix:] = 1.0 / (x.shape[1] - prefix)
        else:
            row[:, prefix:] = key_padding_mask / key_padding_mask.sum(dim=1, keepdim=True).clamp(min=1)
        for block, tokens in zip(reversed(list(self.blocks)), reversed(inputs), strict=True):
            block = cast(Block, block)
            read = block.attention.pull_back(block.norm1(tokens), row[:, None], **context)
            row = 0.5 * row + 0.5 * read[:, :, 0].mean(dim=1)
        return row[:, prefix:].unflatten(-1, grid)

    def grid_of(self, size: Sequence[int]) -> tuple[int, ...]:
        """Token grid (gz, gy, gx) for a volume of `size` voxels (zyx); ValueError when under one patch."""
        return self.patch_embed.grid_of(size if self.stem is None else self.stem.grid_of(size))

    def _embed(
        self, x: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, tuple[int, ...], dict[str, Any]]:
        """All tokens with their positions, in the order class, registers, patches; the patch grid; what blocks take."""
        grid = self.grid_of(x.shape[2:]) if x.ndim == self.config.dims + 2 else ()
        tokens = self.patch_embed(x if self.stem is None else self._stem_map(self.stem, x, key_padding_mask, grid))
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
        stream = self.norm.weight.dtype
        parts = [tokens.to(stream) if self.position is None else tokens + self.position(grid).to(stream)]
        if self.register_tokens is not None:
            parts.insert(0, self.register_tokens.expand(batch, -1, -1))
        if self.class_token is not None:
            place = None if self.position is None else self.position.cls
            cls = self.class_token if place is None else self.class_token + place
            parts.insert(0, cls.expand(batch, 1, -1))
        shape = (batch, tokens.shape[1])
        key_padding_mask = whole_mask("Backbone", key_padding_mask, shape, grid, self.config.prefix)
        rotary = None if self.rotary is None else self.rotary(grid, prefix=self.config.prefix)
        context = {"key_padding_mask": key_padding_mask, "rotary": rotary, "grid": grid}
        return torch.cat(parts, dim=1), grid, context

    def _stem_map(self, stem: ResNet, x: Tensor, key_padding_mask: Tensor | None, grid: tuple[int, ...]) -> Tensor:
        """The stem's last map, 0 and never read where it is under no real patch."""
        if key_padding_mask is None:
            return stem.stage_maps(x)[-1]
        real = whole_mask("Backbone", key_padding_mask, (x.shape[0], math.prod(grid)), grid, 0)
        assert real is not None
        # The last real patch of a scan reaches over its end by the padding.
        config = self.config
        reach = [
            max(d * (k - 1) + 1 - 2 * p, s)
            for k, s, p, d in zip(config.kernel, config.stride, config.padding, config.dilation, strict=True)
        ]
        places = spread(real.unflatten(1, grid)[:, None], reach, config.stride, stem.grid_of(x.shape[2:]))
        return stem.stage_maps(x, key_padding_mask=places.flatten(1))[-1]

    def _init_weights(self) -> None:
        """Truncated normal of deviation 0.02 for matrices and tokens, 0 for biases and the mask token."""
        stem = set() if self.stem is None else set(self.stem.modules())
        for module in self.modules():
            kinds = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
            if isinstance(module, kinds) and module not in stem:
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.class_token, self.register_tokens):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        if self.config.alike_start is not None:
            for module in self.modules():
                if isinstance(module, SelfAttention):
                    module.start_alike(self.config.alike_start)


def _attention(config: BackboneConfig, layer: int) -> SelfAttention:
    if config.attention == "disentangled":
        return DisentangledAttention(config.width, config.heads, dims=config.dims, prefix_tokens=config.prefix)
    size: Any = {"width": config.width, "heads": config.heads, "qk_norm": config.qk_norm}
    if config.attention == "softmax":
        return SoftmaxAttention(**size)
    if config.attention == "hopfield":
        return HopfieldAttention(**size, steps=3 if config.hopfield_steps is None else config.hopfield_steps)
    if config.attention == "nystrom":
        # Over the grid, so that padding never comes between neighbours.
        kernel = (3, 3, 3) if config.dims == 3 else (1, 3, 3)
        landmarks = config.num_landmarks or 64
        return NystromAttention(**size, num_landmarks=landmarks, conv_kernel=kernel, prefix_tokens=config.prefix)
    # Seeds far apart, so that layer 1 of seed 0 is not layer 0 of seed 1.
    seed = config.seed * 1_000_003 + layer
    blocks: Any = {"state_blocks": config.blocks, "prefix_tokens": config.prefix}
    return PerformerAttention(**size, num_features=config.num_features, seed=seed, **blocks)


def _mlp(config: BackboneConfig, layer: int) -> MLP | GatedMLP | SwitchMLP:
    if config.mlp == "gated":
        return GatedMLP(config.width, config.mlp_hidden)
    if config.mlp == "dense" or (layer + 1) % (config.moe_every or 2):
        return MLP(config.width, config.mlp_hidden, activation=config.activation)
    return SwitchMLP(
        config.width, config.mlp_hidden, experts=config.experts or 8, dropout=config.expert_dropout,
        capacity_factor=config.capacity_factor or 1.25, jitter=config.router_jitter,
    )  # fmt: skip
