"""What a family hands to the report: its shapes to compile, its counted work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["WIDTHS", "Case", "Cost", "Family", "Floor"]

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
class Cost:
    """What one launch does: operations on the matrix units, exponentials, and bytes to and from memory.

    Not counted are weights, omega, and rows and matrices of landmarks, which programs find in the cache.
    """

    flop: int
    exponentials: int = 0
    bytes: int


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

    @property
    def times(self) -> dict[str, float]:
        """Milliseconds that each resource of one H200 needs at least: 790 TFLOP/s, 4.3 TB/s, 3.9 T exp/s."""
        return {
            "FLOP": self.flop / 790e9, "bytes": self.least_bytes / 4.3e9, "exp": self.exponentials / 3.9e9,
        }  # fmt: skip

    @property
    def ms(self) -> float:
        return max(self.times.values())

    @classmethod
    def of(cls, shape: str, direction: str, costs: Iterable[Cost], least_bytes: int) -> Floor:
        costs = list(costs)
        return cls(
            shape=shape,
            direction=direction,
            flop=sum(cost.flop for cost in costs),
            exponentials=sum(cost.exponentials for cost in costs),
            planned_bytes=sum(cost.bytes for cost in costs),
            least_bytes=least_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class Family:
    cases: Callable[..., Iterator[Case]]
    floors: Callable[[], Iterator[Floor]]
    widths: tuple[int, ...] = WIDTHS
    """Head widths with tiles of their own."""
