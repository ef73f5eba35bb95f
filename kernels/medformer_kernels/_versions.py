"""The oldest PyTorch and Triton that the package works with; importing it with an older one raises ImportError."""

from __future__ import annotations

import importlib.metadata
import re

import torch

__all__ = ["OLDEST", "check", "installed", "numbers"]

OLDEST = {"torch": (2, 11), "triton": (3, 6)}
"""As in pyproject.toml, which a test compares."""

# ROCm and nightly builds of PyTorch bring Triton under names of their own.
_TRITON = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm")


def check(found: dict[str, str]) -> None:
    """Raise ImportError where a version of `found` is older than in `OLDEST`; an absent package is no fault.

    Kernels need Triton only where they run, which `resolve_backend` checks.
    """
    old = [name for name, version in found.items() if numbers(version) < OLDEST[name]]
    if old:
        needed = " and ".join(f"{name} {'.'.join(map(str, least))}" for name, least in OLDEST.items())
        present = " and ".join(f"{name} {version}" for name, version in found.items())
        mend = " ".join(f"'{name}>={'.'.join(map(str, OLDEST[name]))}'" for name in old)
        raise ImportError(f"medformer needs {needed} or newer, not {present}; pip install --upgrade {mend}")


def numbers(version: str) -> tuple[int, ...]:
    """(major, minor)"""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def installed() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for name in _TRITON:
        try:
            return found | {"triton": importlib.metadata.version(name)}
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


check(installed())
