"""Says when training has collapsed, and which way."""

from __future__ import annotations

import math
from collections import deque

__all__ = ["CollapseWatch", "Recent", "VectorWatch"]


class Recent:
    """Means of the last `window` rows; None until there are so many."""

    def __init__(self, window: int) -> None:
        self.rows: deque[tuple[float, ...]] = deque(maxlen=window)

    def __call__(self, *row: float) -> list[float] | None:
        self.rows.append(row)
        if len(self.rows) < (self.rows.maxlen or 0):
            return None
        return [sum(column) / len(self.rows) for column in zip(*self.rows, strict=True)]


class CollapseWatch:
    """For answers over K prototypes (DINO); tells once. Looks at the mean of the last `window` steps.

    Uniform: every scan gets the same even answer; the loss sticks at ln K (8.3178 for K = 4096).
    Single: every scan gets the same prototype; the teacher's mean answer has no entropy left.
    """

    def __init__(self, prototypes: int, window: int = 100) -> None:
        self.ceiling = math.log(prototypes)
        self.recent = Recent(window)
        self.warned = False

    def __call__(self, loss: float, entropy: float, marginal: float) -> str | None:
        means = self.recent(loss, entropy, marginal)
        if self.warned or means is None:
            return None
        loss, entropy, marginal = means
        message = None
        if abs(loss - self.ceiling) < 0.002 * self.ceiling and entropy > 0.99 * self.ceiling:
            message = (
                f"collapse: the loss has stuck at ln K = {self.ceiling:.4f}, the teacher answers evenly for every "
                "scan; use --dino.norm batch with --dino.koleo 0.1, or lower --dino.teacher_temp"
            )
        elif marginal < 0.02 * self.ceiling:
            message = (
                f"collapse: the teacher gives every scan the same prototype (entropy {marginal:.3f} of "
                f"{self.ceiling:.3f}); raise --dino.teacher_temp, or lower --dino.centre_momentum or --optim.lr"
            )
        self.warned = message is not None
        return message


class VectorWatch:
    """For unit vectors of scans (BYOL); tells once. Looks at the mean of the last `window` steps.

    Point: every scan gets the same vector, their `spread` (variance, 0 to 1) is gone.
    Line: vectors differ along one direction only, their `rank` (effective dimensions) is 1.
    """

    def __init__(self, window: int = 100) -> None:
        self.recent = Recent(window)
        self.warned = False

    def __call__(self, spread: float, rank: float) -> str | None:
        means = self.recent(spread, rank)
        if self.warned or means is None:
            return None
        spread, rank = means
        message = None
        if spread < 1e-3:
            message = (
                f"collapse: the target gives every scan the same vector (spread {spread:.1e} of 1); raise "
                "--byol.momentum, lower --optim.lr or use --byol.norm batch"
            )
        elif rank < 1.1:
            message = (
                f"collapse: the target's vectors lie along one line (effective rank {rank:.2f}); raise --optim.lr, "
                "or --batch_size"
            )
        self.warned = message is not None
        return message
