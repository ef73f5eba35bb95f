"""Patch embedding as `torch.library` operators with gradients.

`patch_embed` and its transpose `patch_unembed` are each other's backward pass, the weight gradient being the third
and last product. Volumes have three axes here; `position` is one table of all tokens, or one an axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medformer_kernels._dispatch import chip_of, resolve_backend
from medformer_kernels._operators import operator
from medformer_kernels.patch_embed import paths
from medformer_kernels.patch_embed.choice import choose
from medformer_kernels.patch_embed.geometry import Geometry

__all__ = ["patch_embed", "patch_embed_backward", "patch_unembed"]


def _implementation(path: str):
    if path != "fused":
        return paths
    from medformer_kernels.patch_embed import fused  # Triton decides at import whether it interprets

    return fused


def device_name(x: Tensor) -> str:
    """What the measurements call the device of `x`: 'cpu', 'sm_90', ..."""
    return chip_of(x).arch if x.is_cuda else x.device.type


def resolved(path: str, weight: Tensor, geometry: Geometry) -> str:
    """'measured' to the path that the measurements choose: here, where sizes are numbers even in a compiled graph."""
    if path != "measured":
        return path
    width, channels = weight.shape[:2]
    backend = resolve_backend("patch_embed", "auto", weight)
    model = {"channels": channels, "width": width, "dtype": weight.dtype, "device": device_name(weight)}
    return choose(geometry, **model, raw=False, backend="auto" if backend == "triton" else "torch").path


def _geometry(
    size: Sequence[int], weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Geometry:
    """Without checks, so that sizes may be symbols."""
    kernel = tuple(weight.shape[2:])
    pairs = tuple(zip(padding[::2], padding[1::2], strict=True))
    grid = tuple(
        (n + before + after - d * (k - 1) - 1) // s + 1
        for n, k, s, d, (before, after) in zip(size, kernel, stride, dilation, pairs, strict=True)
    )
    return Geometry(
        size=tuple(size), kernel=kernel, stride=tuple(stride), padding=pairs, dilation=tuple(dilation), grid=grid
    )


def _embed_fake(
    x, weight, bias, norm_weight, norm_bias, position, position_y, position_x, prefix, coefficients, stride, padding,
    dilation, mode, norm, eps, save, path,
):  # fmt: skip
    geometry = _geometry(x.shape[2:], weight, stride, padding, dilation)
    tokens = geometry.tokens
    offset = 0 if prefix is None else prefix.shape[0]
    return (
        weight.new_empty((x.shape[0], offset + tokens, weight.shape[0])),
        weight.new_empty((x.shape[0], tokens, weight.shape[0]) if save else (0,)),
    )


@operator("patch_embed", _embed_fake, public="patch_embed", samples=("x",))
def patch_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    position: Tensor | None,
    position_y: Tensor | None,
    position_x: Tensor | None,
    prefix: Tensor | None,
    coefficients: Sequence[float],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mode: str,
    norm: str,
    eps: float,
    save: bool,
    path: str,
) -> tuple[Tensor, Tensor]:
    """(tokens (B, prefix + N, E), y (B, N, E) before the norm if `save`, else empty), in the dtype of `weight`."""
    geometry = _geometry(x.shape[2:], weight, stride, padding, dilation)
    path = resolved(path, weight, geometry)
    tables, how = (position, position_y, position_x), (geometry, mode, norm, eps, save, path)
    forward = _implementation(path).forward
    return forward(x, weight, bias, norm_weight, norm_bias, tables, prefix, coefficients, *how)


def _embed_backward_fake(
    dtokens, x, weight, y, norm_weight, coefficients, stride, padding, dilation, mode, norm, eps, needs, path
):
    width = weight.shape[0]
    return (
        x.new_empty(x.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        *(weight.new_empty(width if need else 0) for need in needs[2:]),
    )


@operator(
    "patch_embed_backward",
    _embed_backward_fake,
    public="patch_embed or patch_unembed",
    gradient=True,
    definition="patch_embed_reference or patch_unembed_reference",
    samples=("dtokens", "x", "y"),
    per_sample=lambda call: any(call["needs"][1:]),
)
def patch_embed_backward(
    dtokens: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    norm_weight: Tensor | None,
    coefficients: Sequence[float],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mode: str,
    norm: str,
    eps: float,
    needs: Sequence[bool],
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dnorm_weight, dnorm_bias), empty where `needs` is False; `y` as saved (empty if no norm).

    dy comes from dtokens by the norm's own backward pass; dweight_ck = sum_n dy_n x_{c, n s - p + k d} and
    dx_{c, v} = sum of weight_ck dy_n over the taps and tokens that see v.
    """
    geometry = _geometry(x.shape[2:], weight, stride, padding, dilation)
    path = resolved(path, weight, geometry)
    return _implementation(path).backward(
        dtokens, x, weight, y, norm_weight, coefficients, geometry, mode, norm, eps, needs, path
    )


