"""The disentangled kernels against the definition in float64; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from medformer_kernels import disentangled_attention, disentangled_attention_reference, log_buckets
from medformer_kernels.disentangled import TERMS
from medformer_kernels.disentangled.tiles import ROUND
from tests import launches

pytestmark = launches.disentangled
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
        floor = 4 * torch.finfo(torch.float32).eps * (right.norm() + exact["out"].norm())
        assert (mine[name].double() - right).norm() <= 2 * (usual[name].double() - right).norm() + floor, name


CASES = {
    "grid": ("grid", (3, 2, 5)),
    "grid of one tile line": ("grid", (2, 3, 32)),
    "grid of long lines": ("grid", (2, 1, 37)),
    "grid of short lines": ("grid", (5, 4, 2)),
    "grid of more lines than a round": ("grid", (2, ROUND + 1, 3)),
    "buckets": ("buckets", (70,)),
    "absolute": ("absolute", (40,)),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_match_the_reference_in_float32(name: str) -> None:
    assert_rule(call_on(*CASES[name]), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", ["grid", "buckets", "absolute"])
def test_low_precision_error_is_at_most_twice_that_of_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    assert_rule(call_on(*CASES[name]), dtype)


@pytest.mark.parametrize(("width", "dtype"), [(72, torch.float16), (96, torch.bfloat16), (128, torch.float16)])
def test_wide_heads_match_the_reference(width: int, dtype: torch.dtype) -> None:
    """The gradients of keys and values come from a launch each."""
    assert_rule(call_on("grid", (2, 2, 3), width=width), dtype)


def test_wide_heads_take_buckets_padding_and_dropout() -> None:
    call = call_on("buckets", (20,), width=96)
    mask = torch.arange(20, device=DEVICE)[None] % 3 > 0
    assert_rule(call, torch.float16, causal=True, key_padding_mask=mask, dropout=0.2, seed=4)


@launches.none
@pytest.mark.parametrize(("width", "dtype", "most"), [(136, torch.float16, 128), (72, torch.float32, 64)])
def test_heads_wider_than_any_tile_are_refused_by_name(width: int, dtype: torch.dtype, most: int) -> None:
    call = cast(call_on("grid", (1, 2, 2), width=width), dtype)
    with pytest.raises(ValueError, match=f"has no kernel for scores or values wider than {most} [(]here {width}[)]"):
        triton(**call)


@pytest.mark.parametrize("terms", [("c2p",), ("p2c", "cp2c"), ("p2p",), TERMS], ids="+".join)
def test_terms_and_prefix_tokens_match_the_reference(terms: tuple[str, ...]) -> None:
    assert_rule(call_on("grid", (2, 3, 3), terms=terms, prefix=2), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["grid", "buckets"])
def test_causal_padding_and_dropout_match_the_reference(kind: str, dtype: torch.dtype) -> None:
    prefix = 2 if kind == "grid" else 0
    call = call_on(kind, (3, 4, 4) if kind == "grid" else (50,), prefix=prefix)
    mask = torch.rand(1, 50, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[:, :5] = False  # the first queries have no key
    options = {"causal": True, "key_padding_mask": mask.to(DEVICE), "dropout": 0.2, "seed": 4}
    assert_rule(call, dtype, **options)
    out = triton(**cast(call, dtype), **options)
    assert out[:, :, :5].abs().max() == 0


@pytest.mark.parametrize("shape", [(1, ROUND + 1, 17), (3, 3, 5)], ids=["rounds of long lines", "planes"])
def test_causal_walks_end_and_begin_inside_a_plane(shape: tuple[int, ...]) -> None:
    assert_rule(call_on("grid", shape), torch.float32, causal=True)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 1, 1), torch.float32), ((7, 3, 3), torch.float32), ((13, 2, 5), torch.float32), ((1, 1, 1), torch.bfloat16)],
    ids=lambda x: str(torch.Size(x).numel()) if isinstance(x, tuple) else str(x)[6:],
)
def test_takes_any_number_of_tokens(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_rule(call_on("grid", shape, width=8), dtype)


@launches.disentangled_forward
def test_padding_never_changes_the_rest() -> None:
    call = cast(call_on("grid", (3, 3, 4), prefix=1), torch.float32)
    mask = torch.rand(1, 37, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.3
    expected = triton(**call, key_padding_mask=mask)
    for name, wild in (("k", float("inf")), ("v", float("nan"))):
        call[name] = call[name].masked_fill(~mask[:, None, :, None], wild)
    # a query is not a key: what padded tokens ask for may not be finite, so they keep their own q
    torch.testing.assert_close(triton(**call, key_padding_mask=mask), expected, rtol=0, atol=0)


def test_volumes_laid_end_to_end_do_not_read_each_other() -> None:
    grids = ((2, 3, 2), (1, 2, 2))
    call = cast(call_on("grid", (2, 2, 4)), torch.float64)
    tables = [torch.randn(1, 2 * g - 1, 16, dtype=torch.float64).to(DEVICE) for g in (2, 3, 2)]
    call |= {"grid": grids, "rel_k": tables, "rel_q": tables}
    assert_rule(call, torch.float32)


@launches.disentangled_forward
def test_strides_are_honoured() -> None:
    call = cast(call_on("grid", (2, 3, 4)), torch.float32)
    packed = torch.stack([call[name] for name in "qkv"]).permute(1, 3, 0, 2, 4).contiguous()  # B N 3 H D
    views = dict(zip("qkv", packed.permute(2, 0, 3, 1, 4).unbind(0), strict=True))
    assert not views["q"].is_contiguous()
    torch.testing.assert_close(triton(**call | views), triton(**call), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["grid of more lines than a round", "buckets"])
def test_equal_inputs_give_equal_bits(name: str) -> None:
    call = call_on(*CASES[name])
    one, other = (run(triton, call, torch.float32) for _ in range(2))
    for name, x in one.items():
        assert torch.equal(x, other[name]), name


@pytest.mark.parametrize("kind", ["grid", "buckets"])
def test_operators_pass_opcheck(kind: str) -> None:
    x = torch.randn(1, 1, 12, 16, device=DEVICE)
    grid = [0, 2, 3, 2] if kind == "grid" else []
    buckets = None if grid else log_buckets(12, num_buckets=4, max_distance=9).to(DEVICE)
    table = torch.randn(1, 1, 12, 7 if grid else 8, device=DEVICE)
    leaves = [y.clone().requires_grad_() for y in (x, x, x, table, table)]
    mask = torch.ones(1, 12, dtype=torch.bool, device=DEVICE)
    seed = torch.tensor(3, device=DEVICE)
    arguments = (*leaves, buckets, mask, seed, grid, 0.25, False, 0.1, 0, "triton")
    torch.library.opcheck(torch.ops.medformer.disentangled_forward.default, arguments)


def test_the_log_sum_exp_has_a_gradient() -> None:
    """What prefix tokens are merged by."""
    x = torch.randn(1, 1, 12, 16, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    table = torch.randn(1, 1, 12, 7, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    made = {}
    for backend in ("triton", "torch"):
        leaves = [y.clone().requires_grad_() for y in (x, x, x, table, table)]
        _, lse = torch.ops.medformer.disentangled_forward(
            *leaves, None, None, None, [0, 2, 3, 2], 0.25, False, 0.0, 0, backend
        )
        made[backend] = torch.autograd.grad(lse.square().sum(), leaves, allow_unused=True)
    for mine, right in zip(made["triton"], made["torch"], strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)
