"""Nystrom attention: what is compiled and counted."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ahead_of_time import TARGETS
from compile_cases.shapes import WIDTHS, Case, Cost, Family, Floor
from medformer_kernels._dispatch import AttentionPlan, Chip, chip_of, tile
from medformer_kernels.nystrom import Cells, fused, products
from medformer_kernels.nystrom.backward import backward as fused_backward
from medformer_kernels.nystrom.plans import has_walk, key_walk, launch_plan, one_program

__all__ = ["FAMILY"]


def cases(*, widths: tuple[int, ...] = WIDTHS, landmarks: int = 256) -> Iterator[Case]:
    """B=1 H=8 N=64^3: a plain sequence, and a masked volume with its convolution, where every epilogue is on."""

    def case(width: int, dtype: torch.dtype, full: bool) -> Case:
        x = torch.empty(1, 8, 64**3, width, dtype=dtype, device="meta")
        mask = torch.empty(1, 64**3, dtype=torch.bool, device="meta") if full else None
        weight = torch.empty(8, 3, 3, 3, device="meta") if full else None
        cells = Cells(grid=(1, 1, 64**3), landmark_grid=(1, 1, landmarks))
        if full:
            cells = Cells(grid=(64, 64, 64), landmark_grid=(4, 8, landmarks // 32))

        def forward() -> fused.Forward:
            return fused.forward(x, x, x, cells, None, None, weight, mask, 6, None)

        def given() -> None:
            landmark = torch.empty(1, 8, landmarks, width, dtype=dtype, device="meta")
            fused.forward(x, x, x, cells, landmark, landmark, weight, mask, 6, None)

        def pooled() -> None:
            if not has_walk(chip_of(x), width, dtype.itemsize):
                given()
                return
            # As many landmarks as the tile takes, and many heads: then keys are read once by every chip.
            number = tile("nystrom", "pool_values_fwd", chip_of(x), width, dtype.itemsize)["block_m"]
            own = Cells(grid=cells.grid, landmark_grid=(4, number // 16, 4) if full else (1, 1, number))
            many = torch.empty(64, *x.shape[1:], dtype=dtype, device="meta")
            many_mask = None if mask is None else mask.expand(64, -1)
            fused.forward(many, many, many, own, None, None, weight, many_mask, 6, None)

        def backward() -> None:
            made = torch.empty(1, 8, landmarks, width, dtype=dtype, device="meta")
            values, lse = made.float(), made[..., 0].float()
            fused_backward(
                x, x, x, x, cells, True, weight, mask,
                fused.Forward(
                    out=x, q_landmarks=made, k_landmarks=made, total=lse, values=values, lse=lse, solved=values,
                    valid=torch.empty((1, landmarks) if full else 0, dtype=torch.uint8, device="meta"),
                    out_lse=x[..., 0].float(),
                ), 6, None,
            )  # fmt: skip

        def inverse() -> None:
            one, chip = torch.empty(1, 1, landmarks, landmarks, device="meta"), chip_of(x)
            if one_program(chip, landmarks, chip.units):
                products.solve(chip, one, one[..., :width], 6)
            else:  # AMD takes batched products
                forward()

        return Case(
            name=f"D={width} M={landmarks} {str(dtype)[6:]} {'volume mask conv' if full else 'plain'}",
            width=width,
            dtype=dtype,
            launches={
                "values_fwd": given, "pool_values_fwd": pooled, "read_fwd": forward,
                "landmark_bwd": backward, "token_bwd": backward, "products": inverse,
            },
        )  # fmt: skip

    for width in (width for width in widths if width <= 128):  # the kernels refuse wider heads
        for dtype in (torch.bfloat16, torch.float32):
            for full in (False, True):
                yield case(width, dtype, full)


def costs(
    *, chip: Chip, batch_heads: int, tokens: int, landmarks: int, width: int, itemsize: int, iterations: int = 6
) -> dict[str, Cost]:
    """Cost by kernel of a forward and a backward pass over N = S = `tokens`, Dv = D, without a convolution."""

    def plan(kernel: str) -> AttentionPlan:
        return launch_plan(
            kernel, chip=chip, landmarks=landmarks, width=width, itemsize=itemsize, tokens=tokens,
            batch_heads=batch_heads,
        )  # fmt: skip

    rows = batch_heads * tokens
    tensor, product = rows * width * itemsize, 2 * rows * landmarks * width
    partial = batch_heads * landmarks * (width + 1) * 4
    values_plan, landmark_plan = plan("values_fwd"), plan("landmark_bwd")
    values_passes, landmark_passes = (-(-landmarks // p.block_m) for p in (values_plan, landmark_plan))
    walk = key_walk(
        Cells(grid=(1, 1, tokens), landmark_grid=(1, 1, landmarks)), ranked=False, chip=chip, landmarks=landmarks,
        width=width, itemsize=itemsize, tokens=tokens, batch_heads=batch_heads,
    )  # fmt: skip
    slices = (walk or values_plan).slices
    values_slices = slices * 2 + 1 if slices > 1 else 1
    exponentials = rows * landmarks
    return {
        "pool": Cost(flop=4 * rows * width, bytes=tensor if walk else 2 * tensor),
        "values_fwd": Cost(
            flop=2 * product, exponentials=exponentials, bytes=values_passes * 2 * tensor + values_slices * partial
        ),
        "inverse": Cost(flop=8 * iterations * batch_heads * landmarks**3, bytes=0),
        "read_fwd": Cost(flop=2 * product, exponentials=exponentials, bytes=2 * tensor + rows * 4),
        "delta": Cost(flop=2 * rows * width, bytes=2 * tensor + rows * 4),
        "landmark_bwd": Cost(
            flop=7 * product,
            exponentials=2 * exponentials,
            bytes=landmark_passes * (4 * tensor + 8 * rows) + 6 * landmark_plan.slices * partial,
        ),
        "token_bwd": Cost(flop=7 * product, exponentials=2 * exponentials, bytes=7 * tensor + 8 * rows),
    }


def floors() -> Iterator[Floor]:
    """B=1 H=8 N=262,144 (64^3 tokens) D=64, 256 landmarks, bf16, no convolution, on an H200.

    Least of the forward pass is q twice: no key is attended before every query has been averaged.
    """
    tokens, heads, width, landmarks = 262_144, 8, 64, 256
    by_kernel = costs(
        chip=TARGETS["sm_90"].chip, batch_heads=heads, tokens=tokens, landmarks=landmarks, width=width, itemsize=2
    )
    passes = {
        "forward": (("pool", "values_fwd", "inverse", "read_fwd"), 5),  # q twice, k v, out
        "backward": (("delta", "landmark_bwd", "token_bwd"), 8),  # q k v out dout, dq dk dv
    }
    for direction, (kernels, tensors) in passes.items():
        yield Floor.of(
            "nystrom B1 H8 N=262,144 D64 L256 bf16",
            direction,
            (by_kernel[kernel] for kernel in kernels),
            tensors * heads * tokens * width * 2,
        )


FAMILY = Family(cases=cases, floors=floors)
