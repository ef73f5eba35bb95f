"""The Moore-Penrose pseudo-inverse of small positive matrices by iteration, and its gradient.

With Y = A Z the step is Z <- Z (13 I - Y (15 I - Y (7 I - Y))) / 4, from Z = A^T / (max row sum * max column sum) of
each matrix. Each singular value is an iteration of its own: a small one, s, grows by 13/4 a step from about s, so that
what is below about (4/13)^iterations of the largest is not inverted but damped.

Source: Razavi et al. 2014, as used by Xiong et al. 2021, eq. (11). Differs: a start value for each sample and head
(published code shares one over the batch, so that a sample's output depends on its batch-mates).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["inverse_times", "inverse_times_backward", "nystrom_pinv", "relative_residual"]


def nystrom_pinv(
    a: Float[Tensor, "*B L L"], *, iterations: int = 6, tolerance: float | None = None
) -> tuple[Float[Tensor, "*B L L"], Float[Tensor, "*B"]]:
    """(z, |a z a - a| / |a| in the Frobenius norm) for each non-negative matrix of `a`.

    With a `tolerance` a matrix whose residual is not above it is left as it is: each stops at its own step, and
    `iterations` is the most that are made. Nothing waits for the device.
    """
    if iterations < 0:
        raise ValueError(f"nystrom_pinv: iterations={iterations} must be at least 0")
    z = _start(a)
    for _ in range(iterations):
        z = _step(a, z, tolerance)
    return z, relative_residual(a, z)


def relative_residual(a: Float[Tensor, "*B L L"], z: Float[Tensor, "*B L L"]) -> Float[Tensor, "*B"]:
    size = torch.linalg.matrix_norm(a)
    return torch.linalg.matrix_norm(a @ z @ a - a) / size.masked_fill(size == 0, 1)


def inverse_times(
    a: Float[Tensor, "*B L L"], x: Float[Tensor, "*B L Dv"], iterations: int, tolerance: float | None
) -> Float[Tensor, "*B L Dv"]:
    """pinv(a) x: as `nystrom_pinv`, but the last two steps are applied to x alone and share one a z.

    With R = I - a z a step is z <- z (I + R + R^2 + R^3 / 4), after which R is R^3 (3 I + R) / 4: 4.5 instead of 8
    products of L^3 for Dv = L / 4. Further back it would cost accuracy: what R lost of a small singular value grows by
    13/4 a step, whereas a product a z made afresh corrects itself.
    """
    if tolerance is not None or iterations < 2:
        return nystrom_pinv(a, iterations=iterations, tolerance=tolerance)[0] @ x
    z = _start(a)
    for _ in range(iterations - 2):
        z = _step(a, z, None)
    r = _plus_identity(_times(a, z, -1), 1)
    square = _times(r, r, 1)
    last = _times(square, 3 * r + square, 0.25)
    y = last @ x
    y_last = last @ y
    x = x + y + y_last + last @ y_last / 4
    y = r @ x
    return z @ (x + y + square @ (x + y / 4))


def _start(a: Tensor) -> Tensor:
    scale = a.sum(-1).amax(-1) * a.sum(-2).amax(-1)
    return a.mT / scale.masked_fill(scale == 0, 1)[..., None, None]


def _step(a: Tensor, z: Tensor, tolerance: float | None) -> Tensor:
    y, _, _, t3 = _polynomials(a, z)
    new = _times(z, t3, 0.25)
    return new if tolerance is None else torch.where(_done(a, y, tolerance), z, new)


def _polynomials(a: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = a @ z
    t1 = _plus_identity(-y, 7)
    t2 = _plus_identity(_times(y, t1, -1), 15)
    return y, t1, t2, _plus_identity(_times(y, t2, -1), 13)


def _times(x: Tensor, y: Tensor, factor: float) -> Tensor:
    """factor x y without a pass of its own for the factor."""
    x3, y3 = x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *y.shape[-2:])
    nothing = x.new_zeros(()).expand_as(x3)
    return torch.baddbmm(nothing, x3, y3, beta=0, alpha=factor).view_as(x)


def _plus_identity(x: Tensor, factor: float) -> Tensor:
    """In place: x is fresh."""
    x.diagonal(dim1=-2, dim2=-1).add_(factor)
    return x


def _done(a: Tensor, y: Tensor, tolerance: float) -> Tensor:
    with torch.no_grad():
        residual = torch.linalg.matrix_norm(y @ a - a, keepdim=True)
        return residual <= tolerance * torch.linalg.matrix_norm(a, keepdim=True)


def inverse_times_backward(
    a: Float[Tensor, "*B L L"],
    x: Float[Tensor, "*B L Dv"],
    dout: Float[Tensor, "*B L Dv"],
    iterations: int,
    tolerance: float | None,
) -> tuple[Float[Tensor, "*B L L"], Float[Tensor, "*B L Dv"]]:
    """(da, dx) of `inverse_times` for rows of `a` that sum to 1 or 0 (whose largest carries no gradient).

    The gradient of the iteration as it was run, not of the exact pseudo-inverse that it approaches.
    """
    history = [_start(a)]
    for _ in range(iterations):
        history.append(_step(a, history[-1], tolerance))
    dx = history[-1].mT @ dout
    dz = dout @ x.mT
    da = torch.zeros_like(a)
    for z in reversed(history[:-1]):
        y, t1, t2, t3 = _polynomials(a, z)
        done = None if tolerance is None else _done(a, y, tolerance)
        dnew = dz * 0.25 if done is None else torch.where(done, 0, dz * 0.25)
        dt3 = z.mT @ dnew
        dt2 = -(y.mT @ dt3)
        dt1 = -(y.mT @ dt2)
        dy = -(dt3 @ t2.mT) - dt2 @ t1.mT - dt1
        da += dy @ z.mT
        kept = dnew @ t3.mT + a.mT @ dy
        dz = kept if done is None else kept + torch.where(done, dz, 0)
    columns = a.sum(-2)
    largest, index = columns.max(-1, keepdim=True)
    scale = (a.sum(-1).amax(-1, keepdim=True) * largest).unsqueeze(-1)
    scale = scale.masked_fill(scale == 0, 1)
    dscale = -(dz * a.mT).sum((-1, -2), keepdim=True) / scale.square()
    chosen = torch.zeros_like(columns).scatter_(-1, index, 1).unsqueeze(-2)
    return da + dz.mT / scale + dscale * a.sum(-1).amax(-1)[..., None, None] * chosen, dx
