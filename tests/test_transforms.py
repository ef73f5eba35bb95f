"""Transforms of torch.func over the public functions: each is right, or raises and says what to use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vjp, vmap

import medformer_kernels as mk
from medformer_kernels._dispatch import Chip, assume_chip
from medformer_kernels.tnt.weights import TNTInnerWeights
from tests import launches

H, N, D = 2, 7, 16
BACKENDS = ("torch", "triton")
pytestmark = launches.mixed


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


OMEGA = _random(6, D, seed=1)
KEYS = _random(1, H, N, D, seed=2)
MASK = (torch.arange(N) < N - 2)[None]
TAPS = _random(H, 3, seed=3)
TABLES = [_random(H, 2 * g - 1, D, seed=4 + g) for g in (1, 1, N)]
WEIGHTS = TNTInnerWeights(
    **{
        name: _random(*shape, seed=seed) / 4
        for seed, (name, shape) in enumerate({
            "norm1_weight": (D,), "norm1_bias": (D,), "qkv_weight": (3 * D, D), "qkv_bias": (3 * D,),
            "proj_weight": (D, D), "proj_bias": (D,), "norm2_weight": (D,), "norm2_bias": (D,), "fc1_weight": (16, D),
            "fc1_bias": (16,), "fc2_weight": (D, 16), "fc2_bias": (D,),
        }.items())
    }
)  # fmt: skip
KERNEL = _random(4, 1, 3, 3, 3, seed=5)
PROJECTION = _random(4, N * D, seed=6)
LINEAR = _random(D + 1, 40, seed=7)


def _inner_to_outer(x: Tensor, backend: str) -> Tensor:
    rows = {"norm_weight": WEIGHTS.norm1_weight, "norm_bias": WEIGHTS.norm1_bias}
    return mk.tnt_inner_to_outer(x, None, weight=PROJECTION, **rows, backend=backend)


def _disentangled(x: Tensor, backend: str) -> Tensor:
    tables = {"rel_k": TABLES, "rel_q": TABLES}
    return mk.disentangled_attention(x[None], KEYS, x[None], grid=(1, 1, N), **tables, backend=backend)


_BY: dict[str, dict[str, Any]] = {"torch": {"path": "im2col"}, "triton": {"backend": "triton"}}


def _embed(x: Tensor, **settings: Any) -> Tensor:
    volume = x.view(1, 1, H, N, D)
    return mk.patch_embed(volume, KERNEL, stride=2, padding=1, **settings)


FEW = {"num_landmarks": 3, "pinv_iterations": 1}  # the interpreter takes seconds for each

# (public function, of a sample (H, N, D), in PyTorch; whether forward mode and double backward work there)
FUNCTIONS: dict[str, tuple[Callable[[Tensor, str], Tensor], bool]] = {
    "performer_attention": (lambda x, b: mk.performer_attention(x[None], KEYS, x[None], OMEGA, backend=b), False),
    "performer_attention causal": (
        lambda x, b: mk.performer_attention(x[None], x[None], KEYS, OMEGA, causal=True, backend=b),
        False,
    ),
    "performer_attention eps": (
        lambda x, b: mk.performer_attention(KEYS, x[None], x[None], OMEGA, eps=1e-3, key_padding_mask=MASK, backend=b),
        False,
    ),
    "performer_prefill": (lambda x, b: mk.performer_prefill(x[None], x[None], OMEGA, backend=b).values, False),
    "nystrom_attention": (
        lambda x, b: mk.nystrom_attention(x[None], KEYS, x[None], **FEW, conv_weight=TAPS, backend=b),
        False,
    ),
    "nystrom_attention masked": (
        lambda x, b: mk.nystrom_attention(
            x[None], x[None], KEYS, **FEW, key_padding_mask=MASK, pinv_tolerance=1e-3, backend=b
        ),
        False,
    ),
    "disentangled_attention": (_disentangled, False),
    "tnt_inner_block": (lambda x, b: mk.tnt_inner_block(x, WEIGHTS, num_heads=2, backend=b), False),
    "tnt_inner_to_outer": (_inner_to_outer, True),
    "patch_embed": (lambda x, b: _embed(x, **_BY[b]), False),
    "patch_embed normed": (
        lambda x, b: _embed(x, norm="layer", windows=[(-1, 1)], **_BY[b]),
        False,
    ),
    "patch_unembed": (
        lambda x, b: mk.patch_unembed(
            x[..., :8].reshape(1, 28, 4), KERNEL, grid=(2, 2, 7), stride=2, padding=1, backend=b
        ),
        False,
    ),
}
# PyTorch alone.
NATIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "performer_attention": lambda x: mk.performer_attention(x[None], KEYS, x[None], OMEGA, feature="relu", eps=1e-3),
    "performer_step": lambda x: mk.performer_step(None, x[None, :, :1], x[None, :, 1:2], x[None, :, 2:3], OMEGA)[0],
    "nystrom_pinv": lambda x: mk.nystrom_pinv(x[:, :5, :5].abs())[0],
    "patch_embed": lambda x: _embed(x, path="conv"),
    "linear": lambda x: mk.linear(x.expand(2000, H, N, D).flatten(0, 2), LINEAR[:-1].T, LINEAR[-1]),
}


@pytest.fixture(autouse=True)
def _chip() -> Iterator[None]:
    """One that has a tile for each kernel in float32."""
    with assume_chip(Chip(arch="sm_90", units=4)):
        yield


EACH = [
    pytest.param(name, backend, id=f"{name}-{backend}", marks=launches.none if backend == "torch" else launches.some)
    for name in FUNCTIONS
    for backend in BACKENDS
]
each_function = pytest.mark.parametrize(("name", "backend"), EACH)


def _loss(name: str, backend: str) -> Callable[[Tensor], Tensor]:
    function = FUNCTIONS[name][0]
    return lambda x: function(x, backend).square().sum()


def _samples() -> Tensor:
    return _random(3, H, N, D, seed=9)


def _gradients(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """By autograd, one sample after the other."""
    leaves = [sample.clone().requires_grad_() for sample in x]
    return torch.stack([torch.autograd.grad(loss(leaf), leaf)[0] for leaf in leaves])


@each_function
def test_gradients_of_samples_by_vmap_are_those_of_a_loop(name: str, backend: str) -> None:
    loss, x = _loss(name, backend), _samples()[:2]
    expected = _gradients(loss, x)
    torch.testing.assert_close(vmap(grad(loss))(x), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(grad(lambda x: vmap(loss)(x).sum())(x), expected, rtol=1e-3, atol=1e-4)


@each_function
def test_reverse_mode_of_torch_func_is_that_of_autograd(name: str, backend: str) -> None:
    loss, x = _loss(name, backend), _samples()[:1]
    expected = _gradients(loss, x)[0]
    torch.testing.assert_close(jacrev(loss)(x[0]), expected, rtol=1e-3, atol=1e-4)
    pull = vjp(loss, x[0])[1]
    torch.testing.assert_close(pull(torch.ones(()))[0], expected, rtol=1e-3, atol=1e-4)


def _forward_modes(loss: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Callable[[], Any]]:
    def dual() -> Any:
        with forward_ad.dual_level():
            return loss(forward_ad.make_dual(x[0], x[0]))

    return {
        "jvp": lambda: jvp(loss, (x[0],), (x[0],)),
        "dual numbers": dual,
        "forward over reverse": lambda: jvp(grad(loss), (x[0],), (x[0],)),
        "jvp of vmap": lambda: jvp(vmap(loss), (x,), (x,)),
        "vmap of jvp": lambda: vmap(lambda x: jvp(loss, (x,), (x,))[1])(x),
    }


def _second_orders(loss: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Callable[[], Any]]:
    def autograd() -> Any:
        leaf = x[0].clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)

    return {"autograd": autograd, "torch.func": lambda: grad(lambda x: grad(loss)(x).square().sum())(x[0])}


ONCE = [
    pytest.param(n, b, id=f"{n}-{b}")
    for n, (_, native) in FUNCTIONS.items()
    for b in BACKENDS
    if b != "torch" or not native
]


@pytest.mark.parametrize("way", ["jvp", "dual numbers", "forward over reverse", "jvp of vmap", "vmap of jvp"])
@pytest.mark.parametrize(("name", "backend"), ONCE)
def test_forward_mode_names_the_function_and_the_way_out(name: str, backend: str, way: str) -> None:
    public = name.split()[0]
    with pytest.raises(NotImplementedError, match=rf"^{public}: forward mode .*; use \w+, or reverse mode") as raised:
        _forward_modes(_loss(name, backend), _samples()[:2])[way]()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("way", ["autograd", "torch.func"])
@pytest.mark.parametrize(("name", "backend"), [case for case in ONCE if case.values[0] != "patch_unembed"])
def test_double_backward_names_the_function_and_the_way_out(name: str, backend: str, way: str) -> None:
    public = name.split()[0]
    message = rf"^({public}|patch_embed or patch_unembed): double backward is not implemented; use \w+"
    with pytest.raises(NotImplementedError, match=message) as raised:
        _second_orders(_loss(name, backend), _samples()[:1])[way]()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_patch_unembed_is_differentiable_twice_in_its_tokens(backend: str) -> None:
    tokens = _samples()[:1, ..., :8].reshape(1, 28, 4)

    def slope(function: Callable[..., Tensor], **chosen: str) -> Tensor:
        leaf = tokens.clone().requires_grad_()
        out = function(leaf, KERNEL, grid=(2, 2, 7), stride=2, padding=1, **chosen)
        (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    torch.testing.assert_close(
        slope(mk.patch_unembed, backend=backend), slope(mk.patch_unembed_reference), rtol=1e-4, atol=1e-2
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name == "performer_attention" and torch.__version__ < "2.13",
                reason="torch.utils.checkpoint has no forward mode in PyTorch 2.11: it raises",
            ),
        )
        for name in NATIVE
    ],
)
def test_what_pytorch_follows_is_differentiable_in_forward_mode_and_twice(name: str) -> None:
    loss, x = (lambda x: NATIVE[name](x).square().mean()), _samples()[:2]
    expected = (_gradients(loss, x) * x).sum((1, 2, 3))
    torch.testing.assert_close(jvp(loss, (x[0],), (x[0],))[1], expected[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(jvp(vmap(loss), (x,), (x,))[1], expected, rtol=1e-3, atol=1e-4)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(x[0], x[0]))).tangent
    torch.testing.assert_close(tangent, expected[0], rtol=1e-3, atol=1e-4)
    curvature = jvp(grad(loss), (x[0],), (x[0],))[1]
    twice = grad(lambda y: (grad(loss)(y) * x[0]).sum())(x[0])
    torch.testing.assert_close(curvature, twice, rtol=1e-3, atol=1e-4)


def test_gradients_of_samples_for_shared_weights() -> None:
    x, kernel = _samples().view(3, 1, H, N, D), KERNEL.clone().requires_grad_()

    def loss(kernel: Tensor, x: Tensor, path: str) -> Tensor:
        return mk.patch_embed(x[None], kernel, stride=2, padding=1, path=path).square().sum()

    got = vmap(grad(loss), (None, 0, None))(KERNEL, x, "im2col")
    expected = [torch.autograd.grad(loss(kernel, sample, "im2col"), kernel)[0] for sample in x]
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_gradients_of_samples_for_shared_features_and_omegas_of_their_own() -> None:
    x, omegas = _samples(), torch.stack([OMEGA, 2 * OMEGA, -OMEGA])

    def loss(omega: Tensor, x: Tensor) -> Tensor:
        return mk.performer_attention(x[None], x[None], KEYS, omega).square().sum()

    shared = [torch.autograd.grad(loss(o, s), o)[0] for s, o in ((s, OMEGA.clone().requires_grad_()) for s in x)]
    torch.testing.assert_close(vmap(grad(loss), (None, 0))(OMEGA, x), torch.stack(shared), rtol=1e-4, atol=1e-5)
    owned = torch.stack([loss(omega, sample) for omega, sample in zip(omegas, x, strict=True)])
    torch.testing.assert_close(vmap(loss)(omegas, x), owned, rtol=1e-4, atol=1e-4)


def test_dropout_of_a_seed_is_equal_in_each_call_of_vmap() -> None:
    def attend(x: Tensor) -> Tensor:
        return mk.disentangled_attention(x[None], KEYS, KEYS, terms=("c2c",), dropout=0.5, seed=7)

    x = _samples()
    torch.testing.assert_close(vmap(attend)(x), torch.stack([attend(sample) for sample in x]))


def test_windows_of_float_volumes_have_their_gradient_under_vmap() -> None:
    def loss(x: Tensor) -> Tensor:
        return _embed(x, windows=[(-0.5, 0.5)]).square().sum()

    x = _samples()
    torch.testing.assert_close(grad(lambda x: vmap(loss)(x).sum())(x), _gradients(loss, x), rtol=1e-4, atol=1e-4)


def test_compiled_forward_mode_is_not_silent() -> None:
    compiled = torch.compile(lambda x: jvp(_loss("performer_attention", "torch"), (x,), (x,))[1], backend="aot_eager")
    with pytest.raises(Exception, match="performer_attention: forward mode"):
        compiled(_samples()[0])
