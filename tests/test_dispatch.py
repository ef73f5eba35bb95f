"""Which implementation each function takes: on a GPU, seen through fake CUDA tensors that need none, and on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from medformer_kernels import (
    TNTInnerWeights,
    _dispatch,
    disentangled_attention,
    nystrom_attention,
    patch_embed,
    patch_unembed,
    performer_attention,
    performer_prefill,
    tnt_inner_block,
    tnt_inner_to_outer,
)
from medformer_kernels._dispatch import Chip, assume_chip, resolve_backend

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(),
    reason="autograd of fake CUDA tensors ends the process in a build of PyTorch without CUDA",
)
Draw = Callable[..., Tensor]


class Operators(TorchDispatchMode):
    """Names of this package's operators that ran, each with what it was given of 'triton', 'torch', 'fused', ..."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "medformer":
            named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
            chosen = [named[key] for key in ("backend", "path") if key in named]
            self.seen.append(" ".join([func._schema.name.removeprefix("medformer::"), *chosen]))
        return func(*args, **(kwargs or {}))


def performer(draw: Draw, width: int = 64, **options: Any) -> Tensor:
    q, k, v = (draw(1, 2, 20, width) for _ in range(3))
    return performer_attention(q, k, v, draw(32, width), **options)


def prefill(draw: Draw, width: int = 64, **options: Any) -> Tensor:
    return performer_prefill(*(draw(1, 2, 20, width) for _ in range(2)), draw(32, width), **options).values


def nystrom(draw: Draw, width: int = 64, **options: Any) -> Tensor:
    return nystrom_attention(*(draw(1, 2, 20, width) for _ in range(3)), num_landmarks=4, **options)


def disentangled(draw: Draw, width: int = 64, **options: Any) -> Tensor:
    tables = [draw(2, 2 * size - 1, width) for size in (2, 2, 5)]
    q, k, v = (draw(1, 2, 20, width) for _ in range(3))
    return disentangled_attention(q, k, v, grid=(2, 2, 5), rel_k=tables, rel_q=tables, **options)


def embed(draw: Draw, **options: Any) -> Tensor:
    return patch_embed(draw(1, 1, 5, 6, 7), draw(16, 1, 3, 3, 3), stride=2, padding=1, **options)


def embed_raw(draw: Draw, **options: Any) -> Tensor:
    scan = draw(1, 1, 5, 6, 7).to(torch.int16)
    return patch_embed(scan, draw(16, 1, 3, 3, 3), stride=2, padding=1, windows=[(-160, 240)], **options)


def unembed(draw: Draw, **options: Any) -> Tensor:
    return patch_unembed(draw(1, 27, 16), draw(16, 1, 3, 3, 3), grid=(3, 3, 3), stride=2, **options)


def inner(draw: Draw, tokens: int = 8, width: int = 24, **options: Any) -> Tensor:
    weights = TNTInnerWeights(
        norm1_weight=draw(width), norm1_bias=draw(width), qkv_weight=draw(3 * width, width), qkv_bias=None,
        proj_weight=draw(width, width), proj_bias=draw(width), norm2_weight=draw(width), norm2_bias=draw(width),
        fc1_weight=draw(4 * width, width), fc1_bias=draw(4 * width), fc2_weight=draw(width, 4 * width),
        fc2_bias=draw(width),
    )  # fmt: skip
    return tnt_inner_block(draw(5, tokens, width), weights, num_heads=4, **options)


def outer(draw: Draw, width: int = 24, **options: Any) -> Tensor:
    rows = {"norm_weight": draw(width), "norm_bias": draw(width), "weight": draw(32, 4 * width), "bias": draw(32)}
    return tnt_inner_to_outer(draw(5, 4, width), draw(5, 32), **rows, **options)


# function, its options, and the operators it takes on a GPU
KERNELS: dict[str, tuple[Callable[..., Tensor], dict[str, Any], list[str]]] = {
    "performer": (performer, {}, ["performer_state triton", "performer_read triton"]),
    "performer causal": (performer, {"causal": True}, ["performer_causal triton"]),
    "performer prefill": (prefill, {}, ["performer_state triton"]),
    "nystrom": (nystrom, {}, ["nystrom_forward"]),
    "disentangled": (disentangled, {}, ["disentangled_forward triton"]),
    "patch_embed": (embed, {}, ["patch_embed fused"]),
    "patch_embed raw": (embed_raw, {}, ["patch_embed fused"]),
    "patch_unembed": (unembed, {}, ["patch_unembed fused"]),
    "tnt inner": (inner, {}, ["tnt_inner_block triton"]),
    "tnt inner to outer": (outer, {}, ["tnt_inner_to_outer"]),
}
every_function = pytest.mark.parametrize("name", KERNELS)
on_a_gpu = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:]
)


