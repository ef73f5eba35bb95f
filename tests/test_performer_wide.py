"""Heads wider than a tile: kernels that hold a block of columns at a time, in both directions."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from medformer_kernels import _dispatch, orthogonal_features, performer_attention, performer_attention_reference
from medformer_kernels.performer import arguments
from tests import launches
from tests.rule import assert_as_good_as_pytorch

pytestmark = launches.performer
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("out", "dq", "dk", "dv", "domega")


def leaves(tokens: int, width: int, width_v: int, dtype: torch.dtype, heads: int = 1, std: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, heads, tokens, size, generator=generator) * std for size in (width, width, width_v)]
    omega = orthogonal_features(20, width, device=DEVICE).requires_grad_()
    return [*(x.to(DEVICE, dtype).requires_grad_() for x in drawn), omega]


def outputs_and_gradients(function, inputs: list[Tensor], **kwargs) -> list[Tensor]:
    out = function(*inputs, **kwargs)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def assert_kernels_are_near_the_reference(inputs: list[Tensor], tolerance: float, **kwargs) -> None:
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = outputs_and_gradients(performer_attention_reference, exact, **kwargs)
    actual = outputs_and_gradients(performer_attention, inputs, backend="triton", **kwargs)
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm(), name


def assert_kernels_err_at_most_twice_as_much_as_plain_pytorch(inputs: list[Tensor], **kwargs) -> None:
    dtype = inputs[0].dtype
    exact = [x.detach().double().requires_grad_() for x in inputs]
    low = [*inputs[:3], inputs[3].detach().to(dtype).requires_grad_()]
    expected = outputs_and_gradients(performer_attention_reference, exact, **kwargs)
    plain = outputs_and_gradients(performer_attention_reference, low, **kwargs)
    actual = outputs_and_gradients(performer_attention, inputs, backend="triton", **kwargs)
    assert_as_good_as_pytorch(actual, plain, expected, NAMES)


@pytest.fixture
def columns_of_16():
    """Tiles of 16 x 16 that hold 16 columns, so that narrow heads are wide ones."""
    entries = [
        {"itemsize": size, "width": 64, "block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 1, "columns": 16}
        for size in (2, 4)
    ]
    table = {kernel: {"sm_80": entries} for kernel in _dispatch.load_configs("performer")}
    widest = {key: {"sm_80": 64} for key in arguments._WIDEST}
    with (
        patch.object(_dispatch, "load_configs", lambda family: table),
        patch.object(arguments, "_WIDEST", widest),
        _dispatch.assume_chip(_dispatch.Chip(arch="sm_80", units=4)),
    ):
        yield


@pytest.mark.skipif(DEVICE == "cuda", reason="tiles made up here are for the interpreter")
@pytest.mark.parametrize(
    ("form", "width", "width_v", "dtype"),
    [
        ("bidirectional", 40, 24, torch.float32),
        ("bidirectional", 16, 40, torch.float16),
        ("epsilon", 30, 16, torch.float32),
        ("documents", 16, 30, torch.float32),
        pytest.param("causal", 30, 16, torch.float32, marks=launches.causal),
        pytest.param("causal", 16, 40, torch.float16, marks=launches.causal),
        pytest.param("causal documents", 24, 30, torch.float32, marks=launches.causal),
    ],
)
def test_columns_in_blocks_change_nothing(columns_of_16, form, width, width_v, dtype):
    mask = torch.rand(1, 35, generator=torch.Generator().manual_seed(2)) > 0.3
    kwargs = {"causal": "causal" in form, "key_padding_mask": mask, "eps": 0.01 if form == "epsilon" else 0.0}
    if "documents" in form:
        kwargs["cu_seqlens"] = torch.tensor([0, 1, 1, 20, 35])
    # kernels that hold all columns err by up to 2.3e-6 in float32
    tolerance = 5e-6 if dtype == torch.float32 else 1e-2
    assert_kernels_are_near_the_reference(leaves(35, width, width_v, dtype), tolerance, **kwargs)


@launches.causal
@pytest.mark.skipif(DEVICE == "cuda", reason="tiles made up here are for the interpreter")
def test_columns_in_blocks_keep_exact_pairs_at_large_inputs(columns_of_16):
    assert_kernels_are_near_the_reference(leaves(17, 20, 16, torch.float32, std=10.0), 2e-4, causal=True)


@pytest.mark.parametrize(
    ("width", "width_v", "dtype"),
    [(130, 130, torch.float32), (160, 96, torch.float16), (140, 150, torch.bfloat16), (256, 200, torch.float32)],
)
def test_heads_up_to_256_run_in_the_kernels(width, width_v, dtype):
    mask = torch.rand(1, 40, generator=torch.Generator().manual_seed(2)).to(DEVICE) > 0.3
    inputs = leaves(40, width, width_v, dtype)
    assert_kernels_err_at_most_twice_as_much_as_plain_pytorch(inputs, key_padding_mask=mask)
