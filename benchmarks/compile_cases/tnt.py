"""The inner block of a TNT: what is compiled and counted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ahead_of_time import TARGETS
from compile_cases.shapes import Case, Cost, Family, Floor
from medformer_kernels._dispatch import Chip
from medformer_kernels.tnt import TNTInnerWeights, fused, outer
from medformer_kernels.tnt.plans import KERNELS, OUTER_KERNELS, TilePlan, fits, launch_plan

__all__ = ["FAMILY", "OUTER_SHAPES", "SHAPES", "costs", "launches", "outer_launches"]

# (tile width, tile head, rows of a tile) of every entry in configs/tnt.json: (tokens, width, heads) that take it.
SHAPES = {
    2: {
        (64, 16, 64): [(64, 48, 4), (16, 40, 4), (64, 64, 4)],
        (32, 16, 64): [(16, 24, 4), (64, 32, 2)],
        (16, 16, 64): [(8, 12, 2)],
        (64, 32, 64): [(64, 64, 2), (64, 48, 2)],
        (64, 64, 64): [(64, 64, 1)],
        (32, 32, 64): [(64, 32, 1)],
        (32, 16, 128): [(100, 24, 4), (128, 32, 2)],
        (128, 32, 64): [(64, 128, 4), (64, 96, 4)],
    },
    4: {
        (32, 16, 32): [(16, 24, 4), (32, 32, 2)],
        (64, 16, 32): [(16, 40, 4), (27, 48, 4), (32, 64, 4)],
        (16, 16, 32): [(8, 12, 2)],
    },
}
# By tile width: (tokens, width, channels of the outer token).
OUTER_SHAPES = {16: [(8, 12, 48)], 32: [(16, 24, 384)], 64: [(16, 40, 640), (64, 48, 192)], 128: [(8, 128, 256)]}
SEQUENCES = 32_768
WIDTHS = (16, 32, 64, 128)


def launches(tokens: int, width: int, heads: int, dtype: torch.dtype, full: bool) -> dict[str, Callable[[], Any]]:
    """By kernel: a forward and a backward pass; `full` with dropping, biases of qkv and a strided x."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    hidden = 4 * width
    w = TNTInnerWeights(
        norm1_weight=empty(width), norm1_bias=empty(width), qkv_weight=empty(3 * width, width),
        qkv_bias=empty(3 * width) if full else None, proj_weight=empty(width, width), proj_bias=empty(width),
        norm2_weight=empty(width), norm2_bias=empty(width), fc1_weight=empty(hidden, width), fc1_bias=empty(hidden),
        fc2_weight=empty(width, hidden), fc2_bias=empty(width),
    )  # fmt: skip
    dense = empty(SEQUENCES, tokens, width)
    x = empty(tokens, SEQUENCES, width).transpose(0, 1) if full else dense
    seed = torch.empty((), dtype=torch.int64, device="meta") if full else None
    drop = (0.1, 0.1) if full else (0.0, 0.0)

    def forward() -> None:
        fused.forward(x, w, seed, heads, 1e-6, *drop, dense)

    def backward() -> None:
        fused.backward(x, x, dense, w, seed, heads, 1e-6, *drop, True)

    return {kernel: forward if kernel == "fwd" else backward for kernel in KERNELS}


def outer_launches(
    tokens: int, width: int, channels: int, dtype: torch.dtype, full: bool
) -> dict[str, Callable[[], Any]]:
    """The step from inner to outer tokens; `full` with an outer token to add to and a strided x."""
    x = torch.empty(tokens, SEQUENCES, width, dtype=dtype, device="meta").transpose(0, 1)
    x = x if full else torch.empty(SEQUENCES, tokens, width, dtype=dtype, device="meta")
    w = torch.empty(channels, tokens * width, dtype=dtype, device="meta")
    b = torch.empty(channels, device="meta")
    out = torch.empty(SEQUENCES, channels, dtype=dtype, device="meta")

    def forward() -> None:
        outer.forward(x, out if full else None, w, b, 1e-6)

    def backward() -> None:
        outer.backward(out, x, w, 1e-6)

    return {"outer_fwd": forward, "outer_dx": backward, "outer_dw": backward}


