"""Nystrom attention: softmax attention through landmarks, in time linear in the tokens.

With landmarks Q~, K~ (L means of queries and keys): F = softmax(Q K~^T / sqrt(D)), A = softmax(Q~ K~^T / sqrt(D)),
G = softmax(Q~ K^T / sqrt(D)) and out = F pinv(A) (G V) + depthwise convolution of V.

Source: Xiong et al. 2021, eq. (13) to (15). Differs: see `nystrom_attention`.
Shapes: B batch, H heads, N queries, S keys, L landmarks, P prefix tokens, D and Dv widths of a head.

reference      the definition, in plain PyTorch       landmarks   the means
inverse        pinv(A), and its gradient              plans       which tiles and walks a chip gets
composed       PyTorch: two attentions around it      attend      those attentions on a CPU
fused          Triton launches, forward               backward    and backward
forward_kernels, backward_kernels                     their kernels
products       the inverse of a head in one program   inverse_kernels   its kernel
ops            the Triton form as `torch.library` operators
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn, cast

import torch
from torch import Tensor

from medformer_kernels._arguments import order_hint
from medformer_kernels._dispatch import resolve_backend
from medformer_kernels._operators import first_order
from medformer_kernels._tracing import least, standard
from medformer_kernels.nystrom.composed import composed, landmarks
from medformer_kernels.nystrom.inverse import nystrom_pinv
from medformer_kernels.nystrom.landmarks import Cells, landmark_weights
from medformer_kernels.nystrom.ops import nystrom_forward
from medformer_kernels.nystrom.reference import masked_softmax, nystrom_matrices, reference

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = [
    "Cells",
    "landmark_weights",
    "nystrom_attention",
    "nystrom_attention_reference",
    "nystrom_matrices",
    "nystrom_pinv",
    "nystrom_residual",
]


def nystrom_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S Dv"],
    *,
    num_landmarks: int | None = None,
    grid: Sequence[int] | None = None,
    landmark_grid: Sequence[int] | None = None,
    q_landmarks: Float[Tensor, "B H L D"] | None = None,
    k_landmarks: Float[Tensor, "B H L D"] | None = None,
    prefix_tokens: int = 0,
    pinv_iterations: int = 6,
    pinv_tolerance: float | None = None,
    conv_weight: Float[Tensor, "H K"] | Float[Tensor, "H kz ky kx"] | None = None,
    key_padding_mask: Bool[Tensor, "B S"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "B H N Dv"]:
    """Attention through landmarks; nothing of size N x L reaches memory, forward or backward.

    Args:
        q: queries.
        k: keys; as many as queries unless landmarks are given.
        v: values.
        num_landmarks: L equal segments of the sequence, whatever its length. A sample of n < L real tokens has n
            landmarks, its tokens, and then the result is exact attention as far as pinv converges.
        grid: (gz, gy, gx), or (gy, gx), tokens of a volume, x fastest; with `landmark_grid` the landmarks are means
            of its blocks. Without `num_landmarks` or `landmark_grid` it only shapes the convolution.
        landmark_grid: blocks by axis; an axis of fewer tokens has as many blocks as tokens.
        q_landmarks: landmarks of your own in place of means, with `k_landmarks`.
        k_landmarks: see `q_landmarks`.
        prefix_tokens: class and register tokens at the front, outside of `grid`: never averaged, each one more
            landmark; their own output is exact attention. The convolution does not see them.
        pinv_iterations: steps of the pseudo-inverse. Six is published and leaves a residual of about 5 to 10 % for
            q, k ~ N(0, 1) (`nystrom_residual` measures it); twelve leave 0.1 %.
        pinv_tolerance: relative residual at which a head stops early.
        conv_weight: (H, K) along the sequence, or (H, kz, ky, kx) over `grid`; odd sizes. Added to the output.
        key_padding_mask: True = a real token. The others leave landmarks, softmaxes and convolution; what they
            hold, nan or inf too, is never read by the others. Without any, a sample gives 0.
        backend: 'auto', 'triton' or 'torch'.

    Differs from published code: the start value of the iteration belongs to each sample and head, not to the batch;
    padding shifts no landmark; a padded query counts as 0 (its output means nothing); the product is taken from the
    right (F A^-1 first costs 2 N L^2 more operations).
    """
    given = (num_landmarks, grid, landmark_grid, q_landmarks, k_landmarks, prefix_tokens)
    others = (pinv_iterations, pinv_tolerance, conv_weight, key_padding_mask)
    q, k, v, cells, q_landmarks, k_landmarks, conv_weight, mask, iterations, tolerance = _prepare(
        "nystrom_attention", q, k, v, *given, *others
    )
    width = max(q.shape[3], v.shape[3])
    # Tiles of wider heads do not fit in the registers of the backward pass.
    backend = (
        "torch"
        if standard()
        else resolve_backend(
            "nystrom_attention", backend, q, f"heads wider than 128 (here {width})" if width > 128 else None
        )
    )
    with torch.autocast(q.device.type, enabled=False):
        if backend == "torch":
            q, k, v, q_landmarks, k_landmarks, conv_weight = first_order(
                "nystrom_attention", "nystrom_attention_reference", q, k, v, q_landmarks, k_landmarks, conv_weight
            )
            return composed(q, k, v, cells, q_landmarks, k_landmarks, conv_weight, mask, iterations, tolerance)
        grids = (cells.grid, cells.landmark_grid, cells.conv_grid or cells.grid, cells.prefix)
        return nystrom_forward(q, k, v, q_landmarks, k_landmarks, conv_weight, mask, *grids, iterations, tolerance)[0]


def nystrom_attention_reference(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S Dv"],
    *,
    num_landmarks: int | None = None,
    grid: Sequence[int] | None = None,
    landmark_grid: Sequence[int] | None = None,
    q_landmarks: Float[Tensor, "B H L D"] | None = None,
    k_landmarks: Float[Tensor, "B H L D"] | None = None,
    prefix_tokens: int = 0,
    pinv_iterations: int | None = 6,
    pinv_tolerance: float | None = None,
    conv_weight: Float[Tensor, "H K"] | Float[Tensor, "H kz ky kx"] | None = None,
    key_padding_mask: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B H N Dv"]:
    """The definition of `nystrom_attention`, every matrix written out; `pinv_iterations=None`: exact `pinv`."""
    given = (num_landmarks, grid, landmark_grid, q_landmarks, k_landmarks, prefix_tokens)
    others = (0 if pinv_iterations is None else pinv_iterations, pinv_tolerance, conv_weight, key_padding_mask)
    arguments = _prepare("nystrom_attention_reference", q, k, v, *given, *others)
    return reference(*arguments[:-2], pinv_iterations, pinv_tolerance)


def nystrom_residual(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H S D"],
    *,
    num_landmarks: int | None = None,
    grid: Sequence[int] | None = None,
    landmark_grid: Sequence[int] | None = None,
    q_landmarks: Float[Tensor, "B H L D"] | None = None,
    k_landmarks: Float[Tensor, "B H L D"] | None = None,
    prefix_tokens: int = 0,
    pinv_iterations: int = 6,
    pinv_tolerance: float | None = None,
    key_padding_mask: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B H"]:
    """|A Z A - A| / |A|: what the iteration of `nystrom_attention` leaves of the pseudo-inverse, by sample and head."""
    given = (num_landmarks, grid, landmark_grid, q_landmarks, k_landmarks, prefix_tokens)
    others = (pinv_iterations, pinv_tolerance, None, key_padding_mask)
    arguments = _prepare("nystrom_residual", q, k, k, *given, *others)
    q, k, _, cells, q_landmarks, k_landmarks, _, _, _, _ = arguments
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        q_landmarks, k_landmarks, valid = landmarks(q, k, cells, q_landmarks, k_landmarks, key_padding_mask)
        exact = torch.promote_types(q.dtype, torch.float32)
        scores = (q_landmarks.to(exact) * q.shape[-1] ** -0.5) @ k_landmarks.to(exact).mT
        valid = None if valid is None else valid[:, None, None]
        a = masked_softmax(scores, None if valid is None else valid & valid.mT)
        return nystrom_pinv(a, iterations=pinv_iterations, tolerance=pinv_tolerance)[1]


def _prepare(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_landmarks: int | None,
    grid: Sequence[int] | None,
    landmark_grid: Sequence[int] | None,
    q_landmarks: Tensor | None,
    k_landmarks: Tensor | None,
    prefix_tokens: int,
    pinv_iterations: int,
    pinv_tolerance: float | None,
    conv_weight: Tensor | None,
    key_padding_mask: Tensor | None,
) -> tuple[
    Tensor, Tensor, Tensor, Cells, Tensor | None, Tensor | None, Tensor | None, Tensor | None, int, float | None
]:
    """Every check, autocast, and the arguments as the implementations take them."""

    def fail(message: str) -> NoReturn:
        raise ValueError(f"{function}: {message}")

    for name, x in (("q", q), ("k", k), ("v", v), ("q_landmarks", q_landmarks), ("k_landmarks", k_landmarks)):
        if x is None:
            continue
        if x.ndim != 4:
            fail(f"{name} has shape {tuple(x.shape)}; it must be (B, H, tokens, width)")
        if not x.is_floating_point():
            fail(f"{name} is {x.dtype}; it must be a floating-point tensor")
        if x.dtype != q.dtype or x.device != q.device:
            fail(f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}; they must agree")
        if x.shape[2] == 0:
            fail(f"{name} has no token; it must have at least 1")
        if x.shape[3] == 0:
            fail(f"{name} has shape {tuple(x.shape)}; its width must be at least 1")
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        fail(f"k has shape {tuple(k.shape)}; with q {tuple(q.shape)} it must be (B, H, S, D) of the same B, H and D")
    if v.shape[:3] != k.shape[:3]:
        fail(f"v has shape {tuple(v.shape)}; with k {tuple(k.shape)} it must be (B, H, S, Dv) of the same B, H and S")
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool:
            fail(f"key_padding_mask is {key_padding_mask.dtype}; it must be bool, True = a real key")
        shape = (k.shape[0], k.shape[2])
        if key_padding_mask.shape != shape:
            hint = order_hint(k, key_padding_mask.shape[-1])
            fail(f"key_padding_mask has shape {tuple(key_padding_mask.shape)}; it must be (B, S) = {shape}{hint}")
        if key_padding_mask.device != q.device:
            fail(f"key_padding_mask is on {key_padding_mask.device} but q is on {q.device}; move it there")
    if pinv_iterations < 0:
        fail(f"pinv_iterations={pinv_iterations} must be at least 0")
    if pinv_tolerance is not None and not pinv_tolerance >= 0:
        fail(f"pinv_tolerance={pinv_tolerance} must be at least 0, or None")
    heads, tokens = q.shape[1], q.shape[2]
    inner = tokens - prefix_tokens
    if prefix_tokens < 0 or inner < 1:
        fail(f"prefix_tokens={prefix_tokens} must be at least 0 and leave at least 1 of the {tokens} tokens")

    shape = (1, 1, inner)
    if grid is not None:
        shape = (*(1,) * (3 - len(grid)), *(torch.sym_int(g) for g in grid))
        if len(shape) != 3 or any(g < 1 for g in shape) or shape[0] * shape[1] * shape[2] != inner:
            hint = order_hint(q, math.prod(shape) + prefix_tokens)
            fail(
                f"grid={tuple(grid)} must be (gz, gy, gx) or (gy, gx) of {inner} tokens (those after the prefix){hint}"
            )
    given = q_landmarks is not None or k_landmarks is not None
    if (num_landmarks is not None) + (landmark_grid is not None) + given != 1:
        fail("give exactly one of num_landmarks, landmark_grid (with grid), or q_landmarks and k_landmarks")
    blocks = (1, 1, 1)
    if given:
        if q_landmarks is None or k_landmarks is None or q_landmarks.shape != k_landmarks.shape:
            fail("q_landmarks and k_landmarks must be given together, of one shape (B, H, L, D)")
        if (*q_landmarks.shape[:2], q_landmarks.shape[3]) != (*q.shape[:2], q.shape[3]):
            fail(f"q_landmarks has shape {tuple(q_landmarks.shape)}; with q {tuple(q.shape)} it must be (B, H, L, D)")
    elif num_landmarks is not None:
        if num_landmarks < 1 or num_landmarks != int(num_landmarks):
            fail(f"num_landmarks={num_landmarks} must be at least 1, and whole")
        if grid is not None and conv_weight is None:
            fail("grid is of no use with num_landmarks and no conv_weight; give landmark_grid for means over blocks")
        blocks = (1, 1, least(num_landmarks, inner))
    elif landmark_grid is not None:
        blocks = (*(1,) * (3 - len(landmark_grid)), *(int(b) for b in landmark_grid))
        if grid is None:
            fail("landmark_grid needs grid, the tokens by axis")
        if len(landmark_grid) != len(grid) or min(blocks) < 1:
            fail(f"landmark_grid={tuple(landmark_grid)} must hold at least 1 block on each axis of grid={tuple(grid)}")
        blocks = tuple(least(blocks[axis], shape[axis]) for axis in range(3))
    if k.shape[2] != tokens and (not given or conv_weight is not None):
        fail(f"k has {k.shape[2]} tokens and q has {tokens}; they may differ only with landmarks given, no conv_weight")
    along = conv_weight is not None and conv_weight.ndim == 2
    cells = Cells(
        grid=(1, 1, inner) if num_landmarks is not None else shape,
        landmark_grid=cast(tuple[int, int, int], blocks),
        prefix=prefix_tokens,
        conv_grid=(1, 1, inner) if along else shape,
    )
    if conv_weight is not None:
        if conv_weight.ndim not in (2, 4) or conv_weight.shape[0] != heads:
            fail(f"conv_weight has shape {tuple(conv_weight.shape)}; it must be ({heads}, K) or ({heads}, kz, ky, kx)")
        if conv_weight.ndim == 4 and grid is None:
            fail("conv_weight over a volume needs grid, the tokens by axis")
        if any(size % 2 == 0 for size in conv_weight.shape[1:]):
            fail(f"conv_weight has shape {tuple(conv_weight.shape)}; its sizes must be odd, so that it has a centre")
        if not conv_weight.is_floating_point():
            fail(f"conv_weight is {conv_weight.dtype}; it must be a floating-point tensor")
        if conv_weight.device != q.device:
            fail(f"conv_weight is on {conv_weight.device} but q is on {q.device}; move it there")
        conv_weight = conv_weight[:, None, None] if along else conv_weight
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        q_landmarks = None if q_landmarks is None else q_landmarks.to(dtype)
        k_landmarks = None if k_landmarks is None else k_landmarks.to(dtype)
    return q, k, v, cells, q_landmarks, k_landmarks, conv_weight, key_padding_mask, pinv_iterations, pinv_tolerance
