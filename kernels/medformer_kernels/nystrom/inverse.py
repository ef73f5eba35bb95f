"""The Moore-Penrose pseudo-inverse of small positive matrices by iteration, and its gradient.

With Y = A Z the step is Z <- Z (13 I - Y (15 I - Y (7 I - Y))) / 4, from Z = A^T / (max row sum * max column sum) of
each matrix. Each singular value is an iteration of its own: a small one, s, grows by 13/4 a step from about s, so that
what is below about (4/13)^iterations of the largest is not inverted but damped.

Source: Razavi et al. 2014, as used by Xiong et al. 2021, eq. (11). Differs: a start value for each sample and head
(published code shares one over the batch, so that a sample's output depends on its batch-mates).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medformer_kernels._operators import transformed
from medformer_kernels._products import multiply
from medformer_kernels._tracing import standard

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["inverse_times", "inverse_times_backward", "nystrom_pinv", "relative_residual", "start", "start_backward"]


def nystrom_pinv(
    a: Float[Tensor, "*B L L"], *, iterations: int = 6, tolerance: float | None = None
) -> tuple[Float[Tensor, "*B L L"], Float[Tensor, "*B"]]:
    """(z, |a z a - a| / |a| in the Frobenius norm) for each non-negative matrix of `a`.

    With a `tolerance` a matrix whose residual is not above it is left as it is: each stops at its own step, and
    `iterations` is the most that are made. Nothing waits for the device.
    """
    if iterations < 0:
        raise ValueError(f"nystrom_pinv: iterations={iterations} must be at least 0")
    z = start(a)
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
    13/4 a step, whereas a product a z made afresh corrects itself. The gradient is `inverse_times_backward`'s.
    """
    if tolerance is not None or iterations < 2 or transformed():
        return nystrom_pinv(a, iterations=iterations, tolerance=tolerance)[0] @ x
    return _InverseTimes.apply(a, x, iterations)


