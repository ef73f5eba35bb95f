"""Says when training has collapsed, and which way."""

from __future__ import annotations

import math
from collections import deque
from itertools import pairwise

__all__ = ["CollapseWatch", "JumpWatch", "Recent", "VectorWatch"]


class Recent:
    """Means of the last `window` rows; None until there are so many."""

    def __init__(self, window: int) -> None:
        self.rows: deque[tuple[float, ...]] = deque(maxlen=window)

    def __call__(self, *row: float) -> list[float] | None:
        self.rows.append(row)
        if len(self.rows) < (self.rows.maxlen or 0):
            return None
        return [sum(column) / len(self.rows) for column in zip(*self.rows, strict=True)]


class JumpWatch:
    """For losses that leap: `limit` times the usual difference from one step to the next, above the last `window`.

    Says one leap in `window` steps. The usual difference is the median: a leap does not change it.
    """

    def __init__(self, window: int = 50, limit: float = 10.0) -> None:
        self.losses: deque[float] = deque(maxlen=window)
        self.limit, self.quiet = limit, 0

    def __call__(self, loss: float) -> str | None:
        before, full = sorted(self.losses), len(self.losses) == self.losses.maxlen
        steps = sorted(abs(a - b) for a, b in pairwise(self.losses))
        self.losses.append(loss)
        self.quiet = max(0, self.quiet - 1)
        if not full or self.quiet:
            return None
        usual, middle = steps[len(steps) // 2], before[len(before) // 2]
        if loss <= before[-1] or loss - middle <= self.limit * max(usual, 1e-6 * abs(middle)):
            return None
        self.quiet = len(before)
        return f"the loss leapt to {loss:.4g}, from {middle:.4g} with steps of {usual:.2g}"


class CollapseWatch:
    """For answers over K prototypes (DINO); reports once. Looks at the mean of the last `window` steps.

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
    """For unit vectors of scans (BYOL); reports once. Looks at the mean of the last `window` steps.

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
                f"collapse: the target's vectors are along one line (effective rank {rank:.2f}); raise --optim.lr, "
                "or --batch_size"
            )
        self.warned = message is not None
        return message
