"""A Transformer-in-Transformer with any number of levels, over images and volumes of any size.

Every token of a level holds the n tokens of the level below that its window sees, so that tokens form a tree: level l
is a tensor of S_l sequences of n_l tokens, one sequence for each token of level l + 1, and the last level is one
sequence a sample. A stage runs the inner blocks of the first level, fuses it into the second, runs that, and so on up
to the last, whose attention sees everything. Source: Han et al. 2021, which has two levels.

Shape legend: B batch, Cin image channels, S sequences, n tokens of a window, c and C widths, N tokens of the last
level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medformer.attention import PerformerAttention, SoftmaxAttention
from medformer.blocks import Block
from medformer.disentangled_attention import DisentangledAttention
from medformer.features import Features, layers_of, rows_wanted, split_tokens, whole_mask
from medformer.linear import Linear
from medformer.mlp import MLP
from medformer.nystrom_attention import NystromAttention
from medformer.position import LearnedPosition
from medformer.tnt.blocks import Fusion, InnerBlock
from medformer.tnt.config import TNTConfig
from medformer.tnt.windows import windows

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["TNT"]


class Stage(nn.Module):
    """One round over all levels: for each, what is taken up from below, then its blocks.

    `fusions[l - 1]` leads from level l - 1 to l; None where nothing changed below. The last level's blocks are `outer`.
    """

    def __init__(self, config: TNTConfig, stage: int) -> None:
        super().__init__()
        self.prefix = config.prefix
        stages = config.levels[-1].depth
        drop_path = config.drop_path * stage / max(stages - 1, 1)
        self.inner = nn.ModuleList()
        self.fusions = nn.ModuleList()
        changed = False
        for index, level in enumerate(config.levels[:-1]):
            count = (stage + 1) * level.depth // stages - stage * level.depth // stages
            self.inner.append(
                nn.ModuleList(
                    InnerBlock(
                        level.width, level.heads, round(level.width * level.mlp_ratio), qkv_bias=config.qkv_bias,
                        dropout=config.dropout, drop_path=drop_path,
                    )
                    for _ in range(count)
                )
            )  # fmt: skip
            changed |= count > 0
            above = config.levels[index + 1]
            form = "raw" if above.fusion == "raw" else config.projection
            self.fusions.append(
                Fusion(config.window(index + 1), level.width, above.width, form) if changed else nn.Identity()
            )
        last = config.levels[-1]
        self.outer = Block(
            last.width,
            _attention(config, stage),  # type: ignore[arg-type]
            MLP(last.width, round(last.width * last.mlp_ratio)),
            drop_path=drop_path,
        )

    def forward(
        self, levels: list[Tensor], grid: tuple[int, ...], key_padding_mask: Tensor | None = None
    ) -> list[Tensor]:
        levels = self.fuse(levels)
        levels[-1] = self.outer(levels[-1], grid=grid, key_padding_mask=key_padding_mask)
        return levels

    def fuse(self, levels: list[Tensor]) -> list[Tensor]:
        """The levels as the last level's attention finds them."""
        levels = list(levels)
        for index, (blocks, fusion) in enumerate(zip(self.inner, self.fusions, strict=True)):
            for block in blocks:  # type: ignore[union-attr]
                levels[index] = block(levels[index])
            if isinstance(fusion, Fusion):
                above = levels[index + 1]
                if index + 2 < len(levels):
                    levels[index + 1] = fusion(levels[index], above.flatten(0, 1)).view(above.shape)
                else:
                    taken = fusion(levels[index])
                    taken = taken.view(above.shape[0], above.shape[1] - self.prefix, above.shape[2])
                    levels[index + 1] = above + F.pad(taken, (0, 0, self.prefix, 0))
        return levels


