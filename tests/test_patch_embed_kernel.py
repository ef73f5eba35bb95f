"""Patch embedding kernels: reference, CPU paths and Triton kernels (interpreted here, compiled on a GPU)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from medformer_kernels import (
    Window,
    hu_window,
    patch_embed,
    patch_embed_choice,
    patch_embed_reference,
    patch_unembed,
    patch_unembed_reference,
    patch_voxels,
    token_centres_mm,
    token_coverage,
    token_grid,
    z_score,
)
from medformer_kernels.patch_embed import choice, ops, paths
from medformer_kernels.patch_embed.geometry import resolve
from tests import launches
from tests.rule import assert_as_good_as_pytorch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
forward_backends = pytest.mark.parametrize("backend", launches.backends(launches.embed_forward))
backends = pytest.mark.parametrize("backend", launches.backends(launches.embed))
TORCH_PATHS = ("conv", "conv_channels_last", "im2col")
# kernel, stride, dilation
LATTICE = [(3, 2, 1), (2, 2, 1), (1, 3, 1), (4, 1, 1), (2, 1, 2), (2, 3, 2), (3, 4, 1)]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(DEVICE, dtype).requires_grad_(grad)


def scan_of(*shape: int, seed: int = 0, dtype: torch.dtype = torch.int16) -> Tensor:
    low = -1100 if dtype == torch.int16 else 0
    high = 2000 if dtype == torch.int16 else 255
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def arguments(
    size=(4, 5, 6), *, channels=2, width=5, batch=2, kernel: Any = 3, stride: Any = 2, norm: str | None = "layer",
    position="axes",
    prefix=2, raw=False, dtype=torch.float64, seed=0, x_grad=True, **rest,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `patch_embed` with every tensor that can have a gradient."""
    dims = len(size)
    kernel = (kernel,) * dims if isinstance(kernel, int) else kernel
    windows = [(-160.0, 240.0), z_score(0, 500), Window(1e-3, 0.0)] if raw else None
    cin = channels * (len(windows) if windows else 1)
    weight = (draw(width, cin, *kernel, seed=seed + 1) * (cin * math.prod(kernel)) ** -0.5).detach().to(dtype)
    tables: Any = {"axes": [draw(4, width, seed=seed + 6 + a, dtype=dtype) for a in range(dims)], "none": None}
    tables["full"] = draw(*(3,) * dims, width, seed=seed + 6, dtype=dtype)
    return {
        "x": scan_of(batch, channels, *size, seed=seed)
        if raw
        else draw(batch, channels, *size, seed=seed, dtype=dtype, grad=x_grad),
        "weight": weight.requires_grad_(),
        "bias": draw(width, seed=seed + 2, dtype=dtype),
        "stride": stride,
        "norm": norm,
        "norm_weight": draw(width, seed=seed + 3, dtype=dtype) if norm else None,
        "norm_bias": draw(width, seed=seed + 4, dtype=dtype) if norm else None,
        "position": tables[position],
        "prefix": draw(prefix, width, seed=seed + 5, dtype=dtype) if prefix else None,
        "windows": windows,
        "slope": 1.25 if raw else 1.0,
        "intercept": -30.0 if raw else 0.0,
        **rest,
    }


def changed(given: dict[str, Any], **more: Any) -> dict[str, Any]:
    return given | more


def leaves(given: dict[str, Any]) -> dict[str, Tensor]:
    """Every argument with a gradient, by name."""
    flat = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    if isinstance(given.get("position"), list):
        flat |= {f"position{axis}": table for axis, table in enumerate(given["position"])}
    return {name: value for name, value in flat.items() if value.requires_grad}


def outputs_and_gradients(function, given: dict[str, Any], **more: Any) -> dict[str, Tensor]:
    out = function(**given, **more)
    generator = torch.Generator().manual_seed(99)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
    named = leaves(given)
    gradients = torch.autograd.grad(out, list(named.values()), dout)
    return {"out": out.detach(), **{f"d{name}": g for name, g in zip(named, gradients, strict=True)}}


