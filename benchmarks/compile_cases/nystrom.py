"""Nystrom attention: what is compiled and counted."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ahead_of_time import TARGETS
from compile_cases.shapes import WIDTHS, Case, Family, Floor
from medformer_kernels._dispatch import chip_of
from medformer_kernels.nystrom import Cells, fused

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

        def backward() -> None:
            made = torch.empty(1, 8, landmarks, width, dtype=dtype, device="meta")
            values, lse = made.float(), made[..., 0].float()
            fused.backward(
                x, x, x, x, cells, True, weight, mask,
                fused.Forward(
                    out=x, q_landmarks=made, k_landmarks=made, total=lse, values=values, lse=lse, solved=values,
                    valid=torch.empty((1, landmarks) if full else 0, dtype=torch.uint8, device="meta"),
                    out_lse=x[..., 0].float(),
                ), 6, None,
            )  # fmt: skip

        def core() -> None:
            small = x[:, :, : fused.core_landmarks(chip_of(x))]
            one = Cells(grid=(1, 1, small.shape[2]), landmark_grid=(1, 1, small.shape[2]))
            fused.forward(small, small, small, one, None, None, None, None, 6, None)

        return Case(
            name=f"D={width} M={landmarks} {str(dtype)[6:]} {'volume mask conv' if full else 'plain'}",
            width=width,
            dtype=dtype,
            launches={
                "values_fwd": forward, "read_fwd": forward, "landmark_bwd": backward, "token_bwd": backward,
                "core": core if dtype == torch.float32 else forward,
            },
        )  # fmt: skip

    for width in (width for width in widths if width <= 128):  # the kernels refuse wider heads
        for dtype in (torch.bfloat16, torch.float32):
            for full in (False, True):
                yield case(width, dtype, full)


def floors() -> Iterator[Floor]:
    """B=1 H=8 N=262,144 (64^3 tokens) D=64, 256 landmarks, bf16, no convolution, on an H200."""
    tokens, heads, width, landmarks = 262_144, 8, 64, 256
    by_kernel = fused.costs(
        chip=TARGETS["sm_90"].chip, batch_heads=heads, tokens=tokens, landmarks=landmarks, width=width, itemsize=2
    )
    passes = {
        "forward": (("pool", "values_fwd", "core", "read_fwd"), 4),  # q k v, out
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
