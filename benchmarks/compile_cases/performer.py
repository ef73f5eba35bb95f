"""FAVOR+ attention: what is compiled and counted."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ahead_of_time import TARGETS
from compile_cases.shapes import Case, Family, Floor
from medformer_kernels import _dispatch
from medformer_kernels.performer import causal_fused, default_num_features, fused

__all__ = ["FAMILY"]

WIDTHS = (64, 128, 256)


def chips_with(kernels: tuple[str, ...], width: int, dtype: torch.dtype) -> tuple[str, ...]:
    """Chips on which each of `kernels` has a tile for heads this wide; elsewhere none of those tried fits."""
    tables = _dispatch.load_configs("performer")
    return tuple(
        arch
        for arch in TARGETS
        if all(
            any(e["itemsize"] == dtype.itemsize and e["width"] >= width for e in tables[kernel][arch])
            for kernel in kernels
        )
    )


def cases(*, widths: tuple[int, ...] = WIDTHS, tokens: int = 262_144) -> Iterator[Case]:
    """B=1 H=8; plain, and with key padding mask, epsilon and a trained omega; every width; 16 bit and float32."""

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
            fused.read_backward(x, omega, values, lse, *extra, x, row, x, True)

        def state_backward() -> None:
            fused.state_backward(x, x, omega, mask, values, lse, values, lse, True)

        def omega_gradient() -> None:
            backward()
            state_backward()

        return Case(
            name=f"D={width} M={num_features} {str(dtype)[6:]} {'mask eps' if full else 'plain'} omega",
            width=width,
            dtype=dtype,
            archs=chips_with(("state_fwd", "read_fwd", "read_dq", "read_dstate", "state_bwd", "omega"), width, dtype),
            launches={
                "state_fwd": lambda: fused.state(x, x, omega, mask, full),
                "read_fwd": lambda: fused.read(x, omega, values, lse, *extra),
                "read_dq": backward,
                "read_dstate": backward,
                "state_bwd": state_backward,
                "omega": omega_gradient,
            },
        )

    def causal_case(width: int, dtype: torch.dtype, full: bool) -> Case:
        num_features = default_num_features(width)
        x = torch.empty(1, 8, tokens, width, dtype=dtype, device="meta")
        omega = torch.empty(num_features, width, device="meta")
        row = torch.empty(1, 8, tokens, device="meta")
        mask = torch.empty(1, tokens, dtype=torch.bool, device="meta") if full else None
        end = (0, tokens)

        def backward() -> None:
            causal_fused.backward(x, x, x, omega, mask, end, x, row, row.new_empty((3, *row.shape)), x, full)

        return Case(
            name=f"D={width} M={num_features} {str(dtype)[6:]} {'mask omega' if full else 'plain'} causal",
            width=width,
            dtype=dtype,
            launches={
                "causal_fwd": lambda: causal_fused.forward(x, x, x, omega, mask, end),
                "causal_dq": backward,
                "causal_dkv": backward,
            },
            archs=chips_with(("causal_fwd", "causal_dq", "causal_dkv"), width, dtype),
        )

    for width in widths:
        for dtype in (torch.bfloat16, torch.float32):
            for full in (False, True):
                yield case(width, dtype, full)
                yield causal_case(width, dtype, full)


def floors() -> Iterator[Floor]:
    """B=1 H=8 N=262,144 (64^3 tokens) D=64 M=256 bf16 on an H200.

    Least bytes are inputs and outputs once; of the causal form, whose slices must know what comes before them before
    they begin, k and v twice forward; backward, which walks in both directions, all inputs twice, and k, v, q and dout
    once more for the states between the slices.
    """
    tokens, heads, width, num_features = 262_144, 8, 64, 256
    shape = {
        "chip": TARGETS["sm_90"].chip, "batch_heads": heads, "tokens": tokens, "num_features": num_features,
        "width": width, "width_v": width, "itemsize": 2,
    }  # fmt: skip
    by_kernel, causal = fused.costs(**shape), causal_fused.costs(**shape)
    tensor = heads * tokens * width * 2
    passes = {
        "forward": ([by_kernel[kernel] for kernel in ("state_fwd", "merge", "read_fwd")], 4),  # q k v, out
        # q k v out dout, dq dk dv
        "backward": ([by_kernel[kernel] for kernel in ("read_dq", "read_dstate", "state_bwd")], 8),
        "causal forward": ([cost for kernel, cost in causal.items() if "fwd" in kernel], 6),
        "causal backward": ([cost for kernel, cost in causal.items() if "fwd" not in kernel], 16),
    }
    for direction, (costs, tensors) in passes.items():
        yield Floor(
            shape="performer B1 H8 N=262,144 D64 M256 bf16",
            direction=direction,
            flop=sum(cost.flop for cost in costs),
            exponentials=sum(cost.exponentials for cost in costs),
            planned_bytes=sum(cost.bytes for cost in costs),
            least_bytes=tensors * tensor,
        )


FAMILY = Family(cases=cases, floors=floors, widths=WIDTHS)
