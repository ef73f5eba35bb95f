"""What `performer_attention` accepts: checks that name the argument, and the forms that reduce to the plain one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from medformer_kernels._dispatch import chip_of, load_configs, nearest_arch

__all__ = [
    "Feature",
    "boundaries_of",
    "check",
    "documents",
    "elementwise",
    "shared_heads",
    "two_sided",
    "without_kernel",
]

Feature = str | Callable[[Tensor], Tensor]
"""'softmax', 'hyperbolic', 'relu', or a function applied to each value of omega x'."""

_FEATURES = ("softmax", "hyperbolic", "relu")


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    omega: Tensor,
    *,
    causal: bool,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    feature: Feature,
    eps: float,
    function: str = "performer_attention",
) -> None:
    def fail(message: str) -> None:
        raise ValueError(f"{function}: {message}")

    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            fail(f"{name} has shape {tuple(x.shape)}; it must be (B, H, tokens, width)")
        if not x.is_floating_point():
            fail(f"{name} is {x.dtype}; it must be a floating-point tensor")
        if x.dtype != q.dtype or x.device != q.device:
            fail(f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}; they must agree")
    if q.shape[3] == 0:
        fail(f"q has shape {tuple(q.shape)}; its width must be at least 1")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        fail(f"k has shape {tuple(k.shape)}; with q {tuple(q.shape)} it must be (B, H, S, D) of the same B and D")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        fail(f"k has {k.shape[1]} heads, which must divide the {q.shape[1]} of q")
    if v.shape[:3] != k.shape[:3]:
        fail(f"v has shape {tuple(v.shape)}; with k {tuple(k.shape)} it must be (B, H, S, Dv) of the same B, H and S")
    _check_omega(q, k, omega, fail)
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool:
            fail(f"key_padding_mask is {key_padding_mask.dtype}; it must be bool, True = a real key")
        shape = (k.shape[0], k.shape[2])
        if key_padding_mask.shape != shape:
            fail(f"key_padding_mask has shape {tuple(key_padding_mask.shape)}; it must be (B, S) = {shape}")
        if key_padding_mask.device != q.device:
            fail(f"key_padding_mask is on {key_padding_mask.device} but q is on {q.device}; move it there")
    if not callable(feature) and feature not in _FEATURES:
        fail(f"feature={feature!r} must be one of {', '.join(map(repr, _FEATURES))}, or a function")
    if not eps >= 0:
        fail(f"eps={eps} must be at least 0")
    if causal:
        if q.shape[2] != k.shape[2]:
            fail(f"causal=True needs as many queries as keys, not {q.shape[2]} and {k.shape[2]}")
        if eps > 0 and not elementwise(feature):
            fail(f"eps={eps} needs a maximum over all keys, later ones too; with causal=True it must be 0")
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            fail(
                f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; it must be integers (docs + 1,)"
            )
        if q.shape[2] != k.shape[2]:
            fail(f"cu_seqlens needs as many queries as keys, not {q.shape[2]} and {k.shape[2]}")


def _check_omega(q: Tensor, k: Tensor, omega: Tensor, fail: Callable[[str], None]) -> None:
    heads, kv_heads, width = q.shape[1], k.shape[1], q.shape[3]
    if not omega.is_floating_point():
        fail(f"omega is {omega.dtype}; it must be a floating-point tensor")
    if omega.ndim not in (2, 3) or omega.shape[-1] != width or omega.shape[:-2] not in ((), (heads,), (kv_heads,)):
        fail(f"omega has shape {tuple(omega.shape)}; it must be (M, {width}) or ({heads}, M, {width})")
    if omega.shape[-2] == 0:
        fail("omega has M=0 features; it must have at least 1")
    if omega.device != q.device:
        fail(f"omega is on {omega.device} but q is on {q.device}; move it there")


def elementwise(feature: Feature) -> bool:
    """Features that are a function of each omega x', not exponentials."""
    return callable(feature) or feature == "relu"


