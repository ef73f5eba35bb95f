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

import torch
from torch import Tensor

__all__ = [
    "Chip",
    "Plan",
    "assume_chip",
    "block",
    "chip_of",
    "launch_plan",
    "load_configs",
    "mask_arguments",
    "nearest_arch",
    "resolve_backend",
    "tile",
]

_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


# Looked up once, here: torch.compile traces `resolve_backend` and does not trace the import system.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """True when Triton runs its kernels in the CPU interpreter (TRITON_INTERPRET=1 before the first import)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def resolve_backend(function: str, backend: str, x: Tensor, unsupported: str | None = None) -> str:
    """'auto' to 'triton' on a GPU and 'torch' elsewhere; an explicit choice is kept or refused, never changed.

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
    if unsupported:
        raise ValueError(f"{function}: backend='triton' has no kernel for {unsupported}; use 'auto' or 'torch'")
    if not HAS_TRITON:
        raise ValueError(f"{function}: backend='triton' needs the triton package; pip install triton, or use 'torch'")
    if x.dtype not in _TRITON_DTYPES:
        raise ValueError(
            f"{function}: backend='triton' does not take {x.dtype}; use float16, bfloat16, float32 or backend='torch'"
        )
    if not x.is_cuda and not interpreting():
        raise ValueError(
            f"{function}: backend='triton' cannot run on {x.device}; move the tensors to a GPU, use backend='torch', "
            "or set TRITON_INTERPRET=1 before Python starts to run the kernel in the (slow) interpreter"
        )
    if not x.is_cuda and x.dtype == torch.bfloat16:
        raise ValueError(f"{function}: Triton's interpreter is wrong for bfloat16; use float16 or float32 there")
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


def tile(family: str, kernel: str, chip: Chip, width: int, itemsize: int) -> dict[str, int]:
    """The tuned tile of a kernel for heads of `width`: that of the next width up which has one.

    Raises:
        ValueError: no tile is that wide.
    """
    table = load_configs(family)[kernel]
    entries = table[nearest_arch(chip.arch, tuple(table))]
    fitting = [entry for entry in entries if entry["itemsize"] == itemsize and entry["width"] >= block(width)]
    if not fitting:
        raise ValueError(f"{family}: {kernel} has no tile for heads of width {width} on {chip.arch}; use 'torch'")
    return min(fitting, key=lambda entry: entry["width"])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Tiles of one launch: `block_m` features or landmarks x `block_n` tokens, the latter axis cut into `slices`."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    slice_length: int
    slices: int
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
) -> Plan:
    """Tiles of `entry` for `rows` features or landmarks a head.

    Where programs share out the rows and not the tokens (`sliced`), tokens are cut too: until there are two programs
    a multiprocessor, and into no less than 8 tiles a program. `rows_per_program`: by default those of a tile.
    """
    block_m, block_n = min(entry["block_m"], block(rows)), entry["block_n"]
    slices = 1
    if sliced:
        programs = batch_heads * -(-rows // (rows_per_program or block_m))
        slices = max(1, min(-(-2 * chip.units // programs), tokens // (8 * block_n)))
    slice_length = -(-tokens // slices)
    slice_length = max(1, -(-slice_length // block_n)) * block_n
    return Plan(
        block_m=block_m,
        block_n=block_n,
        num_warps=entry["num_warps"],
        num_stages=entry["num_stages"],
        slice_length=slice_length,
        slices=max(1, -(-tokens // slice_length)),
        columns=entry.get("columns", entry["width"]),
    )


def mask_arguments(mask: Tensor | None, unused: Tensor) -> tuple[Tensor, int, int]:
    """(mask as bytes, its strides) as kernels take them; without a mask, of what they do not read."""
    if mask is None:
        return unused, 0, 0
    mask = mask.view(torch.uint8)
    return mask, mask.stride(0), mask.stride(1)
