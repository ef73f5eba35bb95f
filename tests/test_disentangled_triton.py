"""The disentangled kernels against the definition in float64; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch
from torch import Tensor

from medformer_kernels import _dispatch, disentangled_attention, disentangled_attention_reference, log_buckets

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
triton = functools.partial(disentangled_attention, backend="triton")


def call_on(
    kind: str, shape: tuple[int, ...], *, terms=("c2c", "c2p", "p2c"), prefix: int = 0, width: int = 16
) -> dict:
    """Arguments in float64; `shape` is a grid, or (tokens,)."""
    generator = torch.Generator().manual_seed(0)
    tokens = prefix + torch.Size(shape).numel()

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE)

    call: dict = {"terms": terms} | {name: normal(1, 1, tokens, width) for name in "qkv"}
    sides = [side for i, side in enumerate("qk") if any("p" in term.split("2")[i] for term in terms)]
    for side in sides:
        if kind == "grid":
            call[f"rel_{side}"] = [normal(1, 2 * g - 1, width) for g in shape]
            if prefix:
                call[f"prefix_{side}"] = normal(1, 2, prefix, width)
        elif kind == "buckets":
            call[f"rel_{side}"] = normal(1, 16, width)
        else:
            call[f"pos_{side}"] = normal(1, tokens, width)
    if kind == "grid":
        call |= {"grid": shape, "prefix_tokens": prefix}
    if kind == "buckets":
        call["buckets"] = log_buckets(tokens, num_buckets=8, max_distance=24).to(DEVICE)
    return call


def cast(call: dict, dtype: torch.dtype) -> dict:
    def one(x):
        if isinstance(x, list):
            return [y.to(dtype) for y in x]
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return {name: one(x) for name, x in call.items()}


def run(function, call: dict, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """The output and the gradient of every input, by name."""
    fresh = cast(call, dtype)
    leaves = {}
    for name, x in fresh.items():
        for i, y in enumerate(x) if isinstance(x, list) else [(0, x)]:
            if isinstance(y, Tensor) and y.is_floating_point():
                leaves[f"{name}[{i}]"] = y.detach().clone().requires_grad_()
                fresh[name] = (
                    [*x[:i], leaves[f"{name}[{i}]"], *x[i + 1 :]] if isinstance(x, list) else leaves[f"{name}[{i}]"]
                )
                x = fresh[name]
    out = function(**fresh, **options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(out, list(leaves.values()), dout.to(out), allow_unused=True)
    made = {
        name: torch.zeros_like(y) if g is None else g for (name, y), g in zip(leaves.items(), gradients, strict=True)
    }
    return {"out": out.detach()} | made


def assert_rule(call: dict, dtype: torch.dtype, **options) -> None:
    """FlashAttention's rule: output and gradients at most twice as far from float64 as plain PyTorch's."""
    low = cast(call, dtype)
    mine, usual = run(triton, low, dtype, **options), run(disentangled_attention_reference, low, dtype, **options)
    exact = run(disentangled_attention_reference, low, torch.float64, **options)
    for name, right in exact.items():
        # where plain PyTorch happens to be nearly exact, a few units in the last place count as nothing
        floor = 4 * torch.finfo(torch.float32).eps * right.norm()
        assert (mine[name].double() - right).norm() <= 2 * (usual[name].double() - right).norm() + floor, name


CASES = {
    "grid": ("grid", (3, 2, 5)),
    "grid of one tile line": ("grid", (2, 3, 32)),
    "grid of long lines": ("grid", (2, 1, 37)),
    "grid of short lines": ("grid", (5, 4, 2)),
    "buckets": ("buckets", (70,)),
    "absolute": ("absolute", (40,)),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_match_the_reference_in_float32(name: str) -> None:
    assert_rule(call_on(*CASES[name]), torch.float32)
