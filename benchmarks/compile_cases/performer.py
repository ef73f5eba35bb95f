"""FAVOR+ attention: what is compiled and counted."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ahead_of_time import TARGETS
from compile_cases.shapes import Case, Cost, Family, Floor
from medformer_kernels import _dispatch
from medformer_kernels._dispatch import AttentionPlan, Chip
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
            causal_fused.backward(
                x, x, x, omega, mask, end, x, row, row.new_empty((row.shape[0], 3, *row.shape[1:])), x, full
            )

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


def costs(
    *, chip: Chip, batch_heads: int, tokens: int, num_features: int, width: int, width_v: int, itemsize: int
) -> dict[str, Cost]:
    """Cost by kernel of a forward and a backward pass over N = S = `tokens`, from the launch plans themselves.

    Where programs share out the columns of a wide head, each makes the features, and reads what they take, again.
    Programs that share out the features over one slice of the tokens are neighbours in the launch, and run at the same
    time: what one reads the others find in the cache, and it counts once.
    """

    def plan(kernel: str) -> AttentionPlan:
        return fused.launch_plan(
            kernel,
            chip=chip,
            num_features=num_features,
            width=max(width, width_v),
            itemsize=itemsize,
            tokens=tokens,
            batch_heads=batch_heads,
        )

    rows = batch_heads * tokens
    both = width + width_v
    partial = batch_heads * num_features * (width_v + 1) * 4
    state_plan, dstate_plan = plan("state_fwd"), plan("read_dstate")
    merged = state_plan.slices + 1 if state_plan.slices > 1 else 0
    # programs that share out columns
    state, read, dstate = (fused.column_blocks(width_v, p) for p in (state_plan, plan("read_fwd"), dstate_plan))
    dq = fused.column_blocks(width, plan("read_dq"))
    dkv = max(fused.column_blocks(size, plan("state_bwd")) for size in (width, width_v))
    result = {
        # kernel: (widths of its products with the features, exponentials a feature, numbers a token, other bytes)
        "state_fwd": (state * width + width_v, state, state * width + width_v, state_plan.slices * partial),
        "merge": (0, 0, 0, merged * partial),
        "read_fwd": (read * width + width_v, read, read * width + width_v, rows * 4),
        "read_dq": (dq * both + width, dq, dq * (both + width_v) + width, rows * 8),
        "read_dstate": (
            dstate * width + width_v, dstate, dstate * width + width_v, rows * 8 + 2 * dstate_plan.slices * partial,
        ),
        "state_bwd": (dkv * both + both, dkv, dkv * both + both, 0),
    }  # fmt: skip
    return {
        kernel: Cost(
            flop=2 * rows * num_features * widths,
            exponentials=rows * num_features * exps,
            bytes=rows * numbers * itemsize + rest,
        )
        for kernel, (widths, exps, numbers, rest) in result.items()
    }


def causal_costs(
    *, chip: Chip, batch_heads: int, tokens: int, num_features: int, width: int, width_v: int, itemsize: int
) -> dict[str, Cost]:
    """Cost by kernel of a forward and a backward pass, from the launch plans themselves; of heads no wider than a tile.

    A program's own state is not counted: read and written once a chunk, it stays in the cache (2 programs a
    multiprocessor x M (Dv + 1) float32 numbers, 18 MB on an H200 with M=256 and Dv=64).
    """
    rows, result = batch_heads * tokens, {}
    partial = batch_heads * num_features * (width_v + 1) * 4
    pair = (width + width_v) * itemsize
    passes = {
        # kernel: (widths of its products with the features, exponentials a feature, products of a chunk's features and
        # of its values, bytes a token)
        "causal_fwd": (2 * (width + width_v), 4, 1, 1, 2 * pair + 16),
        "causal_dq": (3 * width + 2 * width_v, 4, 1, 1, 3 * pair + width_v * itemsize + 20),
        "causal_dkv": (5 * width + 3 * width_v, 7, 2, 2, 3 * pair + 20),
    }
    for kernel, (widths, exponentials, products, small, moved) in passes.items():
        plan = causal_fused.launch_plan(
            kernel, chip=chip, num_features=num_features, width=max(width, width_v), itemsize=itemsize, tokens=tokens,
            batch_heads=batch_heads,
        )  # fmt: skip
        if plan.slices > 1:
            read = rows * (plan.slices - 1) // plan.slices  # nobody reads the state of the last slice
            result[f"{kernel} states"] = Cost(
                flop=2 * read * num_features * (width + width_v),
                exponentials=read * num_features,
                bytes=read * (pair + 8 * (kernel == "causal_dkv")) + 3 * plan.slices * partial,
            )
        result[kernel] = Cost(
            flop=2 * rows * (num_features * (widths + products * plan.block_n) + small * plan.block_n * width_v),
            exponentials=rows * (num_features * exponentials + plan.block_n),
            bytes=rows * moved + plan.slices * partial,
        )
    return result


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
    by_kernel, causal = costs(**shape), causal_costs(**shape)
    tensor = heads * tokens * width * 2
    passes = {
        "forward": ([by_kernel[kernel] for kernel in ("state_fwd", "merge", "read_fwd")], 4),  # q k v, out
        # q k v out dout, dq dk dv
        "backward": ([by_kernel[kernel] for kernel in ("read_dq", "read_dstate", "state_bwd")], 8),
        "causal forward": ([cost for kernel, cost in causal.items() if "fwd" in kernel], 6),
        "causal backward": ([cost for kernel, cost in causal.items() if "fwd" not in kernel], 16),
    }
    for direction, (launched, tensors) in passes.items():
        yield Floor.of("performer B1 H8 N=262,144 D64 M256 bf16", direction, launched, tensors * tensor)


FAMILY = Family(cases=cases, floors=floors, widths=WIDTHS)