class _InverseTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, x: Tensor, iterations: int) -> Tensor:
        out, kept = _applied(a, x, iterations, keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(a, x, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        a, x, *kept = ctx.saved_tensors
        return *_applied_backward(a, x, dout, kept), None


def _applied(a: Tensor, x: Tensor, iterations: int, *, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """(pinv(a) x, what its gradient needs: z, y and t3 of each whole step, then z, r, square and last)."""
    z, kept = start(a), []
    for _ in range(iterations - 2):
        y, _, _, t3 = _polynomials(a, z)
        kept += (z, y, t3) if keep else ()
        z = _times(z, t3, 0.25)
    r = _plus_identity(_times(a, z, -1), 1)
    square = _times(r, r, 1)
    last = _times(square, 3 * r + square, 0.25)
    kept += (z, r, square, last) if keep else ()
    x = _last_step(last, x)[-1]
    return multiply(z, _next_to_last_step(r, square, x)[-1]), kept


def _last_step(last: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(last x, last^2 x, (I + last + last^2 + last^3 / 4) x)."""
    once = multiply(last, x)
    twice = multiply(last, once)
    return once, twice, x + once + twice + multiply(last, twice) / 4


def _next_to_last_step(r: Tensor, square: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(x + r x / 4, (I + r + r^2 + r^3 / 4) x)."""
    once = multiply(r, x)
    quarter = x + once / 4
    return quarter, x + once + multiply(square, quarter)


def start(a: Tensor) -> Tensor:
    """a^T / (largest row sum * largest column sum)."""
    scale = a.sum(-1).amax(-1) * a.sum(-2).amax(-1)
    return a.mT / scale.masked_fill(scale == 0, 1)[..., None, None]


def _step(a: Tensor, z: Tensor, tolerance: float | None) -> Tensor:
    y, _, _, t3 = _polynomials(a, z)
    new = _times(z, t3, 0.25)
    return new if tolerance is None else torch.where(_done(a, y, tolerance), z, new)


def _polynomials(a: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = multiply(a, z)
    t1 = _plus_identity(-y, 7)
    t2 = _plus_identity(_times(y, t1, -1), 15)
    return y, t1, t2, _plus_identity(_times(y, t2, -1), 13)


def _times(x: Tensor, y: Tensor, factor: float) -> Tensor:
    """factor x y; on a GPU without a pass of its own for the factor."""
    if x.is_cpu:
        return multiply(x, y).mul_(factor)
    x3, y3 = x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *y.shape[-2:])
    nothing = x.new_zeros(()).expand_as(x3)
    return torch.baddbmm(nothing, x3, y3, beta=0, alpha=factor).view_as(x)


def _plus_identity(x: Tensor, factor: float) -> Tensor:
    """In place: x is fresh."""
    if standard():  # ONNX has no views to write into
        return x + factor * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
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
    if tolerance is None and iterations >= 2:
        return _applied_backward(a, x, dout, _applied(a, x, iterations, keep=True)[1])
    history = [start(a)]
    for _ in range(iterations):
        history.append(_step(a, history[-1], tolerance))
    dx = history[-1].mT @ dout
    dz = dout @ x.mT
    da = torch.zeros_like(a)
    for z in reversed(history[:-1]):
        y, _, _, t3 = _polynomials(a, z)
        if tolerance is None:
            dz = _step_backward(a, z, y, t3, dz, da)
        else:
            done = _done(a, y, tolerance)
            kept = torch.where(done, dz, 0)
            dz = _step_backward(a, z, y, t3, torch.where(done, 0, dz), da) + kept
    return start_backward(a, dz, da), dx


def _applied_backward(a: Tensor, x: Tensor, dout: Tensor, kept: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(da, dx) of `_applied`.

    a z is symmetric (z is a^T times a polynomial in a a^T), so that r, square and last are too, and commute: a gradient
    counts by its symmetric part D alone, and what a power of r returns is a matrix and its transpose. From r^3 it is
    T + T^T with T = r (r D + D r / 2), from square^2 it is square D + D square.
    """
    z, r, square, last = kept[-4:]
    once, twice, after = _last_step(last, x)
    quarter, read = _next_to_last_step(r, square, after)
    dread = multiply(z.mT, dout)
    dz = multiply(dout, read.mT)
    dquarter = multiply(square, dread)
    donce = dread + dquarter / 4
    dafter = dread + dquarter + multiply(r, donce)
    dthrice = dafter / 4
    dtwice = dafter + multiply(last, dthrice)
    dfirst = dafter + multiply(last, dtwice)
    dx = dafter + multiply(last, dfirst)
    dlast = multiply(torch.cat((dthrice, dtwice, dfirst), -1), torch.cat((twice, once, x), -1).mT)
    dlast = _plus_transpose(dlast).mul_(0.5)
    dsquare = _plus_transpose(multiply(dread, quarter.mT)).mul_(0.5)
    fourth = multiply(square, dlast)
    third = multiply(r, dlast)
    inner = dsquare.add_(_plus_transpose(fourth), alpha=0.25).add_(_plus_transpose(third, 0.5), alpha=0.75)
    outer = multiply(r, inner).add_(multiply(donce, after.mT), alpha=0.5)
    dy = _plus_transpose(outer).neg_()
    da = multiply(dy, z.mT)
    dz = _add_product(dz, a.mT, dy)
    for i in reversed(range(0, len(kept) - 4, 3)):
        step_z, y, t3 = kept[i : i + 3]
        dz = _step_backward(a, step_z, y, t3, dz, da)
    return start_backward(a, dz, da), dx


def _step_backward(a: Tensor, z: Tensor, y: Tensor, t3: Tensor, dnew: Tensor, da: Tensor) -> Tensor:
    """dz of a step; adds to da. t3 = 13 I - 15 y + 7 y^2 - y^3, y symmetric: see `_applied_backward`."""
    half = _times(z.mT, dnew, 0.125)
    square = multiply(y, _plus_transpose(half))
    cube = multiply(y, _plus_transpose(square, 0.5))
    half.mul_(-15).add_(square, alpha=7).sub_(cube)
    dy = _plus_transpose(half)
    _add_product(da, dy, z.mT)
    return _add_product(_times(dnew, t3.mT, 0.25), a.mT, dy)


def start_backward(a: Tensor, dz: Tensor, da: Tensor) -> Tensor:
    """da with what comes back through the start value, z = a^T / scale."""
    columns = a.sum(-2)
    largest, index = columns.max(-1, keepdim=True)
    scale = (a.sum(-1).amax(-1, keepdim=True) * largest).unsqueeze(-1)
    scale = scale.masked_fill(scale == 0, 1)
    dscale = -(dz * a.mT).sum((-1, -2), keepdim=True) / scale.square()
    chosen = torch.zeros_like(columns).scatter_(-1, index, 1).unsqueeze(-2)
    return da + dz.mT / scale + dscale * a.sum(-1).amax(-1)[..., None, None] * chosen


def _plus_transpose(x: Tensor, factor: float = 1.0) -> Tensor:
    """x + factor x^T."""
    return x.add(x.mT, alpha=factor)


def _add_product(out: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """out += x y."""
    if x.is_cpu:
        return out.add_(multiply(x, y))
    flat = [m.reshape(-1, *m.shape[-2:]) for m in (x, y)]
    out.view(-1, *out.shape[-2:]).baddbmm_(*flat)
    return out