_BIDIRECTIONAL = ("state_fwd", "read_fwd", "read_dq", "read_dstate", "state_bwd")
_PASSES = {
    "": _BIDIRECTIONAL,
    "a gradient of omega": (*_BIDIRECTIONAL, "omega"),
    "causal=True": ("causal_fwd", "causal_dq", "causal_dkv"),
}


def _widest_heads() -> dict[tuple[str, int], dict[str, int]]:
    """By form and bytes of a value, by chip: the widest heads for which every pass has a tile."""
    tables = load_configs("performer")
    return {
        (form, itemsize): {
            arch: min(
                max(
                    (entry["width"] for entry in tables[kernel].get(arch, ()) if entry["itemsize"] == itemsize),
                    default=0,
                )
                for kernel in kernels
            )
            for arch in tables[kernels[0]]
        }
        for form, kernels in _PASSES.items()
        for itemsize in (2, 4)
    }


_WIDEST = _widest_heads()


@torch.compiler.assume_constant_result
def _widest(device: torch.device, form: str, itemsize: int) -> tuple[int, str]:
    arch = chip_of(torch.empty(0, device=device)).arch
    widest = _WIDEST[form, min(4, itemsize)]
    return widest[nearest_arch(arch, tuple(widest))], arch


def without_kernel(q: Tensor, v: Tensor, omega: Tensor, causal: bool, feature: Feature) -> str | None:
    """What keeps this call from the Triton kernels, if anything: wider heads do not fit in the registers."""
    if elementwise(feature):
        return f"feature={feature!r}"
    width = max(q.shape[3], v.shape[3])
    trained = omega.requires_grad and torch.is_grad_enabled()
    form = "causal=True" if causal else "a gradient of omega" if trained else ""
    widest, arch = _widest(q.device, form, q.element_size())
    if width <= widest:
        return None
    if widest == 0:
        return f"{form} in {q.dtype} on {arch}"
    return f"{form}{' and ' if form else ''}heads wider than {widest} in {q.dtype} on {arch} (here {width})"


def two_sided(omega: Tensor, feature: Feature) -> Tensor:
    """omega, and -omega after it for the hyperbolic features: exp(u) and exp(-u), whose sum is 2 cosh(u).

    Source: Choromanski et al. 2021, lemma 1 (the hyperbolic estimator, of lower variance).
    """
    return torch.cat([omega, -omega], -2) if feature == "hyperbolic" else omega


def shared_heads(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, repeat_keys: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(k, v, omega for the key heads, groups): how many heads of q read each state.

    An omega of its own for every head of q means a state of its own too: then, or with `repeat_keys`, k and v are
    repeated and `groups` is 1.
    """
    groups = q.shape[1] // k.shape[1]
    if groups == 1:
        return k, v, omega, 1
    if repeat_keys or (omega.ndim == 3 and omega.shape[0] == q.shape[1]):
        if omega.ndim == 3 and omega.shape[0] != q.shape[1]:
            omega = omega.repeat_interleave(groups, 0)
        return k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), omega, 1
    return k, v, omega, groups


def boundaries_of(cu_seqlens: Tensor | None, tokens: int) -> list[int]:
    """Where documents begin, and the end of the last: `cu_seqlens`, read on the host.

    Raises:
        ValueError: `cu_seqlens` does not rise from 0 to the number of tokens.
    """
    if cu_seqlens is None:
        return [0, tokens]
    ends = cu_seqlens.tolist()
    if not ends or ends[0] != 0 or ends[-1] != tokens or any(start > end for start, end in pairwise(ends)):
        raise ValueError(f"performer_attention: cu_seqlens={ends} must rise from 0 to the {tokens} tokens")
    return ends


def documents(
    cu_seqlens: Tensor, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None
) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """(q, k, v, key_padding_mask) of each document, as views."""
    lengths = [end - start for start, end in pairwise(boundaries_of(cu_seqlens, q.shape[2]))]
    masks = [None] * len(lengths) if key_padding_mask is None else key_padding_mask.split(lengths, 1)
    parts = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), masks, strict=True)
    return [part for part, length in zip(parts, lengths, strict=True) if length]