def in_dtype(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def convert(value):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().to(dtype).requires_grad_(value.requires_grad)
        return [convert(table) for table in value] if isinstance(value, list) else value

    return {name: value if name == "windows" else convert(value) for name, value in given.items()}


class Largest(TorchDispatchMode):
    """The largest tensor, in bytes, that any operation returned."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.size = max(self.size, x.untyped_storage().nbytes())
        return result


def test_reference_is_the_definition():
    """Tokens written with loops: window, pad, multiply, normalise, add the position."""
    given = arguments((5, 4, 6), kernel=(3, 2, 3), stride=(2, 1, 2), padding=1, raw=True, position="none", prefix=0)
    tokens = patch_embed_reference(**given)
    grid = token_grid((5, 4, 6), (3, 2, 3), stride=(2, 1, 2), padding=1)
    hu = given["x"].double() * 1.25 - 30.0
    channels = [(hu + 160) / 400, hu / 500, hu / 1000]
    channels[0] = channels[0].clamp(0, 1)
    volume = torch.stack(channels, 2).flatten(1, 2)
    for n in (0, 1, 7, math.prod(grid) - 1):
        corner = [
            i * s - 1
            for i, s in zip((n // (grid[1] * grid[2]), n // grid[2] % grid[1], n % grid[2]), (2, 1, 2), strict=True)
        ]
        y = given["bias"].detach().clone()
        for dz in range(3):
            for dy in range(2):
                for dx in range(3):
                    z, y_, x = corner[0] + dz, corner[1] + dy, corner[2] + dx
                    inside = 0 <= z < 5 and 0 <= y_ < 4 and 0 <= x < 6
                    voxel = volume[1, :, z, y_, x] if inside else torch.zeros(6, dtype=torch.float64, device=DEVICE)
                    y = y + given["weight"][:, :, dz, dy, dx] @ voxel
        y = (y - y.mean()) / (y.var(correction=0) + 1e-6).sqrt()
        torch.testing.assert_close(tokens[1, n], y * given["norm_weight"] + given["norm_bias"])


@pytest.mark.parametrize("path", [*TORCH_PATHS, None])
@pytest.mark.parametrize("size", [(4, 5, 7), (9, 13)], ids=["3d", "2d"])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), LATTICE)
def test_torch_paths_match_reference_in_float64(monkeypatch, path, size, kernel, stride, dilation):
    monkeypatch.setattr(paths, "_SLAB_BYTES", dict.fromkeys(paths.PATHS, 8 * 40 * 60))  # slabs of a few rows
    for mode, padding, norm, raw, position in (
        ("zeros", 0, "layer", False, "axes"),
        ("zeros", 2, None, True, "full"),
        ("zeros", "cover", "rms", False, "none"),
        ("replicate", 1, "rms", True, "axes"),
        ("reflect", 2, "layer", False, "full"),
    ):
        given = arguments(
            size, batch=1, kernel=kernel, stride=stride, dilation=dilation, padding=padding, padding_mode=mode,
            norm=norm, raw=raw, position=position, prefix=2 if norm else 0,
        )  # fmt: skip
        expected = outputs_and_gradients(patch_embed_reference, given)
        actual = outputs_and_gradients(patch_embed, given, path=path)
        for name, value in expected.items():
            assert torch.allclose(actual[name], value, rtol=1e-9, atol=1e-9), (mode, name)


def test_matches_conv3d_and_layer_norm_modules():
    conv = torch.nn.Conv3d(2, 6, (3, 5, 2), (2, 3, 1), (1, 2, 0), dtype=torch.float64)
    norm = torch.nn.LayerNorm(6, eps=1e-6, dtype=torch.float64)
    x = torch.randn(2, 2, 7, 11, 5, dtype=torch.float64)
    tokens = patch_embed(
        x, conv.weight, conv.bias, stride=(2, 3, 1), padding=(1, 2, 0), norm="layer", norm_weight=norm.weight,
        norm_bias=norm.bias,
    )  # fmt: skip
    torch.testing.assert_close(tokens, norm(conv(x).flatten(2).transpose(1, 2)))


def test_gradients_match_finite_differences():
    given = arguments((3, 4, 3), channels=1, width=3, batch=1, kernel=2, stride=1, padding=1, prefix=1)
    names, tensors = zip(*leaves(given).items(), strict=True)

    def function(*values):
        replaced: dict[str, Any] = dict(zip(names, values, strict=True))
        tables = [replaced.pop(f"position{axis}") for axis in range(3)]
        return patch_embed(**changed(given, **replaced, position=tables))

    assert torch.autograd.gradcheck(function, tensors)


KERNEL_CASES = {
    "overlap": {"padding": 1, "batch": 1, "size": (3, 5, 4)},
    "strip": {"kernel": (1, 2, 5), "stride": (1, 2, 3), "padding": [(0, 0), (0, 1), (2, 1)], "norm": None},
    "dilated-replicate": {
        "kernel": 2,
        "dilation": 2,
        "stride": 2,
        "padding": 1,
        "padding_mode": "replicate",
        "batch": 1,
    },
    "reflect-2d": {"size": (9, 13), "padding": 2, "padding_mode": "reflect", "norm": "rms", "position": "full"},
    "raw": {"raw": True, "padding": 1, "prefix": 0},
    "raw-unpadded-2d": {"raw": True, "size": (9, 13), "kernel": 4, "stride": 3, "norm": None, "position": "none"},
    "wide": {"channels": 16, "width": 20, "size": (3, 4, 5), "kernel": 2, "batch": 1},
    "two-pass-norm": {"width": 300, "size": (3, 4, 5), "kernel": 2, "position": "none", "batch": 1},
    "one-voxel": {"size": (1, 1, 1), "kernel": 1, "stride": 1},
    "primes": {"size": (5, 7, 3), "kernel": (3, 3, 2), "stride": (3, 2, 1), "batch": 3, "width": 17},
}


@launches.embed
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", list(KERNEL_CASES))
def test_kernel_error_is_at_most_twice_that_of_plain_pytorch(case, dtype):
    given = in_dtype(arguments(**KERNEL_CASES[case]), dtype)
    assert_kernels_keep_the_rule(patch_embed, patch_embed_reference, given)


def assert_kernels_keep_the_rule(function, reference, given: dict[str, Any]) -> None:
    expected = outputs_and_gradients(reference, in_dtype(given, torch.float64))
    plain = outputs_and_gradients(reference, given)
    actual = outputs_and_gradients(function, given, backend="triton")
    assert_as_good_as_pytorch(actual.values(), plain.values(), expected.values(), expected)


@launches.unembed
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("grid", "stride"), [((1, 1, 1), 1), ((2, 3, 1), 2), ((3, 5), 3)], ids=str)
def test_unembed_error_is_at_most_twice_that_of_plain_pytorch(grid, stride, dtype):
    kernel = (3, 2, 3)[-len(grid) :]
    given = {
        "tokens": draw(2, math.prod(grid), 5, seed=0, dtype=dtype),
        "weight": draw(5, 3, *kernel, seed=1, dtype=dtype),
        "bias": draw(3, seed=2, dtype=dtype),
        "grid": grid,
        "stride": stride,
        "padding": [(0, 1), (0, 0), (1, 1)][-len(grid) :],
    }
    assert_kernels_keep_the_rule(patch_unembed, patch_unembed_reference, given)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.uint8], ids=lambda d: str(d)[6:])
@forward_backends
def test_raw_scan_equals_explicit_windowing(backend, dtype):
    scan = scan_of(1, 1, 5, 6, 7, dtype=dtype)
    weight = draw(8, 2, 3, 3, 3, seed=1, dtype=torch.float32, grad=False)
    hu = scan.float() * 0.5 - 20
    windowed = torch.cat([((hu + 160) / 400).clamp(0, 1), ((hu - 40) / 90).clamp(-2, 2)], 1)
    expected = patch_embed(windowed, weight, stride=2, padding=1, backend="torch")
    windows = [hu_window(-160, 240), z_score(40, 90, clip=2)]
    tokens = patch_embed(scan, weight, stride=2, padding=1, windows=windows, slope=0.5, intercept=-20, backend=backend)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", TORCH_PATHS)
def test_float_copy_of_a_scan_never_exists(monkeypatch, path):
    """Forward and backward, the largest tensor is the tokens' own."""
    monkeypatch.setattr(paths, "_SLAB_BYTES", dict.fromkeys(paths.PATHS, 1 << 16))
    scan = scan_of(1, 1, 64, 48, 48)
    weight = draw(4, 2, 3, 3, 3, seed=1, dtype=torch.float32)
    windows = [hu_window(-160, 240), hu_window(0, 80)]
    with Largest() as largest:
        patch_embed(scan, weight, stride=4, padding=1, windows=windows, path=path).sum().backward()
    assert largest.size < scan.numel() * 2


def test_windows_of_a_float_volume_have_their_gradient():
    given = arguments((5, 4, 6), channels=1, norm=None, prefix=0, position="none")
    given |= {"windows": [hu_window(-1, 1)], "slope": 2.0, "intercept": 0.1}
    expected = outputs_and_gradients(patch_embed_reference, given)
    actual = outputs_and_gradients(patch_embed, given)
    torch.testing.assert_close(actual["dx"], expected["dx"])
    assert (actual["dx"] == 0).any()


@pytest.mark.parametrize("backend", launches.backends(launches.unembed))
def test_unembed_matches_reference(backend):
    dtype, tolerance = (torch.float64, 1e-9) if backend == "torch" else (torch.float32, 1e-4)
    for size, kernel, stride, padding, dilation in (
        ((4, 2, 5), 3, 2, 1, 1),
        ((3, 6, 4), (1, 2, 3), (2, 3, 1), [(0, 1), (0, 0), (2, 1)], 1),
        ((9, 8), 2, 2, 0, 1),
        ((7, 9), 2, 3, 1, 2),
        ((4, 5, 3), 1, 2, 0, 1),
    ):
        dims = len(size)
        shape = (kernel,) * dims if isinstance(kernel, int) else kernel
        geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        grid = token_grid(size, kernel, **geometry)
        given = {
            "tokens": draw(2, math.prod(grid), 5, seed=0, dtype=dtype),
            "weight": draw(5, 3, *shape, seed=1, dtype=dtype),
            "bias": draw(3, seed=2, dtype=dtype),
            "grid": grid,
            "size": size,
            **geometry,
        }
        expected = outputs_and_gradients(patch_unembed_reference, given)
        actual = outputs_and_gradients(patch_unembed, given, backend=backend)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance)


