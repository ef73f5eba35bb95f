"""FAVOR+ attention: reference, chunked PyTorch path and Triton kernels (interpreted here, compiled on a GPU)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from medformer_kernels import (
    _products,
    default_num_features,
    orthogonal_features,
    performer_attention,
    performer_attention_reference,
    performer_features,
)
from medformer_kernels.performer import chunked, ops
from tests import launches
from tests.rule import assert_as_good_as_pytorch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
forward_backends = pytest.mark.parametrize("backend", launches.backends(launches.performer_forward))
backends = pytest.mark.parametrize("backend", launches.backends(launches.performer))


def inputs(
    batch=2, heads=2, queries=37, keys=50, width=16, width_v=24, dtype=torch.float64, std=1.0, seed=0, device="cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((queries, width), (keys, width), (keys, width_v))
    drawn = (torch.randn(batch, heads, *shape, generator=generator, dtype=torch.float64) * std for shape in shapes)
    q, k, v = (x.to(device, dtype).requires_grad_() for x in drawn)
    return q, k, v


def outputs_and_gradients(function, q, k, v, *args, **kwargs) -> list[Tensor]:
    out = function(q, k, v, *args, **kwargs)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def kernel(*args, **kwargs) -> Tensor:
    return performer_attention(*args, backend="triton", **kwargs)


def padding(batch: int, keys: int) -> Tensor:
    mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[0] = False  # a sample without any valid key
    mask[1:, 0] = True
    return mask


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returned."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.values = max(self.values, x.untyped_storage().nbytes() // x.element_size())
        return result


def brute_force(q, k, v, omega, mask, eps):
    """FAVOR+ written with loops, from the definition."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    scale = q.shape[-1] ** -0.25
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            valid = [j for j in range(k.shape[2]) if mask is None or mask[b, j]]
            if not valid:
                continue
            u_k = (k[b, h] * scale) @ omega.T
            u_q = (q[b, h] * scale) @ omega.T
            top = max(u_k[j].max() for j in valid)
            phi_k = [torch.exp(u_k[j] - (k[b, h, j] * scale).square().sum() / 2 - top) + eps for j in valid]
            for i in range(q.shape[2]):
                phi_q = torch.exp(u_q[i] - (q[b, h, i] * scale).square().sum() / 2 - u_q[i].max()) + eps
                weights = torch.stack([phi_q @ phi for phi in phi_k])
                out[b, h, i] = (weights @ v[b, h, valid]) / weights.sum()
    return out


@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("masked", [False, True])
def test_reference_is_the_definition(eps, masked):
    q, k, v = inputs(queries=5, keys=7)
    omega = orthogonal_features(20, 16, dtype=torch.float64)
    mask = padding(2, 7) if masked else None
    out = performer_attention_reference(q, k, v, omega, key_padding_mask=mask, eps=eps)
    torch.testing.assert_close(out, brute_force(q, k, v, omega, mask, eps), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("queries", [1, 63, 130])
@pytest.mark.parametrize("keys", [1, 63, 130])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("by_head", [False, True])
def test_chunked_path_matches_reference_in_float64(monkeypatch, queries, keys, eps, masked, by_head):
    monkeypatch.setattr(chunked, "_TILE_VALUES", 48 * (1 if by_head else 4) * 20)  # chunks of 20 tokens
    monkeypatch.setattr(chunked, "one_by_one", lambda *_: by_head)
    q, k, v = inputs(queries=queries, keys=keys)
    omega = orthogonal_features(48, 16, heads=2, dtype=torch.float64)
    mask = padding(2, keys) if masked else None
    expected = outputs_and_gradients(performer_attention_reference, q, k, v, omega, key_padding_mask=mask, eps=eps)
    actual = outputs_and_gradients(performer_attention, q, k, v, omega, key_padding_mask=mask, eps=eps)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_error_of_large_heads_is_at_most_twice_that_of_plain_pytorch(monkeypatch):
    """Where their products are oneDNN's."""
    q, k, v = inputs(heads=1, queries=600, keys=700, width=64, dtype=torch.float32)
    omega = orthogonal_features(64, 64)
    monkeypatch.setattr(_products, "_LEAST_OF_MANY", 1)  # however many threads
    assert chunked.one_by_one(600, 64, 64) == (_products.ONEDNN is not None)
    mask = padding(2, 700)
    plain = outputs_and_gradients(performer_attention_reference, q, k, v, omega, key_padding_mask=mask)
    out = outputs_and_gradients(performer_attention, q, k, v, omega, key_padding_mask=mask)
    exact_inputs = (x.detach().double().requires_grad_() for x in (q, k, v))
    exact = outputs_and_gradients(performer_attention_reference, *exact_inputs, omega.double(), key_padding_mask=mask)
    for a, b, c in zip(out, plain, exact, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm()


def test_gradients_match_finite_differences():
    q, k, v = inputs(batch=1, heads=2, queries=4, keys=5, width=6, width_v=3)
    omega = orthogonal_features(8, 6, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True, True]])

    def function(q, k, v):
        return performer_attention(q, k, v, omega, key_padding_mask=mask)

    def reference(q, k, v):
        return performer_attention_reference(q, k, v, omega, key_padding_mask=mask)

    assert torch.autograd.gradcheck(function, (q, k, v))
    assert torch.autograd.gradcheck(reference, (q, k, v))


