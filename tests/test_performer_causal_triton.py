"""The Triton kernels of causal FAVOR+, interpreted here and compiled where there is a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from medformer_kernels import orthogonal_features, performer_attention, performer_attention_reference
from medformer_kernels._dispatch import Chip
from medformer_kernels.performer import ops
from tests import launches
from tests.rule import assert_as_good_as_pytorch

pytestmark = launches.causal
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("out", "dq", "dk", "dv", "domega")


def inputs(
    tokens=50, batch=1, heads=1, kv_heads=None, width=16, width_v=16, dtype=torch.float32, std=1.0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    kv_heads = kv_heads or heads
    shapes = ((heads, tokens, width), (kv_heads, tokens, width), (kv_heads, tokens, width_v))
    drawn = (torch.randn(batch, *shape, generator=generator) * std for shape in shapes)
    return [x.to(DEVICE, dtype).requires_grad_() for x in drawn]


def omega_for(width=16, features=40, heads=None, trained=True) -> Tensor:
    return orthogonal_features(features, width, heads=heads, device=DEVICE).requires_grad_(trained)


def outputs_and_gradients(function, *leaves, **kwargs) -> list[Tensor]:
    out = function(*leaves, causal=True, **kwargs)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x.requires_grad], dout)]


def kernel(*leaves, **kwargs) -> Tensor:
    return performer_attention(*leaves, backend="triton", **kwargs)


def exact(leaves: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]


def holes(tokens: int, batch: int = 1) -> Tensor:
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[:, :3] = False
    return mask.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "width", "width_v", "masked", "ends"),
    [
        (1, 1, 1, 16, 16, False, None),
        (70, 2, 1, 16, 24, True, None),
        (300, 1, 1, 18, 16, False, None),  # cut into slices; a width that is no power of two
        (300, 1, 1, 16, 16, True, [0, 30, 30, 37, 300]),  # documents, one of them cut
    ],
)
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype, tokens, heads, kv_heads, width, width_v, masked, ends):
    leaves = [
        *inputs(tokens, heads=heads, kv_heads=kv_heads, width=width, width_v=width_v, dtype=dtype),
        omega_for(width, heads=heads),
    ]
    kwargs = {
        "key_padding_mask": holes(tokens) if masked else None,
        "cu_seqlens": None if ends is None else torch.tensor(ends, dtype=torch.int32, device=DEVICE),
    }
    expected = outputs_and_gradients(performer_attention_reference, *exact(leaves), **kwargs)
    low = [*leaves[:3], leaves[3].detach().to(dtype).requires_grad_()]
    plain = outputs_and_gradients(performer_attention_reference, *low, **kwargs)
    actual = outputs_and_gradients(kernel, *leaves, **kwargs)
    assert_as_good_as_pytorch(actual, plain, expected, NAMES)


@pytest.mark.parametrize("opposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_large_inputs_stay_right(dtype, opposed):
    """Std 10, and keys opposed to their queries: products of features underflow, and pairs are summed one by one."""
    q, k, v = inputs(40, dtype=dtype, std=10.0)
    k = (-q.detach()).requires_grad_() if opposed else k
    leaves = [q, k, v, omega_for()]
    expected = outputs_and_gradients(performer_attention_reference, *exact(leaves))
    actual = outputs_and_gradients(kernel, *leaves)
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert a.isfinite().all(), name
        assert (a - b).norm() <= (2e-4 if dtype == torch.float32 else 1e-2) * b.norm(), name


@launches.causal_forward
def test_a_later_key_changes_no_earlier_output():
    """Not even in the same chunk, and so large that everything before it underflows beside it."""
    q, k, v = (x.detach() for x in inputs(40))
    omega = omega_for(trained=False)
    out = kernel(q, k, v, omega, causal=True)
    k, v = k.clone(), v.clone()
    k[:, :, 20] = 30 * omega[3] / omega[3].norm()
    v[:, :, 20] = 1e6
    changed = kernel(q, k, v, omega, causal=True)
    torch.testing.assert_close(changed[:, :, :20], out[:, :, :20], rtol=0, atol=0)
    assert (changed[:, :, 20:] != out[:, :, 20:]).any()


def test_queries_before_the_first_key_give_zero_and_padding_may_hold_anything():
    q, k, v = inputs(40, batch=2)
    mask = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
    mask[0, :7], mask[1] = False, False
    with torch.no_grad():
        k[0, :, :7], v[1] = math.nan, math.inf
    out, *gradients = outputs_and_gradients(kernel, q, k, v, omega_for(), key_padding_mask=mask)
    assert (out[0, :, :7] == 0).all()
    assert (out[0, :, 7:] != 0).all()
    assert (out[1] == 0).all()
    assert all(x.isfinite().all() for x in gradients)
    assert all((x[1] == 0).all() for x in gradients[:3])


@launches.causal_forward
def test_nan_stays_in_its_own_sample_and_after_its_own_token():
    q, k, v = (x.detach() for x in inputs(40, batch=2))
    omega = omega_for(trained=False)
    clean = kernel(q, k, v, omega, causal=True)
    k[0, 0, 3, 2] = math.nan
    out = kernel(q, k, v, omega, causal=True)
    assert torch.equal(out[1], clean[1])
    assert out[0, 0, 3:].isnan().all()


def test_equal_inputs_give_equal_bits_and_unwritten_memory_is_never_read():
    """Deterministic mode fills torch.empty with NaN: an output that a kernel forgets would show."""
    leaves = [*inputs(150, heads=2, kv_heads=1, width=8, width_v=8), omega_for(8, 16)]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = (outputs_and_gradients(kernel, *leaves) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, second, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


def test_operators_pass_opcheck_on_strided_inputs():
    q, k, v = torch.randn(1, 20, 3, 2, 16, device=DEVICE).permute(2, 0, 3, 1, 4)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (q, k, v, omega_for(trained=False), None, [0, 20], "triton")
    torch.library.opcheck(ops.performer_causal, arguments, test_utils=utils)
    made = [x.detach() for x in ops.performer_causal(*arguments)]
    saved = [x.detach() if isinstance(x, Tensor) else x for x in arguments[:-1]]
    torch.library.opcheck(
        ops.performer_causal_backward, (*saved, *made, torch.ones_like(made[0]), True, "triton"), test_utils=utils
    )


@launches.none
@pytest.mark.parametrize("kernel", ["causal_fwd", "causal_dq", "causal_dkv"])
def test_one_long_sequence_fills_the_chip(kernel):
    from medformer_kernels.performer import causal_fused

    plan = causal_fused.launch_plan(
        kernel, chip=Chip(arch="sm_90", units=132), num_features=256, width=64, itemsize=2, tokens=262_144,
        batch_heads=8,
    )  # fmt: skip
    assert plan.slices * 8 >= 132
    assert plan.slices * plan.slice_length >= 262_144 > (plan.slices - 1) * plan.slice_length
