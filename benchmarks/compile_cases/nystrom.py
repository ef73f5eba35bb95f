"""Nystrom attention: what is compiled and counted."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ahead_of_time import TARGETS
from compile_cases.shapes import WIDTHS, Case, Family, Floor
from medformer_kernels._dispatch import chip_of, tile
from medformer_kernels.nystrom import Cells, fused, products
from medformer_kernels.nystrom.backward import backward as fused_backward
from medformer_kernels.nystrom.plans import costs, has_walk, one_program

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
        yield Floor(
            shape="nystrom B1 H8 N=262,144 D64 L256 bf16",
            direction=direction,
            flop=sum(by_kernel[kernel].flop for kernel in kernels),
            exponentials=sum(by_kernel[kernel].exponentials for kernel in kernels),
            planned_bytes=sum(by_kernel[kernel].bytes for kernel in kernels),
            least_bytes=tensors * heads * tokens * width * 2,
        )


FAMILY = Family(cases=cases, floors=floors)
