"""Which implementation runs, and with which tuned tile sizes. Decided in the open, never inside an `except`."""

from __future__ import annotations

import functools
import importlib.resources
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medformer_kernels._tracing import constant
from medformer_kernels._versions import installed, numbers

__all__ = [
    "AttentionPlan",
    "Chip",
    "Plan",
    "assume_chip",
    "block",
    "chip_of",
    "cut",
    "launch_plan",
    "load_configs",
    "nearest_arch",
    "parts_for",
    "precision",
    "resolve_backend",
    "tf32x3",
    "tile",
    "tiles",
]

_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


# Looked up once, here: torch.compile traces `resolve_backend` and does not trace the import system.
HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON = numbers(installed().get("triton", "0"))
"""(major, minor) of the installed Triton."""


def interpreting() -> bool:
    """True when Triton runs its kernels in the CPU interpreter (TRITON_INTERPRET=1 before the first import)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@constant
def interprets_bfloat16() -> bool:
    """False for the interpreter that Triton ships: it holds bfloat16 as bits in uint16 and computes with those."""
    import triton.language as tl
    from triton.runtime import interpreter  # not at the top: only where kernels are interpreted

    return interpreter._get_np_dtype(tl.bfloat16) != np.uint16


def resolve_backend(function: str, backend: str, x: Tensor, unsupported: str | None = None) -> str:
    """'auto' to 'triton' on a GPU and 'torch' elsewhere; an explicit choice is kept or raises, never changed.

    `unsupported` names what the kernels do not take in this call, if anything.

    Raises:
        ValueError: `backend` is unknown, or cannot run on the device or dtype of `x`.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"{function}: backend={backend!r} must be 'auto', 'triton' or 'torch'")
    if backend == "torch":
        return "torch"
    if backend == "auto":
        return "triton" if x.is_cuda and HAS_TRITON and x.dtype in _TRITON_DTYPES and not unsupported else "torch"
    if not HAS_TRITON:
        raise ValueError(f"{function}: backend='triton' needs the triton package; pip install triton, or use 'torch'")
    if x.dtype not in _TRITON_DTYPES:
        raise ValueError(
            f"{function}: backend='triton' does not take {x.dtype}; use float16, bfloat16, float32 or backend='torch'"
        )
    if unsupported:
        raise ValueError(f"{function}: backend='triton' has no kernel for {unsupported}; use 'auto' or 'torch'")
    if not x.is_cuda and not interpreting():
        raise ValueError(
            f"{function}: backend='triton' cannot run on {x.device}; move the tensors to a GPU, use backend='torch', "
            "or set TRITON_INTERPRET=1 before Python starts to run the kernel in the (slow) interpreter"
        )
    if not x.is_cuda and x.dtype == torch.bfloat16 and not interprets_bfloat16():
        raise ValueError(
            f"{function}: Triton's interpreter computes bfloat16 as 16-bit integers, wrongly; use float16 or float32 "
            "there, or backend='torch'"
        )
    return "triton"


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What a launch plan needs to know of a device."""

    arch: str
    """'sm_90', 'gfx942', ..."""
    units: int
    """Multiprocessors (compute units) to fill."""


_assumed_chip: ContextVar[Chip | None] = ContextVar("assumed_chip", default=None)


@contextmanager
def assume_chip(chip: Chip) -> Iterator[None]:
    """Plan launches for `chip` whatever the tensors are on: to compile ahead of time, where there is no GPU."""
    token = _assumed_chip.set(chip)
    try:
        yield
    finally:
        _assumed_chip.reset(token)


def chip_of(x: Tensor) -> Chip:
    """The chip that `x` is on; the interpreter plans as for a small sm_80, so that it splits lengths too."""
    assumed = _assumed_chip.get()
    if assumed is not None:
        return assumed
    return _chip(x.device) if x.is_cuda else Chip(arch="sm_80", units=4)


@functools.cache
def _chip(device: torch.device) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    arch = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return Chip(arch=arch, units=properties.multi_processor_count)


@functools.cache
def load_configs(family: str) -> dict[str, Any]:
    """The tuned tile sizes of a family, `configs/<family>.json`."""
    return json.loads(importlib.resources.files("medformer_kernels").joinpath("configs", f"{family}.json").read_text())


def nearest_arch(arch: str, known: tuple[str, ...]) -> str:
    """The newest tuned architecture that is not newer than `arch` (any gfx falls to the tuned gfx)."""
    if arch in known:
        return arch
    kind = "gfx" if arch.startswith("gfx") else "sm_"
    same = sorted((name for name in known if name.startswith(kind)), key=lambda name: (len(name), name))
    older = [name for name in same if (len(name), name) <= (len(arch), arch)]
    return (older or same[:1])[-1]


def block(width: int) -> int:
    """Extent of the tile that holds `width` columns: a power of two, at least what a matrix product takes."""
    return max(16, 1 << (width - 1).bit_length())


def tiles(family: str, kernel: str, chip: Chip) -> list[dict[str, int]]:
    """The tuned tiles of a kernel for the newest tuned architecture that is not newer than the chip's.

    A tile with "triton_before" is for versions of Triton older than that one, one with "triton_from" for that one and
    newer; all others are for every version.
    """
    table = load_configs(family)[kernel]
    return [entry for entry in table[nearest_arch(chip.arch, tuple(table))] if for_triton(entry, TRITON)]


def for_triton(entry: dict[str, Any], version: tuple[int, ...]) -> bool:
    """Whether a tile is for this (major, minor) of Triton."""
    before, since = (entry.get(key) for key in ("triton_before", "triton_from"))
    return (before is None or version < numbers(before)) and (since is None or version >= numbers(since))


def tile(family: str, kernel: str, chip: Chip, width: int, itemsize: int) -> dict[str, int]:
    """The tuned tile of a kernel for heads of `width`: that of the next width up which has one.

    Raises:
        ValueError: no tile is that wide.
    """
    entries = tiles(family, kernel, chip)
    fitting = [entry for entry in entries if entry["itemsize"] == itemsize and entry["width"] >= block(width)]
    if not fitting:
        raise ValueError(f"{family}: {kernel} has no tile for heads of width {width} on {chip.arch}; use 'torch'")
    return min(fitting, key=lambda entry: entry["width"])


def tf32x3(chip: Chip) -> str:
    """float32 products run as three tf32 products on NVIDIA (24 bits), exactly elsewhere."""
    return "tf32x3" if chip.arch.startswith("sm_") else "ieee"


def precision(x: Tensor) -> str:
    """Of products of tensors like `x`."""
    return tf32x3(chip_of(x)) if x.dtype == torch.float32 else "ieee"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a kernel is launched: what all families plan. Each adds the extents of its tiles."""

    num_warps: int
    num_stages: int
    slice_length: int = 0
    slices: int = 1
    """Parts that an axis is cut into where programs share out another: their results are summed, or merged."""
    max_registers: int | None = None
    """Of a thread, on NVIDIA. Said, 255 are used; unsaid, ptxas may aim at 80 or 128 and spill for it."""

    @property
    def launch(self) -> dict[str, int]:
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