def operators(function: Callable[..., Tensor], dtype: torch.dtype, **options: Any) -> list[str]:
    """What `function` runs for CUDA tensors on an H200."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)

    with assume_chip(Chip(arch="sm_90", units=132)), FakeTensorMode(), Operators() as ran:
        out = function(draw, **options)
    assert out.is_cuda
    return ran.seen


def without_kernels(seen: list[str]) -> bool:
    return not any(name.endswith((" triton", " fused")) or " " not in name for name in seen)


@on_a_gpu
@every_function
def test_auto_takes_the_kernels_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    function, options, expected = KERNELS[name]
    assert operators(function, dtype, **options) == expected
    assert operators(function, dtype, **options, backend="triton") == expected


@every_function
def test_pytorch_runs_on_a_gpu_where_it_is_asked_for(name: str) -> None:
    function, options, _ = KERNELS[name]
    assert without_kernels(operators(function, torch.float32, **options, backend="torch"))


@every_function
def test_float64_takes_pytorch_on_a_gpu_and_triton_refuses_it(name: str) -> None:
    function, options, _ = KERNELS[name]
    assert without_kernels(operators(function, torch.float64, **options))
    with pytest.raises(ValueError, match=r"backend='triton' does not take torch\.float64; use float16"):
        operators(function, torch.float64, **options, backend="triton")


@pytest.mark.parametrize(
    ("function", "options", "dtype", "what"),
    [
        (performer, {"width": 257}, torch.float32, r"heads wider than 256 in torch.float32 on sm_90 \(here 257\)"),
        (performer, {"width": 257, "causal": True}, torch.float16, r"causal=True and heads wider than \d+"),
        (performer, {"feature": "relu"}, torch.bfloat16, "feature='relu'"),
        (prefill, {"width": 257}, torch.float32, "heads wider than 256"),
        (nystrom, {"width": 136}, torch.bfloat16, r"heads wider than 128 \(here 136\)"),
        (disentangled, {"width": 136}, torch.bfloat16, r"scores or values wider than 128 \(here 136\)"),
        (disentangled, {"width": 72}, torch.float32, r"scores or values wider than 64 \(here 72\) in float32"),
        (inner, {"tokens": 129}, torch.bfloat16, r"n above 128 \(here 129\)"),
        (inner, {"width": 512}, torch.bfloat16, "c=512, heads of 128 in torch.bfloat16: no tile of it fits on chip"),
        (outer, {"width": 512}, torch.bfloat16, "c=512 in torch.bfloat16: no tile of it fits on chip"),
    ],
)
def test_calls_without_a_kernel_take_pytorch_on_a_gpu_and_triton_refuses_them(function, options, dtype, what) -> None:
    assert without_kernels(operators(function, dtype, **options))
    with pytest.raises(ValueError, match=f"backend='triton' has no kernel for .*{what}"):
        operators(function, dtype, **options, backend="triton")


@pytest.mark.launches
@every_function
def test_auto_takes_pytorch_on_a_cpu(name: str) -> None:
    function, options, _ = KERNELS[name]
    with Operators() as ran:
        out = function(lambda *shape: torch.randn(shape), **options)
    assert out.isfinite().all()
    assert without_kernels(ran.seen)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="f: backend='triton' cannot run on cpu; move the tensors to a GPU"):
        resolve_backend("f", "triton", torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("f", "triton", torch.zeros(1)) == "triton"


def test_without_the_triton_package_auto_takes_pytorch_and_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "HAS_TRITON", False)
    assert all(without_kernels(operators(f, torch.float32, **options)) for f, options, _ in KERNELS.values())
    with pytest.raises(ValueError, match="f: backend='triton' needs the triton package"):
        resolve_backend("f", "triton", torch.zeros(1))


@every_function
def test_the_interpreter_as_it_comes_is_refused_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be wrong without a word: it holds bfloat16 as integers of 16 bits."""
    function, options, _ = KERNELS[name]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(interpreter, "_get_np_dtype", lambda dtype: torch.empty(0, dtype=torch.uint16).numpy().dtype)
    message = "^[a-z_]+: Triton's interpreter computes bfloat16 as 16-bit integers, wrongly; use float16 or float32"
    with pytest.raises(ValueError, match=message):
        function(lambda *shape: torch.randn(shape, dtype=torch.bfloat16), **options, backend="triton")


def test_a_tile_may_be_for_some_versions_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"itemsize": 2, "width": 64}
    old, new = entry | {"triton_before": "3.8"}, entry | {"triton_from": "3.8"}
    monkeypatch.setattr(_dispatch, "load_configs", lambda _: {"fwd": {"sm_90": [old, new]}})
    chip = Chip(arch="sm_90", units=132)
    for version, chosen in (((3, 6), old), ((3, 8), new), ((4, 0), new)):
        monkeypatch.setattr(_dispatch, "TRITON", version)
        assert _dispatch.tiles("any", "fwd", chip) == [chosen]


@pytest.mark.parametrize("family", ["disentangled", "nystrom", "patch_embed", "performer", "tnt"])
def test_every_version_of_triton_has_the_same_tiles_to_choose_from(family: str) -> None:
    """An entry for some versions comes with one for the others, but for kernels that a launch may do without."""

    def keys(entries: list[dict[str, Any]], version: tuple[int, ...]) -> list[tuple[Any, ...]]:
        named = ("itemsize", "width", "head", "block_r")
        return [tuple(e.get(name) for name in named) for e in entries if _dispatch.for_triton(e, version)]

    for kernel, by_arch in _dispatch.load_configs(family).items():
        for arch, entries in by_arch.items():
            if kernel not in ("paths", "pool_values_fwd"):
                assert keys(entries, (3, 6)) == keys(entries, (3, 8)), (kernel, arch)
