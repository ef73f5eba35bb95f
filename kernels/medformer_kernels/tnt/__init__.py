"""The inner block of a Transformer-in-Transformer: a small transformer over hundreds of thousands of tiny sequences.

y = x + proj(attention(LN(x))), out = y + fc2(GELU(fc1(LN(y)))), for each of S sequences of n tokens of width c.

Source: Han et al. 2021, eq. (3) and (4).
Shapes: S sequences (one for each outer token), n inner tokens, c their width, H heads, D = c / H, f width of the MLP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medformer_kernels._dispatch import chip_of, resolve_backend
from medformer_kernels._dropout import seed_tensor
from medformer_kernels._operators import followed
from medformer_kernels._tracing import constant, standard
from medformer_kernels.tnt import ops
from medformer_kernels.tnt.outer import tnt_inner_to_outer, tnt_inner_to_outer_reference
from medformer_kernels.tnt.plans import KERNELS, fits
from medformer_kernels.tnt.reference import reference
from medformer_kernels.tnt.weights import TNTInnerWeights

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = [
    "TNTInnerWeights",
    "tnt_inner_block",
    "tnt_inner_block_reference",
    "tnt_inner_to_outer",
    "tnt_inner_to_outer_reference",
]

# The longest sequence that one program of the kernels holds.
_MOST_TOKENS = 128


def tnt_inner_block(
    x: Float[Tensor, "S n c"],
    weights: TNTInnerWeights,
    *,
    num_heads: int,
    eps: float = 1e-6,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Float[Tensor, "S n c"]:
    """LayerNorm, attention, residual, LayerNorm, MLP, residual over every sequence on its own.

    Args:
        x: S sequences of n tokens of width c; any strides.
        weights: parameters; products run in the dtype of its matrices, LayerNorm, softmax and sums in float32. Under
            autocast the matrices are cast, and x stays as it is.
        num_heads: H; divides c.
        eps: of both LayerNorms.
        dropout: share of the elements of each branch that are dropped, the rest scaled up.
        drop_path: share of the sequences that skip each branch (stochastic depth, Huang et al. 2016).
        seed: of both, 0 to 2^63 - 1, as a number or an int64 tensor of one element on the device of x; None draws one
            from torch's generator. What is dropped depends on the seed and the place only: equal on every backend.
        backend: 'auto', 'triton' or 'torch'. The kernels take what `configs/tnt.json` has a tile for.

    Raises:
        ValueError: shapes, dtypes or probabilities that do not fit, or a backend that cannot run.
    """
    x, weights, seed_tensor = _prepare("tnt_inner_block", x, weights, num_heads, dropout, drop_path, seed)
    if standard():
        return reference(x, weights, seed_tensor, num_heads, eps, dropout, drop_path)
    wanted = backend == "triton" or (backend == "auto" and x.is_cuda)
    save = followed(x, *weights.tensors())
    unsupported = _unsupported(x, weights.qkv_weight, num_heads, save) if wanted else None
    backend = resolve_backend("tnt_inner_block", backend, weights.qkv_weight, unsupported)
    with torch.autocast(x.device.type, enabled=False):
        return ops.tnt_inner_block(
            x, *weights.tensors(), seed_tensor, num_heads, eps, dropout, drop_path, save, backend
        )[0]


def tnt_inner_block_reference(
    x: Float[Tensor, "S n c"],
    weights: TNTInnerWeights,
    *,
    num_heads: int,
    eps: float = 1e-6,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    seed: int | Tensor | None = None,
) -> Float[Tensor, "S n c"]:
    """The definition of `tnt_inner_block`."""
    x, weights, seed_tensor = _prepare("tnt_inner_block_reference", x, weights, num_heads, dropout, drop_path, seed)
    with torch.autocast(x.device.type, enabled=False):
        return reference(x, weights, seed_tensor, num_heads, eps, dropout, drop_path)


def _prepare(
    function: str,
    x: Tensor,
    weights: TNTInnerWeights,
    num_heads: int,
    dropout: float,
    drop_path: float,
    seed: int | Tensor | None,
) -> tuple[Tensor, TNTInnerWeights, Tensor | None]:
    """Every check, autocast, and the seed as a tensor."""
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(
            f"{function}: x has shape {tuple(x.shape)} and dtype {x.dtype}; it must be floating point (S, n, c)"
        )
    if 0 in x.shape[1:]:
        raise ValueError(f"{function}: x has shape {tuple(x.shape)}; n and c must be at least 1")
    if num_heads < 1 or x.shape[2] % num_heads:
        raise ValueError(f"{function}: num_heads={num_heads} must divide the width c={x.shape[2]} of x")
    for name, p in (("dropout", dropout), ("drop_path", drop_path)):
        if not 0.0 <= p < 1.0:
            raise ValueError(f"{function}: {name}={p} must be at least 0 and below 1")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        weights = weights.cast(torch.get_autocast_dtype(x.device.type))
    weights.check(function, x)
    if not dropout and not drop_path:
        return x, weights, None
    return x, weights, seed_tensor(function, seed, x.device)


def _unsupported(x: Tensor, matrix: Tensor, num_heads: int, gradients: bool) -> str | None:
    """What the kernels do not take in this call."""
    sequences, tokens, width = x.shape
    if tokens > _MOST_TOKENS:
        return f"n above {_MOST_TOKENS} (here {tokens})"
    if sequences >= 2**31:
        return f"S of 2**31 and more (here {sequences})"
    head, itemsize = width // num_heads, matrix.element_size()
    if itemsize <= 4 and not _holds(x.device, tokens, width, head, itemsize, gradients):
        what = "gradients of " if gradients and _holds(x.device, tokens, width, head, itemsize, False) else ""
        return f"{what}n={tokens}, c={width}, heads of {head} in {matrix.dtype}: no tile of it fits on chip"
    return None


@constant
def _holds(device: torch.device, tokens: int, width: int, head: int, itemsize: int, gradients: bool) -> bool:
    return fits(
        chip_of(torch.empty(0, device=device)), tokens, width, head, itemsize, KERNELS if gradients else KERNELS[:1]
    )
