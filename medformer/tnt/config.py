"""What decides the shape of a Transformer-in-Transformer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, cast

from medformer.tnt.windows import window_grid

__all__ = ["TNTConfig", "TNTLevel"]

ATTENTIONS = ("performer", "nystrom", "softmax", "disentangled")
FUSIONS = ("add", "replace", "raw")


@dataclass(frozen=True, kw_only=True)
class TNTLevel:
    """One level of detail: which part of the level below a token sees, and the blocks it passes through."""

    width: int
    """Channels of a token."""
    depth: int = 12
    """Blocks, interleaved with those of the other levels."""
    heads: int = 4
    """Attention heads; must divide width."""
    kernel: int | tuple[int, ...] = 4
    """Window in tokens of the level below, in voxels for the first level. One number, or one per axis, zyx."""
    stride: int | tuple[int, ...] = 4
    """Step between windows; below the kernel they overlap, and what they share is held once for each."""
    padding: int | tuple[int, ...] = 0
    """Zeros on both ends of each axis of the level below."""
    dilation: int | tuple[int, ...] = 1
    """Step between the tokens (voxels) of a window."""
    mlp_ratio: float = 4.0
    """Hidden channels of the MLP, as a multiple of width."""
    fusion: Literal["add", "replace", "raw"] = "add"
    """How tokens take up the level below, in every block; the first level has none below. add: they start as an
    embedding of their window, and the window's tokens are projected and added. replace: no embedding of their own,
    only what is projected from below. raw: the tokens below are laid end to end and added without a linear layer; width
    must be that of the window."""


@dataclass(frozen=True, kw_only=True)
class TNTConfig:
    """Everything that decides the shape and the random features of a `TNT`."""

    levels: tuple[TNTLevel, ...]
    """Finest first, at least two. All but the last attend within one token of the next level; the last over all."""
    dims: int = 3
    """Spatial axes of the input: 3 for volumes (Z, Y, X), 2 for images (Y, X)."""
    in_channels: int = 1
    """Channels of the input, one per modality, window or colour."""
    attention: Literal["performer", "nystrom", "softmax", "disentangled"] = "performer"
    """Of the last level."""
    num_features: int | None = None
    """Random features per head of performer attention; null takes D ln D rounded to a multiple of 64."""
    num_landmarks: int = 64
    """Landmarks of nystrom attention."""
    projection: Literal["token", "window"] = "token"
    """How a window is normalised before it is projected. token: LayerNorm over each of its tokens, as published.
    window: LayerNorm over all of it, no bias, LayerNorm behind, as in timm since 1.0.20."""
    isolate: bool = False
    """The first level's convolution sees only the voxels of one window of the second, zeros beyond, as timm's newer
    variant does; needs windows of the second level without padding and dilation."""
    class_token: bool = True
    """Prepend a learned class token to the last level; without it the summary is the mean of its tokens."""
    position_grid: int | tuple[int, ...] | None = None
    """Base grid of the last level's position table: one number, one per axis, or null for 8 (3D) and 14 (2D)."""
    classes: int = 0
    """Outputs of a linear head on the summary; 0 for none."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias."""
    dropout: float = 0.0
    """Share of the elements that each branch of the inner blocks drops in training."""
    drop_path: float = 0.0
    """Stochastic depth at the last stage, falling linearly to 0 at the first: of sequences (inner), samples (last)."""
    norm_eps: float = 1e-6
    """Of every LayerNorm."""
    seed: int = 0
    """Of the random features; weights follow torch's own generator."""

    def __post_init__(self) -> None:
        levels = tuple(_level(index, level) for index, level in enumerate(self.levels))
        object.__setattr__(self, "levels", levels)
        _check(self.dims in (2, 3), f"dims={self.dims} must be 2 or 3")
        _check(len(levels) >= 2, f"levels has {len(levels)} entries; it must have at least 2, the finest first")
        for name, least in (("in_channels", 1), ("num_landmarks", 1), ("classes", 0), ("seed", 0)):
            _check_int("", name, getattr(self, name), least)
        for name, choices in (("attention", ATTENTIONS), ("projection", ("token", "window"))):
            _check(
                getattr(self, name) in choices, f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}"
            )
        for name in ("dropout", "drop_path"):
            _check(0.0 <= getattr(self, name) < 1.0, f"{name}={getattr(self, name)} must be at least 0 and below 1")
        _check(self.norm_eps > 0.0, f"norm_eps={self.norm_eps} must be above 0")
        _check(
            len(self.base_grid) == self.dims and all(isinstance(size, int) and size >= 1 for size in self.base_grid),
            f"position_grid={self.position_grid} must be one number of at least 1, or {self.dims}, one per axis",
        )
        for index in range(len(levels)):
            self._check_level(index)
        _check(
            not self.isolate or (not any(self.axes(1, "padding")) and set(self.axes(1, "dilation")) == {1}),
            "isolate=True needs level 1 to have padding=0 and dilation=1",
        )

    def axes(self, index: int, name: str) -> tuple[int, ...]:
        """kernel, stride, padding or dilation of a level, for every axis."""
        value = getattr(self.levels[index], name)
        return (value,) * self.dims if isinstance(value, int) else tuple(value)

    @property
    def base_grid(self) -> tuple[int, ...]:
        """position_grid for every axis."""
        value = self.position_grid if self.position_grid is not None else (8 if self.dims == 3 else 14)
        return (value,) * self.dims if isinstance(value, int) else tuple(value)

    @property
    def width(self) -> int:
        """Channels of a token of the last level."""
        return self.levels[-1].width

    @property
    def prefix(self) -> int:
        """Class tokens in front of those of the last level."""
        return int(self.class_token)

    def grids(self, size: Sequence[int]) -> list[tuple[int, ...]]:
        """The grid of every level for an input of `size` voxels (zyx), overlaps held once.

        Raises:
            ValueError: a window does not fit; names the level.
        """
        found, grid = [], tuple(size)
        if len(grid) != self.dims:
            raise ValueError(f"TNT: size={grid} must have {self.dims} axes")
        for index in range(len(self.levels)):
            geometry = (self.axes(index, name) for name in ("kernel", "stride", "padding", "dilation"))
            grid = window_grid(index, grid, *geometry)
            found.append(grid)
        return found

    def window(self, index: int) -> int:
        """Tokens of level `index - 1` in one token of level `index`."""
        return math.prod(self.axes(index, "kernel"))

    def _check_level(self, index: int) -> None:
        level, at = self.levels[index], f"level {index}: "
        for name in ("width", "depth", "heads"):
            _check_int(at, name, getattr(level, name), 1)
        if level.width % level.heads:
            near = [h for h in range(1, level.width + 1) if level.width % h == 0]
            choice = [h for h in near if h < level.heads][-1:] + [h for h in near if h > level.heads][:1]
            _check(
                False,
                f"{at}heads={level.heads} must divide width={level.width}; use {' or '.join(map(str, choice))}",
            )
        for name, least in (("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            given = getattr(level, name)
            _check(
                isinstance(given, int) or (isinstance(given, (tuple, list)) and len(given) == self.dims),
                f"{at}{name}={given!r} must be one number or {self.dims}, one per axis",
            )
            for value in self.axes(index, name):
                _check_int(at, name, value, least)
        for kernel, padding, dilation in zip(
            *(self.axes(index, name) for name in ("kernel", "padding", "dilation")), strict=True
        ):
            _check(
                padding < dilation * (kernel - 1) + 1,
                f"{at}padding={padding} must be below the window's reach of {dilation * (kernel - 1) + 1}: "
                "a window must see something",
            )
        _check(
            isinstance(level.mlp_ratio, (int, float))
            and math.isfinite(level.mlp_ratio)
            and round(level.width * level.mlp_ratio) >= 1,
            f"{at}mlp_ratio={level.mlp_ratio} must leave at least one hidden channel at width={level.width}",
        )
        _check(level.fusion in FUSIONS, f"{at}fusion={level.fusion!r} must be one of {', '.join(FUSIONS)}")
        if index == 0:
            _check(level.fusion == "add", f"{at}fusion={level.fusion!r} has no level below to fuse; leave 'add'")
        elif level.fusion == "raw":
            width = self.window(index) * self.levels[index - 1].width
            _check(
                level.width == width,
                f"{at}width={level.width} must be {width} with fusion='raw': {self.window(index)} tokens of "
                f"{self.levels[index - 1].width} channels end to end",
            )


def _level(index: int, level: object) -> TNTLevel:
    """A level of a `TNTConfig`, which a configuration file gives as a mapping."""
    if isinstance(level, Mapping):
        names = [field.name for field in fields(TNTLevel)]
        unknown = ", ".join(sorted(map(str, level.keys() - set(names))))
        _check(not unknown, f"level {index}: {unknown} is unknown; a level has {', '.join(names)}")
        _check("width" in level, f"level {index}: width is missing")
        level = TNTLevel(**level)
    _check(isinstance(level, TNTLevel), f"level {index}: {level!r} must be a TNTLevel")
    return cast(TNTLevel, level)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(f"TNTConfig: {message}")


def _check_int(at: str, name: str, value: object, least: int) -> None:
    _check(
        isinstance(value, int) and not isinstance(value, bool) and value >= least,
        f"{at}{name}={value!r} must be a whole number of at least {least}",
    )
