"""Attentive CutMix: the cells of another scan that matter most are pasted in place, and the target is mixed alike.

Source: Walawalkar et al. 2020, section 2: top 6 of 49 cells of a frozen network's map, label weight 6 / 49.
Differs: 3D as well as 2D, the map is that of the teacher, which gets no gradient, and the targets mixed are those of
self-supervision.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["attentive", "top_cells"]


def top_cells(attention: Float[Tensor, "N ..."], count: int) -> Bool[Tensor, "N ..."]:
    """True at the `count` cells of each map with the most attention."""
    flat = attention.flatten(1)
    best = flat.topk(count, dim=1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, best, True).view_as(attention)


def attentive(
    x: Float[Tensor, "N Ch *size"], attention: Float[Tensor, "N ..."], share: float, *, views: int = 1
) -> tuple[Float[Tensor, "N Ch *size"], Int[Tensor, " N"], Float[Tensor, " N"]]:
    """Paste the top cells of each scan's successor over it.

    Args:
        x: `views` views of each scan, view by view; a view gets cells of the same view of the next scan.
        attention: of each view over its patches; pooled to at most 7 cells an axis.
        share: of the cells that are pasted; at least one is.

    Returns the mixed views, for each view the scan (0 to scans - 1) its cells come from, and their share of it.
    """
    scans = len(x) // views
    if scans < 2:
        raise ValueError(f"attentive CutMix: {scans} scan has no other to take cells from; use --batch_size 2 or more")
    partner = torch.arange(scans, device=x.device).roll(-1).repeat(views)
    source = partner + scans * torch.arange(views, device=x.device).repeat_interleave(scans)
    cells = [min(7, n) for n in attention.shape[1:]]
    pool: Any = F.adaptive_avg_pool3d if len(cells) == 3 else F.adaptive_avg_pool2d
    chosen = top_cells(pool(attention[:, None].float(), cells)[:, 0], max(1, round(share * math.prod(cells))))
    pasted = F.interpolate(chosen[source, None].float(), size=x.shape[2:], mode="nearest") > 0.5
    weight = pasted.flatten(1).float().mean(1)  # cells at the edge may be larger by a voxel
    return torch.where(pasted, x[source], x), partner, weight