def cases(*, widths: tuple[int, ...] = WIDTHS) -> Iterator[Case]:
    """Every entry of configs/tnt.json, 16-bit and float32, plain and with everything that adds to a kernel."""
    for dtype in (torch.bfloat16, torch.float32):
        yield from _outer_cases(dtype, widths)
        for (tile, _, _), shapes in SHAPES[dtype.itemsize].items():
            for (tokens, width, heads), full in itertools.product(shapes if tile in widths else [], (False, True)):
                by_kernel = launches(tokens, width, heads, dtype, full)
                settings = (tokens, width, width // heads, dtype.itemsize)
                forward = {a for a, t in TARGETS.items() if fits(t.chip, *settings, KERNELS[:1])}
                both = {a for a, t in TARGETS.items() if fits(t.chip, *settings)}
                for archs, kernels in ((both, KERNELS), (forward - both, KERNELS[:1])):
                    if archs:
                        yield Case(
                            name=f"n={tokens} c={width} H={heads} {str(dtype)[6:]} {'dropping' if full else 'plain'}",
                            width=tile,
                            dtype=dtype,
                            launches={kernel: by_kernel[kernel] for kernel in kernels},
                            archs=tuple(archs),
                        )


def _outer_cases(dtype: torch.dtype, widths: tuple[int, ...]) -> Iterator[Case]:
    for tile, shapes in OUTER_SHAPES.items():
        for (tokens, width, channels), full in itertools.product(shapes if tile in widths else [], (False, True)):
            archs = {a for a, t in TARGETS.items() if fits(t.chip, 1, width, 1, dtype.itemsize, OUTER_KERNELS)}
            if archs:
                yield Case(
                    name=f"n={tokens} c={width} E={channels} {str(dtype)[6:]} {'strided' if full else 'plain'}",
                    width=tile,
                    dtype=dtype,
                    launches=outer_launches(tokens, width, channels, dtype, full),
                    archs=tuple(archs),
                )


def costs(
    *, chip: Chip, sequences: int, tokens: int, width: int, hidden: int, num_heads: int, itemsize: int
) -> dict[str, Cost]:
    """Cost by kernel of a forward and a backward pass, from the launch plans themselves."""
    rows = sequences * tokens
    tensor = rows * width * itemsize

    def plan(kernel: str) -> TilePlan:
        parts = {"attn_dw": num_heads, "mlp_dw": hidden}.get(kernel, 1)
        return launch_plan(
            kernel, chip=chip, sequences=sequences, tokens=tokens, width=width, head=width // num_heads, parts=parts,
            itemsize=itemsize,
        )  # fmt: skip

    linear, mlp, scores = 2 * rows * width * width, 2 * rows * width * hidden, 2 * rows * tokens * width
    exponentials = rows * tokens * num_heads
    fwd, attn_dx, attn_dw, mlp_dw = (plan(kernel) for kernel in ("fwd", "attn_dx", "attn_dw", "mlp_dw"))
    mlp_passes, attn_passes = -(-hidden // mlp_dw.block_f), num_heads * len(fused.halves(attn_dw))
    mlp_partial, attn_partial = 2 * 4 * (2 * hidden * width) * mlp_dw.slices, 2 * 4 * (4 * width**2) * attn_dw.slices
    return {
        "fwd": Cost(
            flop=4 * linear + 2 * mlp + 2 * scores, exponentials=exponentials, bytes=(4 if fwd.split else 3) * tensor
        ),
        "mlp_dx": Cost(flop=3 * mlp, bytes=3 * tensor),
        "mlp_dw": Cost(flop=4 * mlp, bytes=2 * mlp_passes * tensor + mlp_partial),
        # Two launches compute queries, keys, the gradient of o and scores twice.
        "attn_dx": Cost(
            flop=(10 * linear + 6 * scores) if attn_dx.split else (7 * linear + 5 * scores),
            exponentials=len(fused.halves(attn_dx)) * exponentials,
            bytes=(7 if attn_dx.split else 3) * tensor,
        ),
        "attn_dw": Cost(
            flop=(12 * linear + 7 * scores) if attn_dw.split else (8 * linear + 6 * scores),
            exponentials=len(fused.halves(attn_dw)) * exponentials,
            bytes=2 * attn_passes * tensor + attn_partial,
        ),
    }


def floors() -> Iterator[Floor]:
    """32,768 sequences of 64 tokens of width 48, MLP of 192, 4 heads, bf16, on an H200."""
    sequences, tokens, width, heads = SEQUENCES, 64, 48, 4
    by_kernel = costs(
        chip=TARGETS["sm_90"].chip, sequences=sequences, tokens=tokens, width=width, hidden=4 * width,
        num_heads=heads, itemsize=2,
    )  # fmt: skip
    tensor = sequences * tokens * width * 2
    passes = {
        "forward": (("fwd",), 2),  # x, out
        "backward": (("mlp_dx", "mlp_dw", "attn_dx", "attn_dw"), 4),  # x, middle, dout, dx
    }
    for direction, (kernels, tensors) in passes.items():
        yield Floor.of(
            "tnt_inner_block 32,768 x 64 x 48 bf16",
            direction,
            (by_kernel[kernel] for kernel in kernels),
            tensors * tensor,
        )


FAMILY = Family(cases=cases, floors=floors, widths=WIDTHS)
