"""Batch norm over all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peers import summed

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the rows of all processes, on any device; torch's own needs a GPU."""

    def forward(self, x: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
        uses_batch = self.training or not self.track_running_stats
        if not (uses_batch and dist.is_initialized()):
            return super().forward(x)
        # Centred before it is squared: the mean of squares less the square of the mean has no digits left where a
        # batch's rows differ little, as they do at the start.
        sums = summed(torch.cat([x.float().sum(0), x.new_tensor([len(x)], dtype=torch.float32)]))
        rows = sums[-1]
        x = x.float() - sums[:-1] / rows
        variance = summed(x.square().sum(0)) / rows
        if self.track_running_stats:
            with torch.no_grad():
                assert self.running_mean is not None
                assert self.running_var is not None
                assert self.num_batches_tracked is not None
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(sums[:-1] / rows, self.momentum or 0.1)
                self.running_var.lerp_(variance * rows / (rows - 1).clamp_min(1), self.momentum or 0.1)
        x = x * torch.rsqrt(variance + self.eps)
        return x * self.weight + self.bias if self.affine else x