def test_unembed_is_the_transposed_convolution_of_torch():
    conv = torch.nn.ConvTranspose3d(4, 2, 3, 2, 1, 1, dtype=torch.float64)
    volume = torch.randn(2, 4, 3, 2, 5, dtype=torch.float64)
    out = patch_unembed(
        volume.flatten(2).transpose(1, 2), conv.weight, conv.bias, grid=(3, 2, 5), size=(6, 4, 10), stride=2, padding=1
    )
    torch.testing.assert_close(out, conv(volume))


def test_unembed_without_a_size_gives_the_smallest_volume():
    tokens = draw(1, 2 * 3 * 4, 5, seed=0, grad=False)
    weight = draw(5, 1, 3, 3, 3, seed=1, grad=False)
    out = patch_unembed(tokens, weight, grid=(2, 3, 4), stride=2, padding=1)
    assert out.shape == (1, 1, 3, 5, 7)
    assert patch_embed(out, weight, stride=2, padding=1).shape == tokens.shape


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dims=st.integers(2, 3))
def test_embedding_and_unembedding_are_adjoint(data, dims):
    """<A x, t> = <x, A^T t> whatever the kernel, stride, padding, dilation and size."""
    each = st.lists(st.integers(1, 4), min_size=dims, max_size=dims)
    kernel, stride = data.draw(each), data.draw(each)
    dilation = data.draw(st.lists(st.integers(1, 2), min_size=dims, max_size=dims))
    padding = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=dims, max_size=dims))
    extra = data.draw(st.lists(st.integers(0, 5), min_size=dims, max_size=dims))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [max(1, r - sum(p)) + e for r, p, e in zip(reach, padding, extra, strict=True)]
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    grid = token_grid(size, kernel, **geometry)
    x, weight = torch.randn(1, 2, *size, dtype=torch.float64), torch.randn(3, 2, *kernel, dtype=torch.float64)
    t = torch.randn(1, math.prod(grid), 3, dtype=torch.float64)
    embedded = (patch_embed(x, weight, **geometry) * t).sum()
    unembedded = (x * patch_unembed(t, weight, grid=grid, size=size, **geometry)).sum()
    torch.testing.assert_close(embedded, unembedded)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16), path=st.sampled_from(TORCH_PATHS), kernel=st.integers(1, 4), stride=st.integers(1, 3),
    extra=st.integers(0, 4), batch=st.integers(1, 3),
)  # fmt: skip
def test_laws_of_the_embedding_hold(seed, path, kernel, stride, extra, batch):
    """Linear in the volume, a shift by a stride moves the tokens, and samples do not see each other."""
    size = (kernel + extra, kernel, kernel + extra + stride)
    x, other = (draw(batch, 2, *size, seed=seed + i, grad=False) for i in range(2))
    weight = draw(3, 2, kernel, kernel, kernel, seed=seed + 2, grad=False)

    def embed(volume: Tensor) -> Tensor:
        return patch_embed(volume, weight, stride=stride, path=path)

    torch.testing.assert_close(embed(2 * x - 3 * other), 2 * embed(x) - 3 * embed(other))
    torch.testing.assert_close(embed(x)[:1], embed(x[:1]))
    grid = token_grid(size, kernel, stride=stride)
    moved = embed(x[..., stride:]).view(batch, *grid[:2], grid[2] - 1, 3)
    torch.testing.assert_close(embed(x).view(batch, *grid, 3)[:, :, :, 1:], moved)