def parts_for(chip: Chip, programs: int) -> int:
    """Parts to cut an axis into where there are so few programs: for two a multiprocessor, or fewer, but not more.

    The few beyond that would start when all others end, and take as long again.
    """
    return max(1, 2 * chip.units // max(1, programs))


def cut(length: int, block: int, slices: int) -> tuple[int, int]:
    """(slice_length, slices) of a plan: about `slices` of whole blocks, but none shorter than 8 of them."""
    slices = max(1, min(slices, length // (8 * block)))
    slice_length = max(1, -(-length // (slices * block))) * block
    return slice_length, max(1, -(-length // slice_length))


@dataclass(frozen=True, kw_only=True)
class AttentionPlan(Plan):
    """Tiles of `block_m` features or landmarks x `block_n` tokens, the latter axis cut into slices."""

    block_m: int
    block_n: int
    columns: int
    """Columns of a head that a program holds at once: all, unless the tile says less."""


def launch_plan(
    entry: dict[str, int],
    *,
    chip: Chip,
    rows: int,
    tokens: int,
    batch_heads: int,
    sliced: bool,
    rows_per_program: int | None = None,
) -> AttentionPlan:
    """Tiles of `entry` for `rows` features or landmarks a head.

    Where programs share out the rows and not the tokens (`sliced`), tokens are cut too: into up to two programs a
    multiprocessor, and into no less than 8 tiles a program. `rows_per_program`: by default those of a tile.
    """
    block_m, block_n = min(entry["block_m"], block(rows)), entry["block_n"]
    programs = batch_heads * -(-rows // (rows_per_program or block_m))
    slice_length, slices = cut(tokens, block_n, parts_for(chip, programs) if sliced else 1)
    return AttentionPlan(
        block_m=block_m,
        block_n=block_n,
        num_warps=entry["num_warps"],
        num_stages=entry["num_stages"],
        max_registers=entry.get("max_registers"),
        columns=entry.get("columns", entry["width"]),
        slice_length=slice_length,
        slices=slices,
    )
