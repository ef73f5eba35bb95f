"""What torch.compile must know of functions, said without an import of the compiler.

`torch.compiler.assume_constant_result` imports torch._dynamo as it decorates, and `statically_known_true` comes with
sympy: four fifths of what `import medformer` would cost beyond PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["certain", "constant", "least", "standard"]

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`: graphs hold what `function` returns as they are traced."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # all that the decorator does
    return function


@constant
def _to_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


def standard() -> bool:
    """Whether a graph is being made that may hold PyTorch's own operators alone: `torch.onnx.export` knows no others.

    The functions of this package then compute what their references define, of which every runtime has the operators.
    """
    return torch.compiler.is_exporting() and _to_onnx()


def least(x: int, y: int) -> int:
    """min(x, y), also of sizes that a program leaves open; torch.compile of PyTorch 2.11 traces no other `min`."""
    if isinstance(x, torch.SymInt) or isinstance(y, torch.SymInt):
        return torch.sym_min(x, y)  # pyright: ignore[reportReturnType] - a size to whoever asks
    return min(x, y)


def certain(condition: bool | torch.SymBool) -> bool:
    """`condition`; False where a graph leaves open the sizes that decide it."""
    if not torch.compiler.is_compiling() and isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)
