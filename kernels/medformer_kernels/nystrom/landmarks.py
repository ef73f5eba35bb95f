"""Landmarks: means of queries (or keys) over cells of the token grid, in plain PyTorch.

A grid is (gz, gy, gx) tokens in z, y, x order, a sequence of N tokens is the grid (1, 1, N). An axis of g tokens is cut
into l equal cells of g / l tokens; a token on a boundary belongs to both cells, by its overlap. An axis with fewer
tokens than asked cells has one cell a token. In a padded sequence the real tokens alone are counted: cells are
cut over them, so that padding, wherever it is, changes nothing. In a padded grid the cells stay where they are,
masked tokens leave their mean, and a cell without a real token is no landmark.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medformer_kernels._tracing import certain

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["Cells", "axis_overlap", "landmark_weights", "pool", "ranked_tokens"]


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Which tokens are averaged into which landmark, and the grid of the tokens for the convolution."""

    grid: tuple[int, int, int]
    """Tokens by axis, z, y, x."""
    landmark_grid: tuple[int, int, int]
    """Cells by axis; never more than tokens."""
    prefix: int = 0
    """Tokens before the grid (class and register tokens): each is a landmark of its own."""
    conv_grid: tuple[int, int, int] | None = None
    """Grid of the convolution where it is not `grid`."""

    @property
    def count(self) -> int:
        """Landmarks that are means."""
        return math.prod(self.landmark_grid)

    @property
    def sequence(self) -> bool:
        return certain(self.grid[0] == 1) and certain(self.grid[1] == 1)


def axis_overlap(tokens: int, cells: int, *, device: torch.device | None = None) -> Float[Tensor, "l g"]:
    """Share of each token in the mean of each cell, in float64; rows sum to 1."""
    token = torch.arange(tokens, device=device)
    cell = torch.arange(cells, device=device).unsqueeze(1)
    overlap = torch.minimum((token + 1) * cells, (cell + 1) * tokens) - torch.maximum(token * cells, cell * tokens)
    return overlap.clamp_min(0).double() / tokens


def landmark_weights(
    cells: Cells, *, key_padding_mask: Bool[Tensor, "B N"] | None = None, device: torch.device | None = None
) -> Float[Tensor, "B P+L N"]:
    """The means as dense weights (1, P + L, N), or a matrix a sample under a mask, in float64: the definition.

    A row of zeros is no landmark.
    """
    if key_padding_mask is not None:
        device = key_padding_mask.device
        rows = []
        for mask in key_padding_mask:
            inner = mask[cells.prefix :]
            if cells.sequence:
                mean = inner.new_zeros((cells.count, inner.shape[0]), dtype=torch.float64)
                real = int(inner.sum())
                if real:
                    number = min(cells.count, real)
                    mean[:number, inner] = axis_overlap(real, number, device=device)
            else:
                mean = _grid_weights(cells, device) * inner
                mean = mean / mean.sum(1, keepdim=True).masked_fill(~(mean > 0).any(1, keepdim=True), 1)
            own = torch.diag(mask[: cells.prefix].double())
            rows.append(torch.block_diag(own, mean))
        return torch.stack(rows)
    own = torch.eye(cells.prefix, dtype=torch.float64, device=device)
    return torch.block_diag(own, _grid_weights(cells, device)).unsqueeze(0)


def _grid_weights(cells: Cells, device: torch.device | None) -> Tensor:
    weights = torch.ones(1, 1, dtype=torch.float64, device=device)
    for tokens, number in zip(cells.grid, cells.landmark_grid, strict=True):
        weights = torch.kron(weights, axis_overlap(tokens, number, device=device))
    return weights


def ranked_tokens(key_padding_mask: Bool[Tensor, "B N"]) -> tuple[Tensor, Tensor]:
    """(tokens of each sample, the real ones first and in order (B, N), how many are real (B))."""
    order = torch.sort(~key_padding_mask, dim=1, stable=True).indices
    return order, key_padding_mask.sum(1)