def _setup(ctx, inputs, output):
    (
        x, weight, _, norm_weight, norm_bias, position, position_y, position_x, prefix, ctx.coefficients, ctx.stride,
        ctx.padding, ctx.dilation, ctx.mode, ctx.norm, ctx.eps, _, ctx.path,
    ) = inputs  # fmt: skip
    _, y = output
    ctx.mark_non_differentiable(y)
    ctx.save_for_backward(x, weight, y, norm_weight)
    ctx.present = [t is not None for t in (norm_weight, norm_bias)]
    ctx.tables = [t is not None for t in (position, position_y, position_x)]
    ctx.table_dtype = None if position is None else position.dtype
    ctx.prefix = None if prefix is None else (prefix.shape[0], prefix.dtype)
    ctx.norm_dtypes = [None if t is None else t.dtype for t in (norm_weight, norm_bias)]


def _autograd(ctx, dtokens, _):
    x, weight, y, norm_weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    gradients: list[Tensor | None] = [None] * 5
    if any(needs):
        geometry = (ctx.stride, ctx.padding, ctx.dilation)
        results = patch_embed_backward(
            dtokens,
            x,
            weight,
            y,
            norm_weight,
            ctx.coefficients,
            *geometry,
            ctx.mode,
            ctx.norm,
            ctx.eps,
            needs,
            ctx.path,
        )
        gradients = [g if need else None for g, need in zip(results, needs, strict=True)]
        for i, dtype in enumerate(ctx.norm_dtypes, start=3):
            gradient = gradients[i]
            gradients[i] = None if gradient is None else gradient.to(dtype)
    offset = 0 if ctx.prefix is None else ctx.prefix[0]
    tables: list[Tensor | None] = [None] * 3
    if any(ctx.needs_input_grad[5:8]):
        exact = torch.promote_types(dtokens.dtype, torch.float32)
        total = dtokens[:, offset:].sum(0, dtype=exact)
        if ctx.tables[1]:
            total = total.unflatten(0, _geometry(x.shape[2:], weight, ctx.stride, ctx.padding, ctx.dilation).grid)
            tables = [total.sum(tuple(a for a in range(3) if a != axis)).to(ctx.table_dtype) for axis in range(3)]
        else:
            tables[0] = total.to(ctx.table_dtype)
    dprefix = None
    if ctx.prefix is not None and ctx.needs_input_grad[8]:
        dprefix = dtokens[:, :offset].sum(0, dtype=torch.promote_types(dtokens.dtype, torch.float32))
        dprefix = dprefix.to(ctx.prefix[1])
    return (*gradients, *tables, dprefix, *[None] * 9)


patch_embed.register_autograd(_autograd, setup_context=_setup)


def _unembed_fake(tokens, weight, bias, size, stride, padding, dilation, path):
    return tokens.new_empty((tokens.shape[0], weight.shape[1], *size))


@operator("patch_unembed", _unembed_fake, public="patch_unembed", samples=("tokens",))
def patch_unembed(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    path: str,
) -> Tensor:
    """Voxels (B, C, *size) of tokens (B, N, E): the transpose of the patch embedding of `weight`, plus `bias` (C,)."""
    geometry = _geometry(size, weight, stride, padding, dilation)
    path = resolved(path, weight, geometry)
    return _implementation(path).unembed(tokens, weight, bias, geometry, path)


def _setup_unembed(ctx, inputs, output):
    tokens, weight, _, _, ctx.stride, ctx.padding, ctx.dilation, ctx.path = inputs
    ctx.save_for_backward(tokens, weight)


def _unembed_autograd(ctx, dout):
    tokens, weight = ctx.saved_tensors
    dtokens = dweight = dbias = None
    common = ctx.stride, ctx.padding, ctx.dilation, "zeros", "", 0.0
    if ctx.needs_input_grad[0]:
        dtokens = patch_embed(dout, weight, *[None] * 7, [], *common, False, ctx.path)[0]
    if ctx.needs_input_grad[1]:
        empty = weight.new_empty(0)
        needs = [False, True, False, False, False]
        dweight = patch_embed_backward(tokens, dout, weight, empty, None, [], *common, needs, ctx.path)[1]
    if ctx.needs_input_grad[2]:
        dbias = dout.sum((0, 2, 3, 4), dtype=torch.promote_types(dout.dtype, torch.float32)).to(dout.dtype)
    return dtokens, dweight, dbias, None, None, None, None, None


patch_unembed.register_autograd(_unembed_autograd, setup_context=_setup_unembed)
