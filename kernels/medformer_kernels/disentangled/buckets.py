"""From distances between tokens to rows of a table of position vectors.

`axis_expansion` serves volumes: one table an axis, whose rows stand for distances in voxels or millimetres.
`log_buckets` is DeBERTa-v2's function of a distance along a sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["axis_expansion", "axis_rows", "log_buckets"]


def log_buckets(tokens: int, *, num_buckets: int, max_distance: int) -> Tensor:
    """(2 tokens - 1,) int64: the row for each distance query - key = -(tokens - 1) ... tokens - 1.

    Distances up to num_buckets / 2 have rows of their own, larger ones up to `max_distance` share rows that widen
    geometrically; rows run from 0 to 2 num_buckets - 1, distance 0 has row num_buckets. With num_buckets = 0 each
    distance has its own row, clipped to 2 max_distance rows.

    Source: He et al. 2021 (DeBERTa-v2/v3, position_buckets); agrees with transformers to the last row.

    Raises:
        ValueError: a size is too small.
    """
    for name, value, least in (
        ("tokens", tokens, 1),
        ("num_buckets", num_buckets, 0),
        ("max_distance", max_distance, 1),
    ):
        if value < least:
            raise ValueError(f"log_buckets: {name}={value} must be at least {least}")
    distance = torch.arange(1 - tokens, tokens)
    if num_buckets == 0:
        return (distance + max_distance).clamp(0, 2 * max_distance - 1)
    middle = num_buckets // 2
    if middle < 1 or max_distance - 1 <= middle:
        raise ValueError(
            f"log_buckets: num_buckets={num_buckets} must be at least 2 and less than 2 (max_distance - 1) = "
            f"{2 * (max_distance - 1)}; otherwise pass num_buckets=0"
        )
    # float32, as published: in float64 a distance on a boundary would fall into the next row.
    far = distance.abs().clamp_min(middle).float()
    ratio = torch.log(far / middle) / torch.log(torch.tensor((max_distance - 1) / middle)) * (middle - 1)
    beyond = (torch.ceil(ratio) + middle) * distance.sign()
    bucket = torch.where(distance.abs() <= middle, distance, beyond.long())
    return (bucket + num_buckets).clamp(0, 2 * num_buckets - 1)


def axis_rows(max_distance: int, num_buckets: int | None) -> int:
    """Rows of the table of one axis: see `axis_expansion`."""
    return 2 * (max_distance if num_buckets is None else num_buckets) + 1


def axis_expansion(
    size: int,
    *,
    max_distance: int,
    num_buckets: int | None = None,
    spacing: float = 1.0,
    unit: float = 1.0,
) -> Tensor:
    """(2 size - 1, rows) float32: what turns the table of an axis into vectors for distances -(size - 1)...size - 1.

    A distance of d tokens is d spacing / unit units. Its row is that number, clipped to +-max_distance and squeezed
    into `num_buckets` rows a side if given (the first half one unit each, the rest geometric); between two rows it is
    interpolated, so that scans of different spacing share the table. Rows: `axis_rows`, distance 0 in the middle.

    Args:
        size: tokens along the axis.
        max_distance: largest distance, in units, that has a row of its own.
        num_buckets: rows a side; None for one a unit, without logarithm.
        spacing: of the tokens along the axis, mm (or 1.0, for distances in tokens).
        unit: mm a row (or 1.0).

    Raises:
        ValueError: a size or a distance is not positive.
    """
    for name, value in (("size", size), ("max_distance", max_distance), ("spacing", spacing), ("unit", unit)):
        if not value > 0 or value == math.inf:
            raise ValueError(f"axis_expansion: {name}={value} must be positive and finite")
    if num_buckets is not None and not 2 <= num_buckets <= max_distance:
        raise ValueError(f"axis_expansion: num_buckets={num_buckets} must be between 2 and max_distance={max_distance}")
    distance = torch.arange(1 - size, size, dtype=torch.float64) * (spacing / unit)
    far = distance.abs().clamp_max(max_distance)
    side = max_distance
    if num_buckets is not None and num_buckets < max_distance:
        side, middle = num_buckets, num_buckets // 2
        share = (far.clamp_min(middle) / middle).log() / math.log(max_distance / middle)
        far = torch.where(far <= middle, far, middle + share * (side - middle))
    row = far * distance.sign() + side
    low = row.floor().clamp(0, 2 * side)
    part = row - low
    expansion = torch.zeros(2 * size - 1, 2 * side + 1, dtype=torch.float64)
    expansion.scatter_(1, low.long().unsqueeze(1), (1 - part).unsqueeze(1))
    high = (low + 1).clamp_max(2 * side).long()
    expansion.scatter_add_(1, high.unsqueeze(1), part.unsqueeze(1))
    return expansion.float()