@launches.performer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("queries", "keys", "features", "width", "masked", "eps"),
    [
        (1, 1, 16, 16, False, 0.0),
        (63, 130, 40, 16, True, 0.0),
        (130, 63, 72, 24, True, 0.05),
        (40, 600, 80, 32, False, 0.0),  # long enough to be cut into slices
    ],
)
def test_kernel_error_is_at_most_twice_that_of_plain_pytorch(dtype, queries, keys, features, width, masked, eps):
    mask = padding(2, keys).to(DEVICE) if masked else None
    omega = orthogonal_features(features, width, device=DEVICE)
    q, k, v = inputs(queries=queries, keys=keys, width=width, dtype=dtype, device=DEVICE)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    kwargs = {"key_padding_mask": mask, "eps": eps}
    expected = outputs_and_gradients(performer_attention_reference, *exact, omega.double(), **kwargs)
    plain = outputs_and_gradients(performer_attention_reference, q, k, v, omega.to(dtype), **kwargs)
    actual = outputs_and_gradients(performer_attention, q, k, v, omega, backend="triton", **kwargs)
    assert_as_good_as_pytorch(actual, plain, expected, ("out", "dq", "dk", "dv"))


@pytest.mark.launches(*launches.performer.args, "performer_omega_kernel")
@pytest.mark.parametrize(
    ("heads", "masked", "eps", "dtype"),
    [
        *((None, False, 0.0, dtype) for dtype in (torch.float32, torch.float16)),
        *((2, True, 0.0, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        *((None, True, 0.05, dtype) for dtype in (torch.float32, torch.float16)),
    ],
)
def test_kernel_gradient_of_omega_is_as_good_as_that_of_plain_pytorch(dtype, heads, masked, eps):
    mask = padding(2, 600)[1:].to(DEVICE) if masked else None
    omega = orthogonal_features(40, 16, heads=heads, device=DEVICE)
    q, k, v = inputs(
        batch=1, queries=40, keys=600, dtype=dtype, device=DEVICE
    )  # keys long enough to be cut into slices
    gradients = []
    for function, cast in (
        (performer_attention_reference, torch.float64),
        (performer_attention_reference, dtype),
        (kernel, None),
    ):
        leaf = omega.to(cast or torch.float32).requires_grad_()
        arguments = [x.detach().to(cast or dtype) for x in (q, k, v)]
        out = function(*arguments, leaf, key_padding_mask=mask, eps=eps)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        gradients.append(torch.autograd.grad(out, leaf, dout.to(out.device, out.dtype))[0])
    expected, plain, actual = gradients
    assert_as_good_as_pytorch([actual], [plain], [expected], ["domega"])


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("std", [1.0, 10.0])
def test_low_precision_stays_finite_at_large_inputs(backend, dtype, std):
    q, k, v = inputs(batch=1, queries=64, keys=64, width=64, width_v=64, dtype=dtype, std=std, device=DEVICE)
    omega = orthogonal_features(64, 64, device=DEVICE)
    for x in outputs_and_gradients(performer_attention, q, k, v, omega, backend=backend):
        assert x.isfinite().all()


@backends
def test_sample_without_valid_key_gives_zero_and_finite_gradients(backend):
    q, k, v = inputs(dtype=torch.float32, device=DEVICE)
    mask = torch.zeros(2, 50, dtype=torch.bool, device=DEVICE)
    mask[1, :3] = True
    for eps in (0.0, 1e-3):
        out, *gradients = outputs_and_gradients(
            performer_attention, q, k, v, orthogonal_features(32, 16, device=DEVICE),
            key_padding_mask=mask, eps=eps, backend=backend,
        )  # fmt: skip
        assert (out[0] == 0).all()
        assert (out[1] != 0).all()
        assert all(x.isfinite().all() and (x[0] == 0).all() for x in gradients)


@forward_backends
def test_padding_never_changes_the_rest_whatever_it_holds(backend):
    q, k, v = inputs(batch=2, keys=40, dtype=torch.float32, device=DEVICE)
    omega = orthogonal_features(32, 16, device=DEVICE)
    mask = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
    mask[:, 29:] = False
    short = performer_attention(q, k[:, :, :29], v[:, :, :29], omega, backend=backend)
    k, v = k.detach().clone(), v.detach().clone()
    k[:, :, 29:], v[:, :, 29:] = math.nan, math.inf
    long = performer_attention(q, k, v, omega, key_padding_mask=mask, backend=backend)
    torch.testing.assert_close(long, short, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    features=st.integers(1, 50),
    pad=st.integers(0, 10),
)
def test_laws_of_attention_hold(seed, batch, queries, keys, features, pad):
    """Convexity, key order, padding, and independence of the other samples."""
    q, k, v = (x.detach() for x in inputs(batch=batch, queries=queries, keys=keys, seed=seed))
    omega = orthogonal_features(features, 16, seed=seed, dtype=torch.float64)
    out = performer_attention(q, k, v, omega)
    assert (out <= v.amax(2, keepdim=True) + 1e-9).all()
    assert (out >= v.amin(2, keepdim=True) - 1e-9).all()
    order = torch.randperm(keys, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(performer_attention(q, k[:, :, order], v[:, :, order], omega), out)
    mask = torch.arange(keys + pad).expand(batch, -1) < keys
    k_pad, v_pad = (torch.nn.functional.pad(x, (0, 0, 0, pad), value=7.0) for x in (k, v))
    torch.testing.assert_close(performer_attention(q, k_pad, v_pad, omega, key_padding_mask=mask), out)
    alone = performer_attention(q[:1], k[:1], v[:1], omega)
    torch.testing.assert_close(out[:1], alone)


@forward_backends
def test_nan_stays_in_its_own_sample(backend):
    q, k, v = (x.detach() for x in inputs(dtype=torch.float32, device=DEVICE))
    k[0, 0, 3, 2] = math.nan
    out = performer_attention(q, k, v, orthogonal_features(32, 16, device=DEVICE), backend=backend)
    assert out[0, 0].isnan().all()
    assert out[1].isfinite().all()


@forward_backends
def test_strided_inputs_need_no_copy_and_change_no_bit(backend):
    qkv = torch.randn(2, 33, 3, 4, 16, device=DEVICE, generator=None)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    omega = orthogonal_features(32, 16, device=DEVICE)
    strided = performer_attention(q, k, v, omega, backend=backend)
    packed = performer_attention(q.contiguous(), k.contiguous(), v.contiguous(), omega, backend=backend)
    assert torch.equal(strided, packed)
    transposed = q.transpose(-1, -2).contiguous().transpose(-1, -2)  # the width is not the fastest axis
    torch.testing.assert_close(performer_attention(transposed, k, v, omega, backend=backend), packed)


@backends
def test_equal_inputs_give_equal_bits(backend):
    q, k, v = inputs(keys=600, dtype=torch.float32, device=DEVICE)
    omega = orthogonal_features(32, 16, device=DEVICE)
    first, second = (outputs_and_gradients(performer_attention, q, k, v, omega, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@backends
def test_features_never_reach_memory(backend, monkeypatch):
    """No tensor of N x M values appears, forward or backward, on either backend."""
    monkeypatch.setattr(chunked, "_TILE_VALUES", 64 * 16)
    q, k, v = inputs(batch=1, heads=1, queries=512, keys=512, width=16, width_v=16, dtype=torch.float32, device=DEVICE)
    omega = orthogonal_features(64, 16, device=DEVICE)
    with Largest() as largest:
        outputs_and_gradients(performer_attention, q, k, v, omega, backend=backend)
    assert 512 * 16 <= largest.values < 512 * 64 / 2


@pytest.mark.parametrize(
    ("backend", "causal", "width"),
    [
        *itertools.product(["torch"], [False, True], [54, 66, 72]),
        pytest.param("triton", False, 66, marks=launches.performer),
        pytest.param("triton", True, 54, marks=launches.causal),
    ],
)
def test_heads_of_rotary_widths_are_never_padded_in_memory(backend, causal, width):
    tokens = 130
    shape = {"queries": tokens, "keys": tokens, "width": width, "width_v": width, "dtype": torch.float32}
    q, k, v = inputs(batch=1, heads=1, device=DEVICE, std=0.5, **shape)
    omega = orthogonal_features(16, width, device=DEVICE)
    with Largest() as largest:
        out = outputs_and_gradients(performer_attention, q, k, v, omega, causal=causal, backend=backend)
    assert tokens * width <= largest.values < tokens * (64 if width < 64 else 128)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = outputs_and_gradients(performer_attention_reference, *exact, omega.double(), causal=causal)
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@launches.performer
def test_unwritten_memory_is_never_read():
    """Deterministic mode fills torch.empty with NaN: an output that a kernel forgets would show."""
    q, k, v = inputs(keys=130, dtype=torch.float32, device=DEVICE)
    omega = orthogonal_features(40, 16, device=DEVICE)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for backend in ("torch", "triton"):
            results = outputs_and_gradients(performer_attention, q, k, v, omega, eps=1e-3, backend=backend)
            assert all(x.isfinite().all() for x in results)
    finally:
        torch.use_deterministic_algorithms(False)


def test_operators_pass_opcheck():
    q, k, v = inputs(queries=9, keys=11, dtype=torch.float32)
    omega = orthogonal_features(16, 16)
    mask = padding(2, 11)
    torch.library.opcheck(ops.performer_state, (k, v, omega, mask, True, "torch"))
    values, lse, _ = (x.detach() for x in ops.performer_state(k, v, omega, None, False, "torch"))
    values.requires_grad_()
    lse.requires_grad_()
    torch.library.opcheck(ops.performer_read, (q, omega, values, lse, None, None, "torch"))
    extra = (values.detach()[:, :, 0].clone().requires_grad_(), lse.detach()[:, :, 0].clone().requires_grad_())
    torch.library.opcheck(ops.performer_read, (q, omega, values, lse, *extra, "torch"))


def test_compiles_to_one_graph_with_gradients():
    omega = orthogonal_features(32, 16)
    compiled = torch.compile(performer_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for queries in (8, 21):
        q, k, v = inputs(queries=queries, keys=queries, dtype=torch.float32)
        eager = outputs_and_gradients(performer_attention, q, k, v, omega)
        for a, b in zip(outputs_and_gradients(compiled, q, k, v, omega), eager, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_inputs():
    q, k, v = inputs(dtype=torch.float32)
    omega = orthogonal_features(64, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = performer_attention(q, k, v, omega)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert q.grad is not None
    assert q.grad.dtype == torch.float32
    # Only q, k and v are rounded: what happens inside is that of bfloat16 inputs, to the bit.
    assert torch.equal(out, performer_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), omega))


def test_epsilon_reproduces_performer_pytorch():
    fast_attention = pytest.importorskip("performer_pytorch", reason="pip install performer-pytorch").FastAttention
    q, k, v = inputs(width=32, width_v=32, dtype=torch.float32)
    peer = fast_attention(32, nb_features=64, causal=False)
    peer.projection_matrix.copy_(orthogonal_features(64, 32))
    expected = outputs_and_gradients(peer, q, k, v)
    actual = outputs_and_gradients(performer_attention, q, k, v, peer.projection_matrix, eps=1e-4)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_more_features_come_closer_to_softmax():
    """FAVOR+ is an unbiased estimator: at small inputs its error falls with M."""
    q, k, v = inputs(batch=1, heads=1, queries=64, keys=64, width=16, std=0.5)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    errors = []
    for features in (16, 256, 4096):
        draws = [orthogonal_features(features, 16, seed=seed, dtype=torch.float64) for seed in range(4)]
        errors.append(sum(float((performer_attention(q, k, v, o) - exact).detach().norm()) for o in draws))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_orthogonal_features_are_orthogonal_by_blocks_with_chi_lengths():
    omega = orthogonal_features(600, 16, seed=3, dtype=torch.float64)
    block = omega[16:32] / omega[16:32].norm(dim=1, keepdim=True)
    torch.testing.assert_close(block @ block.T, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-5)
    assert abs(omega.norm(dim=1).square().mean() - 16) < 1  # E chi^2 = D
    assert torch.equal(omega, orthogonal_features(600, 16, seed=3, dtype=torch.float64))
    assert not torch.equal(omega, orthogonal_features(600, 16, seed=4, dtype=torch.float64))
    per_head = orthogonal_features(20, 16, heads=3)
    assert per_head.shape == (3, 20, 16)
    assert not torch.equal(per_head[0], per_head[1])


def test_default_number_of_features_fills_tiles():
    assert [default_num_features(width) for width in (1, 16, 64, 128)] == [64, 64, 256, 640]


def test_log_features_give_the_attention_row():
    q, k, v = inputs(queries=3, keys=9)
    omega = orthogonal_features(32, 16, dtype=torch.float64)
    log_q, log_k = performer_features(q, omega), performer_features(k, omega)
    row = torch.softmax(torch.logsumexp(log_q[:, :, :, None] + log_k[:, :, None], -1), -1)
    torch.testing.assert_close(row @ v, performer_attention(q, k, v, omega))


def test_double_backward_is_refused_clearly():
    q, k, v = inputs(dtype=torch.float64)
    out = performer_attention(q, k, v, orthogonal_features(8, 16, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="performer_attention: double backward is not implemented"):
        gradient.sum().backward()


OMEGA = orthogonal_features(8, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"q has shape \(2, 3, 4\)"),
        ({"q": torch.zeros(2, 2, 3, 0), "k": torch.zeros(2, 2, 5, 0)}, r"q has .*; its width must be at least 1"),
        ({"k": torch.zeros(2, 2, 5, 8)}, r"k has shape \(2, 2, 5, 8\)"),
        ({"v": torch.zeros(2, 2, 6, 24)}, r"v has shape \(2, 2, 6, 24\)"),
        ({"v": torch.zeros(2, 2, 5, 24, dtype=torch.float16)}, "v is torch.float16 on cpu but q is torch.float32"),
        ({"q": torch.zeros(2, 2, 3, 16, dtype=torch.int32)}, "q is torch.int32; it must be a floating-point"),
        ({"k": torch.zeros(2, 2, 5, 16, device="meta")}, "k is torch.float32 on meta but q is torch.float32 on cpu"),
        ({"omega": torch.zeros(8, 16, dtype=torch.int64)}, "omega is torch.int64; it must be a floating-point tensor"),
        ({"omega": torch.zeros(0, 16)}, "omega has M=0 features"),
        ({"omega": torch.zeros(8, 12)}, r"omega has shape \(8, 12\); it must be \(M, 16\)"),
        ({"omega": torch.zeros(3, 8, 16)}, r"omega has shape \(3, 8, 16\)"),
        ({"omega": torch.zeros(8, 16, device="meta")}, "omega is on meta but q is on cpu"),
        ({"key_padding_mask": torch.ones(2, 5)}, "key_padding_mask is torch.float32; it must be bool"),
        ({"key_padding_mask": torch.ones(2, 6, dtype=torch.bool)}, r"key_padding_mask has shape \(2, 6\)"),
        (
            {"key_padding_mask": torch.ones(2, 5, dtype=torch.bool, device="meta")},
            "key_padding_mask is on meta but q is on cpu; move it there",
        ),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens needs as many queries as keys, not 3 and 5"),
        ({"eps": math.nan}, "eps=nan must be at least 0"),
        ({"eps": -1.0}, "eps=-1.0 must be at least 0"),
        ({"backend": "cuda"}, "backend='cuda' must be 'auto', 'triton' or 'torch'"),
    ],
)
def test_bad_arguments_are_named_in_one_line(change, message):
    arguments = {
        "q": torch.zeros(2, 2, 3, 16),
        "k": torch.zeros(2, 2, 5, 16),
        "v": torch.zeros(2, 2, 5, 24),
        "omega": OMEGA,
    }
    with pytest.raises(ValueError, match=message) as error:
        performer_attention(**(arguments | change))
    assert str(error.value).startswith("performer_attention: ")
    assert "\n" not in str(error.value)


@launches.none
def test_float64_has_no_kernel_and_says_so():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"backend='triton' does not take torch.float64"):
        performer_attention(q, k, v, orthogonal_features(8, 16, dtype=torch.float64), backend="triton")


@launches.none
def test_heads_too_wide_for_the_kernels_are_refused_there_and_run_elsewhere():
    q, k, v = inputs(queries=3, keys=3, width=257, width_v=257, dtype=torch.float32)
    omega = orthogonal_features(32, 257)
    for causal in (False, True):
        message = r"no kernel for (causal=True and )?heads wider than \d+ in torch.float32 on \w+ \(here 257\)"
        with pytest.raises(ValueError, match=message + "; use 'auto' or 'torch'"):
            performer_attention(q, k, v, omega, causal=causal, backend="triton")
        assert performer_attention(q, k, v, omega, causal=causal).shape == q.shape