@forward_backends
def test_nan_reaches_the_tokens_that_hold_it_and_no_other(backend):
    x = torch.randn(2, 1, 6, 6, 6, device=DEVICE)
    x[0, 0, 2, 3, 3] = math.nan
    weight = torch.randn(4, 1, 2, 2, 2, device=DEVICE)
    for windows in (None, [hu_window(-1, 1)]):
        tokens = patch_embed(x, weight, stride=2, windows=windows, norm="layer", backend=backend).view(2, 3, 3, 3, 4)
        assert tokens[0, 1, 1, 1].isnan().all()
        assert tokens.isnan().sum() == 4


@forward_backends
def test_strided_volumes_change_no_bit(backend):
    x = torch.randn(2, 6, 7, 5, 3, device=DEVICE).permute(0, 4, 2, 1, 3)
    weight, bias = torch.randn(4, 3, 2, 3, 2, device=DEVICE), torch.randn(4, device=DEVICE)
    expected = patch_embed(x.contiguous(), weight, bias, stride=2, padding=1, backend=backend)
    torch.testing.assert_close(patch_embed(x, weight, bias, stride=2, padding=1, backend=backend), expected)
    flipped = x.transpose(2, 4).contiguous().transpose(2, 4)
    torch.testing.assert_close(patch_embed(flipped, weight, bias, stride=2, padding=1, backend=backend), expected)


