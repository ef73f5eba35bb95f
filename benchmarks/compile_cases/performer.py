"""FAVOR+ attention: what is compiled and counted."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ahead_of_time import TARGETS
from compile_cases.shapes import WIDTHS, Case, Family, Floor
from medformer_kernels.performer import default_num_features, fused

__all__ = ["FAMILY"]


def cases(*, widths: tuple[int, ...] = WIDTHS, tokens: int = 262_144) -> Iterator[Case]:
    """B=1 H=8, key padding mask and epsilon on and off, every configured width, 16-bit and float32."""

    def case(width: int, dtype: torch.dtype, full: bool) -> Case:
        num_features = default_num_features(width)
        x = torch.empty(1, 8, tokens, width, dtype=dtype, device="meta")
        omega = torch.empty(num_features, width, device="meta")
        values = torch.empty(1, 8, num_features, width, device="meta")
        lse = torch.empty(1, 8, num_features, device="meta")
        row = torch.empty(1, 8, tokens, device="meta")
        mask = torch.empty(1, tokens, dtype=torch.bool, device="meta") if full else None
        extra = (values[:, :, 0], lse[:, :, 0]) if full else (None, None)

        def backward() -> None:
            fused.read_backward(x, omega, values, lse, *extra, x, row, x)

        return Case(
            name=f"D={width} M={num_features} {str(dtype)[6:]} {'mask eps' if full else 'plain'}",
            width=width,
            dtype=dtype,
            launches={
                "state_fwd": lambda: fused.state(x, x, omega, mask, full),
                "read_fwd": lambda: fused.read(x, omega, values, lse, *extra),
                "read_dq": backward,
                "read_dstate": backward,
                "state_bwd": lambda: fused.state_backward(x, x, omega, mask, values, lse, values, lse),
            },
        )

    for width in widths:
        for dtype in (torch.bfloat16, torch.float32):
            for full in (False, True):
                yield case(width, dtype, full)


def floors() -> Iterator[Floor]:
    """B=1 H=8 N=262,144 (64^3 tokens) D=64 M=256 bf16 on an H200."""
    tokens, heads, width, num_features = 262_144, 8, 64, 256
    by_kernel = fused.costs(
        chip=TARGETS["sm_90"].chip, batch_heads=heads, tokens=tokens, num_features=num_features, width=width,
        width_v=width, itemsize=2,
    )  # fmt: skip
    tensor = heads * tokens * width * 2
    passes = {
        "forward": (("state_fwd", "merge", "read_fwd"), 4),  # q k v, out
        "backward": (("read_dq", "read_dstate", "state_bwd"), 8),  # q k v out dout, dq dk dv
    }
    for direction, (kernels, tensors) in passes.items():
        yield Floor(
            shape="performer B1 H8 N=262,144 D64 M256 bf16",
            direction=direction,
            flop=sum(by_kernel[kernel].flop for kernel in kernels),
            exponentials=sum(by_kernel[kernel].exponentials for kernel in kernels),
            planned_bytes=sum(by_kernel[kernel].bytes for kernel in kernels),
            least_bytes=tensors * tensor,
        )


FAMILY = Family(cases=cases, floors=floors)
