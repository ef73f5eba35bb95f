"""What `performer_attention` accepts: checks that name the argument, and the forms that reduce to the plain one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NoReturn

import torch
from torch import Tensor

from medformer_kernels._arguments import boundaries, order_hint
from medformer_kernels._dispatch import chip_of, load_configs, nearest_arch
from medformer_kernels._operators import followed
from medformer_kernels._tracing import constant

__all__ = ["Call", "Feature", "prepare", "without_kernel"]

Feature = str | Callable[[Tensor], Tensor]
"""'softmax', 'hyperbolic', 'relu', or a function applied to each value of omega x'."""

_FEATURES = ("softmax", "hyperbolic", "relu")


@dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of one call, checked."""

    q: Tensor
    k: Tensor
    v: Tensor
    omega: Tensor
    """With -omega after it for the hyperbolic features."""
    function: Callable[[Tensor], Tensor] | None
    """Of each value of omega x'; None for the exponential features."""
    causal: bool
    mask: Tensor | None
    ends: list[int] | None
    """Boundaries of documents, 0 first."""
    eps: float

    @property
    def omega_of_queries(self) -> Tensor:
        """omega, one for each head of q if for any."""
        if self.omega.ndim == 2 or self.omega.shape[0] == self.q.shape[1]:
            return self.omega
        return self.omega.repeat_interleave(self.q.shape[1] // self.omega.shape[0], 0)

    def shared_heads(self, *, repeat_keys: bool) -> tuple[Tensor, Tensor, Tensor, int]:
        """(k, v, omega for the key heads, groups): how many heads of q read each state.

        An omega of its own for every head of q means a state of its own too: then, or with `repeat_keys`, k and v are
        repeated and `groups` is 1.
        """
        groups = self.q.shape[1] // self.k.shape[1]
        if groups > 1 and (repeat_keys or (self.omega.ndim == 3 and self.omega.shape[0] == self.q.shape[1])):
            k, v = (x.repeat_interleave(groups, 1) for x in (self.k, self.v))
            return k, v, self.omega_of_queries, 1
        return self.k, self.v, self.omega, groups

    def documents(self) -> list[Call]:
        """A call for each document that is not empty, of views."""
        assert self.ends is not None
        lengths = [end - start for start, end in pairwise(self.ends)]
        masks = [None] * len(lengths) if self.mask is None else self.mask.split(lengths, 1)
        parts = zip(*(x.split(lengths, 2) for x in (self.q, self.k, self.v)), masks, lengths, strict=True)
        return [replace(self, q=q, k=k, v=v, mask=mask, ends=None) for q, k, v, mask, length in parts if length]


def prepare(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    omega: Tensor,
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    feature: Feature = "softmax",
    eps: float = 0.0,
) -> Call:
    """The arguments of the function `name`.

    Raises:
        ValueError: an argument does not fit the others.
    """

    def fail(message: str) -> NoReturn:
        raise ValueError(f"{name}: {message}")

    for letter, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            fail(f"{letter} has shape {tuple(x.shape)}; it must be (B, H, tokens, width)")
        if not x.is_floating_point():
            fail(f"{letter} is {x.dtype}; it must be a floating-point tensor")
        if x.dtype != q.dtype or x.device != q.device:
            fail(f"{letter} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}; they must agree")
    if q.shape[3] == 0:
        fail(f"q has shape {tuple(q.shape)}; its width must be at least 1")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        fail(f"k has shape {tuple(k.shape)}; with q {tuple(q.shape)} it must be (B, H, S, D) of the same B and D")
    if q.shape[1:3] == k.shape[2:0:-1] and q.shape[1] != q.shape[2] and 1 not in q.shape[1:3]:
        fail(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}, heads and tokens swapped; both must be (B, H, "
            "tokens, width): transpose(1, 2) the one that is (B, tokens, H, width)"
        )
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
            hint = order_hint(k, key_padding_mask.shape[-1])
            fail(f"key_padding_mask has shape {tuple(key_padding_mask.shape)}; it must be (B, S) = {shape}{hint}")
        if key_padding_mask.device != q.device:
            fail(f"key_padding_mask is on {key_padding_mask.device} but q is on {q.device}; move it there")
    if not callable(feature) and feature not in _FEATURES:
        fail(f"feature={feature!r} must be one of {', '.join(map(repr, _FEATURES))}, or a function")
    if not eps >= 0:
        fail(f"eps={eps} must be at least 0")
    if causal:
        if q.shape[2] != k.shape[2]:
            fail(f"causal=True needs as many queries as keys, not {q.shape[2]} and {k.shape[2]}")
        if eps > 0 and feature in ("softmax", "hyperbolic"):
            fail(f"eps={eps} needs a maximum over all keys, later ones too; with causal=True it must be 0")
    if cu_seqlens is not None and q.shape[2] != k.shape[2]:
        fail(f"cu_seqlens needs as many queries as keys, not {q.shape[2]} and {k.shape[2]}")
    ends = boundaries(cu_seqlens, q.shape[2], fail, empty=True)
    # exp(u) and exp(-u), whose sum is 2 cosh(u). Source: Choromanski et al. 2021, lemma 1 (the hyperbolic estimator).
    omega = torch.cat([omega, -omega], -2) if feature == "hyperbolic" else omega
    function = torch.relu if feature == "relu" else feature if callable(feature) else None
    return Call(q=q, k=k, v=v, omega=omega, function=function, causal=causal, mask=key_padding_mask, ends=ends, eps=eps)


def _check_omega(q: Tensor, k: Tensor, omega: Tensor, fail: Callable[[str], NoReturn]) -> None:
    heads, kv_heads, width = q.shape[1], k.shape[1], q.shape[3]
    if not omega.is_floating_point():
        fail(f"omega is {omega.dtype}; it must be a floating-point tensor")
    swapped = omega.ndim == 3 and omega.shape[0] in (q.shape[2], k.shape[2])
    hint = f"; q is read as (B, H, tokens, width), of {heads} heads" if swapped else ""
    if omega.ndim not in (2, 3) or omega.shape[-1] != width or omega.shape[:-2] not in ((), (heads,), (kv_heads,)):
        fail(f"omega has shape {tuple(omega.shape)}; it must be (M, {width}) or ({heads}, M, {width}){hint}")
    if omega.shape[-2] == 0:
        fail("omega has M=0 features; it must have at least 1")
    if omega.device != q.device:
        fail(f"omega is on {omega.device} but q is on {q.device}; move it there")


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


@constant
def _widest(device: torch.device, form: str, itemsize: int) -> tuple[int, str]:
    arch = chip_of(torch.empty(0, device=device)).arch
    widest = _WIDEST[form, min(4, itemsize)]
    return widest[nearest_arch(arch, tuple(widest))], arch


def without_kernel(q: Tensor, v: Tensor, omega: Tensor, causal: bool, feature: Feature) -> str | None:
    """What keeps this call from the Triton kernels, if anything: wider heads do not fit in the registers."""
    if callable(feature) or feature == "relu":
        return f"feature={feature!r}"
    width = max(q.shape[3], v.shape[3])
    form = "causal=True" if causal else "a gradient of omega" if followed(omega) else ""
    widest, arch = _widest(q.device, form, q.element_size())
    if width <= widest:
        return None
    if widest == 0:
        return f"{form} in {q.dtype} on {arch}"
    return f"{form}{' and ' if form else ''}heads wider than {widest} in {q.dtype} on {arch} (here {width})"