@backends
def test_strided_gradients_are_taken_as_they_are(backend):
    given = in_dtype(arguments((5, 4, 6), kernel=2, norm=None, prefix=0), torch.float32)
    out = patch_embed(**given, backend=backend)
    dout = torch.randn(out.shape[2], out.shape[1], out.shape[0], device=DEVICE).permute(2, 1, 0)
    tensors = list(leaves(given).values())
    strided = torch.autograd.grad(out, tensors, dout, retain_graph=True)
    for a, b in zip(strided, torch.autograd.grad(out, tensors, dout.contiguous()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@backends
def test_equal_inputs_give_equal_bits(backend):
    given = in_dtype(arguments((3, 4, 17), kernel=2, batch=1), torch.float32)
    first, second = (outputs_and_gradients(patch_embed, given, backend=backend) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@launches.embed
def test_unwritten_memory_is_never_read():
    """Deterministic mode fills torch.empty with NaN: an output that a kernel forgets would show."""
    given = in_dtype(arguments((3, 6, 4), kernel=2, stride=(1, 3, 2), padding="cover", batch=1), torch.float32)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for backend in ("torch", "triton"):
            results = outputs_and_gradients(patch_embed, given, backend=backend)
            assert all(value.isfinite().all() for value in results.values())
    finally:
        torch.use_deterministic_algorithms(False)


def test_operators_pass_opcheck():
    rows = [draw(4, seed=i, dtype=torch.float32) for i in range(3)]
    weight = draw(4, 2, 1, 2, 2, seed=5, dtype=torch.float32)
    geometry = ([1, 2, 2], [0, 0, 1, 1, 0, 1], [1, 1, 1])
    x = draw(2, 2, 1, 4, 5, seed=6, dtype=torch.float32)
    grid = (1, 3, 3)
    tables = [draw(g, 4, seed=7 + g, dtype=torch.float32) for g in grid]
    prefix = draw(1, 4, seed=3, dtype=torch.float32)
    torch.library.opcheck(
        ops.patch_embed,
        (x, weight, *rows, *tables, prefix, [], *geometry, "zeros", "layer", 1e-6, True, "im2col"),
    )
    tokens = draw(2, 9, 4, seed=8, dtype=torch.float32)
    torch.library.opcheck(ops.patch_unembed, (tokens, weight, rows[0][:2].detach(), [1, 4, 5], *geometry, "im2col"))


@pytest.mark.filterwarnings("ignore")
def test_compiles_without_a_graph_break_for_changing_sizes():
    compiled = torch.compile(patch_embed, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((6, 8), (7, 11)):
        given = arguments(size, channels=1, padding=1, position="none", prefix=0, dtype=torch.float32, x_grad=False)
        expected = outputs_and_gradients(patch_embed, given)
        for name, value in outputs_and_gradients(compiled, given).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_inputs():
    given = arguments(dtype=torch.float32, norm="layer", prefix=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = patch_embed(**given)
        raw = patch_embed(**arguments(dtype=torch.float32, raw=True))
    gradients = torch.autograd.grad(out.float().sum(), list(leaves(given).values()))
    assert out.dtype == raw.dtype == torch.bfloat16
    assert {g.dtype for g in gradients} == {torch.float32}
    torch.testing.assert_close(out.float(), patch_embed(**given), rtol=0.1, atol=0.1)


def test_double_backward_is_refused_clearly():
    given = arguments()
    (gradient,) = torch.autograd.grad(patch_embed(**given, path="im2col").sum(), given["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="patch_embed or patch_unembed: double backward is not implemented"):
        gradient.sum().backward()


def test_tables_of_position_stretch_to_any_grid():
    given = arguments((5, 5, 5), position="none", prefix=0, norm=None, kernel=1, stride=1)
    plain = patch_embed(**given).detach()
    constant = patch_embed(**changed(given, position=torch.full((3, 2, 9, 5), 1.5, dtype=torch.float64)))
    torch.testing.assert_close(constant, plain + 1.5)
    table = torch.randn(2, 3, 4, 5, dtype=torch.float64, device=DEVICE)
    stretched = F.interpolate(table.movedim(3, 0)[None], (5, 5, 5), mode="trilinear", align_corners=False)
    torch.testing.assert_close(
        patch_embed(**changed(given, position=table)) - plain, stretched[0].flatten(1).t().expand(2, -1, -1)
    )


def test_choice_is_the_fastest_measured_and_says_why():
    one_channel = torch.empty(1, 1, 96, 96, 96), torch.empty(96, 1, 3, 3, 3)
    many_channels = torch.empty(1, 64, 24, 24, 24), torch.empty(128, 64, 3, 3, 3)
    small, large = (patch_embed_choice(*pair, stride=2, padding=1) for pair in (one_channel, many_channels))
    assert small.path == "im2col"
    assert large.path in ("conv", "conv_channels_last")
    assert "nearest measured shape (channels, taps, width, tokens) = (64, 27, 128, 1728)" in large.reason
    assert patch_embed_choice(*one_channel, stride=2, padding=1, backend="torch") == small


def test_choice_knows_tiles_training_and_layout():
    x, weight = torch.empty(1, 1, 128, 128, 128).bfloat16(), torch.empty(384, 1, 16, 16, 16).bfloat16()
    assert patch_embed_choice(x, weight, stride=16).path == "matmul"
    assert "im2col" not in patch_embed_choice(x, weight, stride=16).reason
    x, weight = torch.empty(1, 64, 24, 24, 24), torch.empty(128, 64, 3, 3, 3)
    forward = patch_embed_choice(x, weight, stride=2, padding=1)
    assert forward.path == "conv"
    assert patch_embed_choice(x, weight.requires_grad_(), stride=2, padding=1).reason != forward.reason
    last = x.contiguous(memory_format=torch.channels_last_3d)
    assert patch_embed_choice(last, weight, stride=2, padding=1).path == "conv_channels_last"


def test_choice_takes_the_kernel_where_it_was_measured_faster_and_never_against_a_wish(monkeypatch):
    geometry = resolve((24, 24, 24), 3, stride=2, padding=1)
    entry = {"channels": 64, "taps": 27, "width": 128, "tokens": 1728, "tiles": False}
    times = {"conv": 2.0, "conv_channels_last": 3.0, "im2col": 4.0}
    table = [entry | {"ms": times | {"fused": 1.0}, "step_ms": times | {"fused": 9.0}}]
    monkeypatch.setattr(choice, "load_configs", lambda family: {"paths": {"sm_90 bfloat16": table}})
    shape = {"channels": 64, "width": 128, "dtype": torch.bfloat16}

    def path(backend: str, *, device: str = "sm_90", raw: bool = False, training: bool = False) -> str:
        return choice.choose.__wrapped__(
            geometry, **shape, raw=raw, device=device, backend=backend, training=training
        ).path

    assert path("auto") == "fused"
    assert path("auto", training=True) == "conv"
    assert path("auto", training=True, raw=True) == "fused"
    assert path("torch") == "conv"
    assert path("triton", training=True) == "fused"
    assert path("auto", device="sm_80") == "fused"  # not measured


def test_cover_sees_every_voxel_and_drop_does_not():
    weight = torch.ones(1, 1, 3, 3)
    for size in ((7, 8), (3, 4), (1, 2), (10, 12)):
        x = torch.ones(1, 1, *size, requires_grad=True)
        patch_embed(x, weight, stride=2, padding="cover").sum().backward()
        assert x.grad is not None
        assert (x.grad > 0).all()
    assert token_grid((8,), 3, stride=2) == (3,)
    assert token_grid((8,), 3, stride=2, padding="cover") == (4,)
    torch.testing.assert_close(token_coverage((8,), 3, stride=2, padding="cover")[-1], torch.tensor(2 / 3))


def test_centres_are_in_millimetres_and_x_is_fastest():
    centres = token_centres_mm((4, 6), (2, 3), stride=(2, 3), spacing_mm=(5.0, 0.5))
    expected = [(2.5, 0.5), (2.5, 2.0), (12.5, 0.5), (12.5, 2.0)]
    torch.testing.assert_close(centres, torch.tensor(expected, dtype=torch.float64))
    padded = token_centres_mm((4,), 3, stride=2, padding=1, spacing_mm=(2.0,))
    assert padded.flatten().tolist() == [0.0, 4.0]


def test_patches_in_millimetres_follow_the_spacing():
    assert patch_voxels(16.0, 8.0, (5.0, 0.8, 0.8)) == ((3, 20, 20), (2, 10, 10))
    assert patch_voxels(1.0, (1.0, 2.0), (5.0, 1.0)).kernel == (1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x has shape \(2, 3, 4\)"),
        ({"x": torch.zeros(1, 2, 5, 5, 5)}, "weight takes 1 channels but x has 2 channels of 1 window"),
        ({"x": torch.zeros(1, 1, 5, 5, 5, dtype=torch.int32)}, "x is torch.int32; it must be floating point, int16"),
        ({"x": torch.zeros(1, 1, 5, 5, 5).half()}, "x is torch.float16 but weight is torch.float32"),
        ({"x": torch.zeros(1, 1, 5, 2, 5)}, "a kernel reaching 3x3x3 voxels is larger than the padded volume 5x2x5"),
        ({"x": torch.zeros(1, 1, 5, 5, 5, device="meta")}, "x is on meta but weight is on cpu"),
        ({"stride": 0}, "stride=0 must be an integer of at least 1"),
        ({"stride": (1, 2)}, r"stride=\(1, 2\) must be"),
        ({"dilation": 0}, "dilation=0 must be"),
        ({"padding": -1}, "padding=-1"),
        ({"padding": "same"}, "padding='same' must be 'cover'"),
        ({"padding_mode": "circular"}, "padding_mode='circular' must be"),
        ({"padding_mode": "reflect", "padding": 5}, r"needs padding \(5, 5\) below the 5 voxels"),
        ({"norm": "batch"}, "norm='batch' must be"),
        ({"norm": None, "norm_weight": torch.ones(4)}, "norm_weight or norm_bias is given without norm"),
        ({"norm_weight": torch.ones(5)}, r"norm_weight is torch.float32 of shape \(5,\)"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0 must be at least 0"),
        ({"bias": torch.ones(4).half()}, "bias is torch.float16 but weight is torch.float32"),
        ({"prefix": torch.ones(1, 5)}, r"prefix has shape \(1, 5\)"),
        ({"position": torch.ones(2, 2, 4)}, r"position has shape \(2, 2, 4\)"),
        ({"position": [torch.ones(2, 4)]}, "position must be one table"),
        ({"windows": []}, "windows has 0 entries"),
        ({"windows": [(3.0, 3.0)]}, "low=3.0 must be below high=3.0"),
        ({"windows": [(1.0, 2.0, 3.0)]}, "it must be a Window or a"),
        ({"backend": "cuda"}, "backend='cuda' must be"),
        ({"path": "fft"}, "path='fft' must be one of"),
        ({"path": "matmul"}, "path='matmul' needs kernel == stride"),
    ],
)
def test_bad_arguments_are_named_in_one_line(change, message):
    given: dict[str, Any] = {
        "x": torch.zeros(1, 1, 5, 5, 5),
        "weight": torch.zeros(4, 1, 3, 3, 3),
        "stride": 2,
        "norm": "layer",
    }
    with pytest.raises(ValueError, match=message) as error:
        patch_embed(**(given | change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patch_voxels(16, 8, (0.0, 1.0, 1.0)), r"spacing_mm=\(0.0, 1.0, 1.0\) must be 3 finite numbers above"),
        (lambda: patch_voxels(-1, 8, (1.0, 1.0)), "kernel_mm=-1 must be a length above 0"),
        (lambda: token_centres_mm((4,), 2, stride=1, spacing_mm=(math.nan,)), "token_centres_mm: spacing_mm"),
        (lambda: z_score(0, 0), "std=0"),
        (
            lambda: patch_unembed(torch.zeros(1, 9, 2), torch.zeros(2, 1, 2, 2), grid=(3, 3), size=(9, 9), stride=2),
            r"size=\(9, 9\) has the token grid \(4, 4\), not grid=\(3, 3\)",
        ),
        (
            lambda: patch_unembed(torch.zeros(1, 8, 2), torch.zeros(2, 1, 2, 2), grid=(3, 3), stride=2),
            "tokens has N=8 rows",
        ),
    ],
)
def test_bad_geometry_is_named_in_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()