def pool(
    x: Float[Tensor, "B H N D"], cells: Cells, key_padding_mask: Bool[Tensor, "B N"] | None
) -> tuple[Float[Tensor, "B H P+L D"], Bool[Tensor, "B P+L"] | None]:
    """(landmarks in the dtype of x, which of them are landmarks), without an N x L matrix and differentiable.

    Means are taken in float32, or float64 for float64.
    """
    inner = x[:, :, cells.prefix :]
    mask = None if key_padding_mask is None else key_padding_mask[:, cells.prefix :]
    valid = None
    # In a graph that leaves sizes open the general means, which are right for all of them.
    equal = (certain(g % number == 0) for g, number in zip(cells.grid, cells.landmark_grid, strict=True))
    if mask is None and all(equal):
        shape = [s for g, number in zip(cells.grid, cells.landmark_grid, strict=True) for s in (number, g // number)]
        dtype = torch.promote_types(x.dtype, torch.float32)
        means = inner.unflatten(2, shape).mean((3, 5, 7), dtype=dtype).flatten(2, 4)
    elif cells.sequence:
        means, valid = _sequence_means(inner, cells.count, mask)
    else:
        means, valid = _grid_means(inner, cells, mask)
    means = means.to(x.dtype)
    valid = None if key_padding_mask is None else valid
    if cells.prefix == 0:  # an empty slice of x would have a gradient of the size of x
        return means, valid
    own = x[:, :, : cells.prefix]
    if key_padding_mask is None or valid is None:
        return torch.cat((own, means), 2), None
    own_valid = key_padding_mask[:, : cells.prefix]
    own = own.masked_fill(~own_valid[:, None, :, None], 0)
    return torch.cat((own, means), 2), torch.cat((own_valid, valid), 1)


def _sequence_means(x: Tensor, number: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each cell gathers the tokens it overlaps: N rows (and the shared ones twice), summed with their weights."""
    batch, tokens = x.shape[0], x.shape[2]
    if mask is None:
        order, real = None, torch.full((1, 1, 1), tokens, device=x.device)
    else:
        order, real = ranked_tokens(mask)
        real = real.view(-1, 1, 1)
    cells = real.clamp_max(number)
    cell = torch.arange(number, device=x.device).view(1, -1, 1)
    # A cell of n / L tokens overlaps at most ceil(n / L) + 1; a sample of n <= L tokens has one token a cell.
    longest = -(-tokens // number) + 1
    rank = cell * real // cells.clamp_min(1) + torch.arange(longest, device=x.device)
    overlap = torch.minimum((rank + 1) * cells, (cell + 1) * real) - torch.maximum(rank * cells, cell * real)
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = torch.where(cell < cells, overlap.clamp_min(0), 0).to(dtype) / real.clamp_min(1)
    rank = rank.clamp_max(tokens - 1)
    if order is None:
        rows = x[:, :, rank[0]]
        weight = weight.unsqueeze(1)
    else:
        index = order.gather(1, rank.flatten(1)).view_as(rank)
        rows = x[torch.arange(batch, device=x.device).view(-1, 1, 1), :, index].permute(0, 3, 1, 2, 4)
        weight = weight.unsqueeze(1)
        rows = rows.masked_fill((weight == 0).unsqueeze(-1), 0)
    means = (weight.unsqueeze(-2) @ rows.to(dtype)).squeeze(-2)
    return means, (cell < cells).view(-1, number).expand(batch, -1)


def _grid_means(x: Tensor, cells: Cells, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Axis by axis: the weights are a product."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    axes = [
        axis_overlap(g, number, device=x.device).to(dtype)
        for g, number in zip(cells.grid, cells.landmark_grid, strict=True)
    ]

    def contract(x: Tensor) -> Tensor:
        x = x.unflatten(2, cells.grid).to(dtype)
        x = axes[2] @ x
        x = (axes[1] @ x.flatten(4)).unflatten(4, x.shape[4:])
        return (axes[0] @ x.flatten(3)).unflatten(3, x.shape[3:]).flatten(2, 4)

    if mask is None:
        return contract(x), torch.ones(x.shape[0], cells.count, dtype=torch.bool, device=x.device)
    total = contract(mask[:, None, :, None].to(dtype))
    valid = contract(mask[:, None, :, None].double()) > 0
    means = contract(x.masked_fill(~mask[:, None, :, None], 0)) / total.masked_fill(~valid, 1)
    return means, valid[:, 0, :, 0]
