"""What each kernel family is compiled and counted on. A new family adds its cases here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ahead_of_time import TARGETS
from medformer_kernels._dispatch import chip_of
from medformer_kernels.nystrom import Cells
from medformer_kernels.nystrom import fused as nystrom_fused
from medformer_kernels.patch_embed import fused as patch_embed_fused
from medformer_kernels.patch_embed.geometry import Geometry, resolve
from medformer_kernels.performer import default_num_features, fused

__all__ = ["FAMILIES", "WIDTHS", "Case", "Family", "Floor"]

WIDTHS = (64, 128)
"""Head widths that have tiles of their own; others take those of the next one up."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of one family, launched on meta tensors."""

    name: str
    width: int
    dtype: torch.dtype
    launches: dict[str, Callable[[], Any]]
    """By configuration key: each starts at least the kernel that key configures."""


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Counted work of one pass of a family at its headline shape."""

    shape: str
    direction: str
    flop: int
    exponentials: int
    planned_bytes: int
    """What the launch plan moves to and from memory."""
    least_bytes: int
    """Inputs and outputs once."""


@dataclass(frozen=True, kw_only=True)
class Family:
    cases: Callable[..., Iterator[Case]]
    floors: Callable[[], Iterator[Floor]]


def performer_cases(*, widths: tuple[int, ...] = WIDTHS, tokens: int = 262_144) -> Iterator[Case]:
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


def performer_floors() -> Iterator[Floor]:
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


def nystrom_cases(*, widths: tuple[int, ...] = WIDTHS, landmarks: int = 256) -> Iterator[Case]:
    """B=1 H=8 N=64^3: a plain sequence, and a masked volume with its convolution, where every epilogue is on."""

    def case(width: int, dtype: torch.dtype, full: bool) -> Case:
        x = torch.empty(1, 8, 64**3, width, dtype=dtype, device="meta")
        mask = torch.empty(1, 64**3, dtype=torch.bool, device="meta") if full else None
        weight = torch.empty(8, 3, 3, 3, device="meta") if full else None
        cells = Cells(grid=(1, 1, 64**3), landmark_grid=(1, 1, landmarks))
        if full:
            cells = Cells(grid=(64, 64, 64), landmark_grid=(4, 8, landmarks // 32))

        def forward() -> nystrom_fused.Forward:
            return nystrom_fused.forward(x, x, x, cells, None, None, weight, mask, 6, None)

        def backward() -> None:
            made = torch.empty(1, 8, landmarks, width, dtype=dtype, device="meta")
            values, lse = made.float(), made[..., 0].float()
            nystrom_fused.backward(
                x, x, x, x, cells, True, weight, mask,
                nystrom_fused.Forward(
                    out=x, q_landmarks=made, k_landmarks=made, total=lse, values=values, lse=lse, solved=values,
                    valid=torch.empty((1, landmarks) if full else 0, dtype=torch.uint8, device="meta"),
                    out_lse=x[..., 0].float(),
                ), 6, None,
            )  # fmt: skip

        def core() -> None:
            small = x[:, :, : nystrom_fused.core_landmarks(chip_of(x))]
            one = Cells(grid=(1, 1, small.shape[2]), landmark_grid=(1, 1, small.shape[2]))
            nystrom_fused.forward(small, small, small, one, None, None, None, None, 6, None)

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


def nystrom_floors() -> Iterator[Floor]:
    """B=1 H=8 N=262,144 (64^3 tokens) D=64, 256 landmarks, bf16, no convolution, on an H200."""
    tokens, heads, width, landmarks = 262_144, 8, 64, 256
    by_kernel = nystrom_fused.costs(
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


def patch_embed_cases(*, widths: tuple[int, ...] = WIDTHS, size: int = 128) -> Iterator[Case]:
    """One raw channel of two windows, one and 64 channels in both layouts, with all of the epilogue; `width` is E."""

    def case(width: int, dtype: torch.dtype, kind: str, channels: int, kernel: int, stride: int) -> Case:
        raw, last = kind == "raw", kind == "channels last"
        weight = torch.empty(width, channels * (2 if raw else 1), *(kernel,) * 3, dtype=dtype, device="meta")
        geometry = resolve((size,) * 3, kernel, stride=stride, padding=kernel // 2)
        x = torch.empty(2, channels, *(size,) * 3, dtype=torch.int16 if raw else dtype, device="meta")
        x = x.contiguous(memory_format=torch.channels_last_3d) if last else x
        row = torch.empty(width, dtype=dtype, device="meta")
        tables = [torch.empty(g, width, dtype=dtype, device="meta") for g in geometry.grid]
        tokens = torch.empty(2, geometry.tokens, width, dtype=dtype, device="meta")
        windows = [0.0, 1.0, 0.0, 1.0] * 2 if raw else []

        def backward(*needs: bool) -> None:
            patch_embed_fused.backward(
                tokens, x, weight, tokens, row, windows, geometry, "zeros", "layer", 1e-6, needs, "fused"
            )

        launches: dict[str, Callable[[], Any]] = {
            "fwd": lambda: patch_embed_fused.forward(
                x, weight, row, row, row, tables, None, windows, geometry, "zeros", "layer", 1e-6, True, "fused"
            ),
            "dw": lambda: backward(False, True, True, True, True),
        }
        if not raw:
            launches["dx"] = lambda: patch_embed_fused.unembed(tokens, weight, None, geometry, "fused")
        name = f"E={width} C={channels} k{kernel} s{stride} {str(dtype)[6:]} {kind}"
        return Case(name=name, width=width, dtype=dtype, launches=launches)

    for width in widths:
        for dtype in (torch.bfloat16, torch.float32):
            yield case(width, dtype, "raw", 1, 7, 4)
            yield case(width, dtype, "channels first", 1, 7, 4)
            yield case(width, dtype, "channels first", 64, 3, 2)
            yield case(width, dtype, "channels last", 64, 3, 2)
            if width == max(WIDTHS):
                yield case(1024, dtype, "channels first", 1, 16, 8)


def patch_embed_floors() -> Iterator[Floor]:
    """The two shapes of the targets, bf16 on an H200."""
    for channels, width, kernel, stride, size in ((1, 64, 7, 4, 256), (64, 128, 3, 2, 64)):
        geometry: Geometry = resolve((size,) * 3, kernel, stride=stride, padding=kernel // 2)
        by_kernel = patch_embed_fused.costs(
            chip=TARGETS["sm_90"].chip, geometry=geometry, batch=1, channels=channels, width=width, itemsize=2,
            voxel_bytes=2,
        )  # fmt: skip
        volume, tokens = channels * size**3 * 2, geometry.tokens * width * 2
        passes = {"forward": (("fwd",), volume + tokens), "backward": (("norm_bwd", "dw"), volume + 2 * tokens)}
        for direction, (kernels, least) in passes.items():
            yield Floor(
                shape=f"patch_embed {channels}x{size}^3 k{kernel} s{stride} E={width} bf16",
                direction=direction,
                flop=sum(by_kernel[kernel].flop for kernel in kernels),
                exponentials=0,
                planned_bytes=sum(by_kernel[kernel].bytes for kernel in kernels),
                least_bytes=least,
            )


FAMILIES = {
    "performer": Family(cases=performer_cases, floors=performer_floors),
    "nystrom": Family(cases=nystrom_cases, floors=nystrom_floors),
    "patch_embed": Family(cases=patch_embed_cases, floors=patch_embed_floors),
}
