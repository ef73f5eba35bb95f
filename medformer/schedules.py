"""Schedules as pure functions of the step.

Nothing here has state: a resumed run computes the same value at the same step.
Source: Caron et al. 2021 (DINO) for the shapes: linear warm-up, then a half cosine.
"""

from __future__ import annotations

import math

__all__ = ["cosine", "linear"]


def linear(step: int, over: int, start: float, end: float) -> float:
    """`start` at step 0, `end` from step `over` on."""
    return end if step >= over else start + (end - start) * step / over


def cosine(step: int, steps: int, start: float, end: float, *, warmup: int = 0) -> float:
    """Half cosine from `start` to `end` at step `steps`, after a linear rise from 0 over `warmup` steps.

    The first of W warm-up steps gets start / W, not 0, so that no step is wasted; steps past the end stay at `end`.
    """
    if step < warmup:
        return start * (step + 1) / warmup
    along = min(1.0, (step - warmup) / max(1, steps - warmup))
    return end + (start - end) * (1 + math.cos(math.pi * along)) / 2
