"""Which implementation runs, and with which tuned tile sizes. Decided in the open, never inside an `except`."""

from __future__ import annotations

import functools
import importlib.resources
import importlib.util
import json
import os
from typing import Any

import torch
from torch import Tensor

__all__ = ["arch_of", "load_configs", "nearest_arch", "resolve_backend"]

_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """True when Triton runs its kernels in the CPU interpreter (TRITON_INTERPRET=1 before the first import)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def resolve_backend(function: str, backend: str, x: Tensor) -> str:
    """'auto' to 'triton' on a GPU and 'torch' elsewhere; an explicit choice is kept or refused, never changed.

    Raises:
        ValueError: `backend` is unknown, or cannot run on the device or dtype of `x`.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"{function}: backend={backend!r} must be 'auto', 'triton' or 'torch'")
    if backend == "torch":
        return "torch"
    if backend == "auto":
        return "triton" if x.is_cuda and has_triton() and x.dtype in _TRITON_DTYPES else "torch"
    if not has_triton():
        raise ValueError(
            f"{function}: backend='triton' needs the triton package; pip install triton, or use 'torch'"
        )
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
        raise ValueError(
            f"{function}: Triton's interpreter is wrong for bfloat16; use float16 or float32 there"
        )
    return "triton"


def arch_of(x: Tensor) -> str:
    """'sm_90', 'gfx942', ...; the interpreter uses the tiles of 'sm_80'."""
    if not x.is_cuda:
        return "sm_80"
    if torch.version.hip:
        return torch.cuda.get_device_properties(x.device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(x.device)
    return f"sm_{major}{minor}"


@functools.cache
def load_configs(family: str) -> dict[str, Any]:
    """The tuned tile sizes of a family, `configs/<family>.json`."""
    return json.loads(
        importlib.resources.files(__package__).joinpath("configs", f"{family}.json").read_text()
    )


def nearest_arch(arch: str, known: tuple[str, ...]) -> str:
    """The newest tuned architecture that is not newer than `arch` (any gfx falls to the tuned gfx)."""
    if arch in known:
        return arch
    kind = "gfx" if arch.startswith("gfx") else "sm_"
    same = sorted((name for name in known if name.startswith(kind)), key=lambda name: (len(name), name))
    older = [name for name in same if (len(name), name) <= (len(arch), arch)]
    return (older or same[:1])[-1]