class TNT(nn.Module):
    """Transformer-in-Transformer.

    >>> fine, coarse = TNTLevel(width=12, depth=2, heads=2), TNTLevel(width=48, depth=2, heads=2, kernel=2, stride=2)
    >>> model = TNT(TNTConfig(levels=(fine, coarse)))
    >>> model(torch.zeros(1, 1, 33, 20, 24)).shape
    torch.Size([1, 48])

    Attributes:
        config: what it was built from.
        checkpoint_activations: in training, keep only what enters each stage and compute the rest again in backward.
    """

    def __init__(self, config: TNTConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        levels, dims = config.levels, config.dims
        conv = nn.Conv3d if dims == 3 else nn.Conv2d
        self.conv = conv(
            config.in_channels, levels[0].width, *(config.axes(0, name) for name in ("kernel", "stride")),  # type: ignore[arg-type]
            **({"padding": config.axes(0, "padding"), "dilation": config.axes(0, "dilation")}),  # type: ignore[arg-type]
        )  # fmt: skip
        # The place of a token in its window; of the last level, in the volume.
        self.positions = nn.ParameterList(
            nn.Parameter(torch.empty(config.window(index + 1), level.width)) for index, level in enumerate(levels[:-1])
        )
        self.stems = nn.ModuleList(
            Fusion(
                config.window(index), levels[index - 1].width, level.width, "stem" if level.fusion == "add" else "raw"
            )
            if level.fusion != "replace"
            else nn.Identity()
            for index, level in enumerate(levels[1:], start=1)
        )
        self.class_token = nn.Parameter(torch.empty(levels[-1].width)) if config.class_token else None
        self.position = LearnedPosition(levels[-1].width, config.base_grid, class_token=config.class_token)
        self.stages = nn.ModuleList(Stage(config, stage) for stage in range(levels[-1].depth))
        self.norm = nn.LayerNorm(levels[-1].width)
        self.head = nn.Linear(levels[-1].width, config.classes) if config.classes else None
        self._init_weights()

    def forward(self, x: Float[Tensor, "B Cin *size"]) -> Float[Tensor, "B C"]:
        """One vector per scan: `forward_features(x).cls`, or the head's outputs where there is one."""
        cls = self.forward_features(x).cls
        return cls if self.head is None else self.head(cls)

    def forward_features(
        self, x: Float[Tensor, "B Cin *size"], *, key_padding_mask: Bool[Tensor, "B N"] | None = None
    ) -> Features:
        """The tokens of the last level.

        Args:
            x: volumes (B, Cin, Z, Y, X) or images (B, Cin, Y, X), floating point, of any size that holds one window
                of every level.
            key_padding_mask: True where a token of the last level is real; the others are never read, and their
                own features mean nothing.

        Raises:
            ValueError: `x` or the mask has the wrong shape, or some level's window does not fit; names the level.
        """
        return self.get_intermediate_layers(x, key_padding_mask=key_padding_mask)[0]

    def get_intermediate_layers(
        self,
        x: Float[Tensor, "B Cin *size"],
        layers: int | Sequence[int] = 1,
        *,
        norm: bool = True,
        key_padding_mask: Bool[Tensor, "B N"] | None = None,
    ) -> list[Features]:
        """The last level's tokens after several stages, first stage first; arguments as in `Backbone`.

        Raises:
            IndexError: no such stage.
        """
        levels, grid, mask = self._prepare(x, key_padding_mask)
        found = []
        wanted = layers_of("TNT", layers, len(self.stages))
        for index, stage in enumerate(self.stages):
            if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                levels = checkpoint(stage, levels, grid, mask, use_reentrant=False)
            else:
                levels = stage(levels, grid, mask)
            if index in wanted:
                tokens = self.norm(levels[-1]) if norm else levels[-1]
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
        """How much the class token, or chosen tokens, read each token of the last level; arguments as in `Backbone`."""
        levels, grid, mask = self._prepare(x, key_padding_mask)
        stop, chosen = rows_wanted("TNT", layer, queries, len(self.stages), self.config, levels[-1].shape[1])
        for stage in self.stages[:stop]:
            levels = stage(levels, grid, mask)
        stage = cast(Stage, self.stages[stop])
        tokens, outer = stage.fuse(levels)[-1], stage.outer
        rows = outer.attention.attention_rows(outer.norm1(tokens), chosen, key_padding_mask=mask, grid=grid)
        rows = rows[..., self.config.prefix :].unflatten(-1, grid)
        return rows[:, :, 0] if queries is None else rows

    def grid_of(self, size: Sequence[int]) -> tuple[int, ...]:
        """Token grid of the last level for an input of `size` voxels, zyx.

        Raises:
            ValueError: a window does not fit; names the level.
        """
        return self.config.grids(size)[-1]

    def _geometry(self, index: int) -> tuple[tuple[int, ...], ...]:
        kernel, stride, padding, dilation = (
            self.config.axes(index, name) for name in ("kernel", "stride", "padding", "dilation")
        )
        return kernel, stride, padding, dilation

    def _prepare(
        self, x: Tensor, key_padding_mask: Tensor | None
    ) -> tuple[list[Tensor], tuple[int, ...], Tensor | None]:
        """Levels as they start, the last level's grid, and the mask with the class token in front."""
        grid = self.grid_of(x.shape[2:]) if x.ndim == self.config.dims + 2 else ()
        if x.ndim != self.config.dims + 2 or x.shape[1] != self.config.in_channels or not x.is_floating_point():
            axes = "Z, Y, X" if self.config.dims == 3 else "Y, X"
            raise ValueError(
                f"TNT: x of shape {tuple(x.shape)} and dtype {x.dtype} must be floating point "
                f"(B, {self.config.in_channels}, {axes})"
            )
        mask = whole_mask("TNT", key_padding_mask, (x.shape[0], math.prod(grid)), grid, self.config.prefix)
        return self._embed(x), grid, mask

    def _embed(self, x: Tensor) -> list[Tensor]:
        """Every level as it starts: (S, n, c) for each, (B, 1 + N, C) for the last."""
        config, batch = self.config, x.shape[0]
        # (B, *grid, c), and for levels gone through, their tokens below each token of the present grid.
        tokens = self._first_windows(x) if config.isolate else self.conv(x).movedim(1, -1)
        below: list[Tensor] = []
        for index in range(1, len(config.levels)):
            geometry = self._geometry(index)
            inner = config.levels[index - 1].width
            if not (config.isolate and index == 1):
                tokens = windows(tokens, *geometry)
                below = [windows(level, *geometry) for level in below]
            tokens = tokens.unflatten(-1, (-1, inner)) + self.positions[index - 1]
            below.append(tokens.flatten(-2))
            tokens = self._start(index, tokens)
        # Not by reshape, whose -1 has no meaning in an empty batch.
        levels = [
            level.unflatten(-1, (-1, config.window(index + 1), config.levels[index].width)).flatten(0, -3)
            for index, level in enumerate(below)
        ]
        grid = tuple(tokens.shape[1:-1])
        tokens = tokens.flatten(1, -2) + self.position(grid).to(tokens.dtype)
        if self.class_token is not None and self.position.cls is not None:
            cls = (self.class_token + self.position.cls).to(tokens.dtype)
            tokens = torch.cat([cls.expand(batch, 1, -1), tokens], dim=1)
        return [*levels, tokens]

    def _start(self, index: int, below: Tensor) -> Tensor:
        """Tokens (B, *grid, C) of a level as they start, from their windows (B, *grid, n, c)."""
        stem = self.stems[index - 1]
        width = self.config.levels[index].width
        if isinstance(stem, Fusion):
            return stem(below.flatten(0, -3)).view(*below.shape[:-2], width)
        return below.new_zeros(*below.shape[:-2], width)

    def _first_windows(self, x: Tensor) -> Tensor:
        """(B, *grid of the second level, n c): the first level's convolution within each window of the second alone."""
        config = self.config
        step = self._geometry(0)[1]
        kernel, stride, padding, dilation = self._geometry(1)
        reach = [k * s for k, s in zip(kernel, step, strict=True)]
        hop = [t * s for t, s in zip(stride, step, strict=True)]
        voxels = windows(x.movedim(1, -1), reach, hop, padding, dilation)  # (B, *windows, prod(reach) Cin)
        patches = voxels.unflatten(-1, (*reach, config.in_channels)).flatten(0, -2 - len(reach)).movedim(-1, 1)
        tokens = self.conv(patches).flatten(2).transpose(1, 2)
        if tokens.shape[1] != config.window(1):
            raise ValueError(
                f"TNT: level 0: with isolate=True its convolution must turn {tuple(reach)} voxels into "
                f"{kernel} tokens; give it padding of about half its kernel"
            )
        return tokens.flatten(1).view(*voxels.shape[:-1], config.window(1) * config.levels[0].width)

    def _init_weights(self) -> None:
        """Truncated normal of deviation 0.02 for matrices, tokens and positions, 0 for biases."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.eps = self.config.norm_eps
        for parameter in (*self.positions, self.class_token):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)


def _attention(config: TNTConfig, stage: int) -> nn.Module:
    last, prefix = config.levels[-1], int(config.class_token)
    size: dict[str, Any] = {"width": last.width, "heads": last.heads, "qkv_bias": config.qkv_bias}
    if config.attention == "softmax":
        return SoftmaxAttention(**size)
    if config.attention == "nystrom":
        kernel = (3, 3, 3) if config.dims == 3 else (1, 3, 3)
        return NystromAttention(**size, num_landmarks=config.num_landmarks, conv_kernel=kernel, prefix_tokens=prefix)
    if config.attention == "disentangled":
        return DisentangledAttention(**size, dims=config.dims, prefix_tokens=prefix)
    seed = config.seed * 1_000_003 + stage  # far apart: stage 1 of seed 0 is not stage 0 of seed 1
    attention = PerformerAttention(last.width, last.heads, num_features=config.num_features, seed=seed)
    if not config.qkv_bias:
        attention.qkv = Linear(last.width, 3 * last.width, bias=False)
    return attention
