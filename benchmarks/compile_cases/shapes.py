"""What a family hands to the report: its shapes to compile, its counted work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["WIDTHS", "Case", "Family", "Floor"]

WIDTHS = (64, 128)
"""Head widths that have tiles of their own; others take those of the next one up."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of one family, launched on meta tensors."""

    name: str
    width: int
    dtype: torch.dtype
    launches: dict[str, Callable[[], Any]]
    """By configuration key: each starts at least the kernel that key configures."""
    archs: tuple[str, ...] | None = None
    """Chips that have the kernels; None: all."""

    def runs_on(self, arch: str) -> bool:
        return self.archs is None or arch in self.archs


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Counted work of one pass of a family at its headline shape."""

    shape: str
    direction: str
    flop: int
    exponentials: int
    planned_bytes: int
    """What the launch plan moves to and from memory."""
    least_bytes: int
    """Inputs and outputs once."""


@dataclass(frozen=True, kw_only=True)
class Family:
    cases: Callable[..., Iterator[Case]]
    floors: Callable[[], Iterator[Floor]]
    widths: tuple[int, ...] = WIDTHS
    """Head widths with tiles of their own."""
