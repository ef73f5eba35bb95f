"""Disentangled attention in PyTorch: the definition, its terms, positions, masks and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medformer_kernels.disentangled import (
    TERMS,
    axis_expansion,
    axis_rows,
    disentangled_attention,
    disentangled_attention_reference,
    log_buckets,
)
from medformer_kernels.disentangled.arguments import prepare
from medformer_kernels.disentangled.tables import operands
from medformer_kernels.disentangled.wide import wide

GRID = (2, 3, 2)
PREFIX = 2
ALL = TERMS


def inputs(kind: str, *, terms=ALL, batch: int = 2, heads: int = 2, width: int = 4, prefix: int = 0) -> dict:
    """Arguments of one call in float64: position 'absolute', 'grid', 'buckets' or 'both' (absolute and grid)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = prefix + 12
    call: dict = {"terms": terms, "q": normal(batch, heads, tokens, width), "k": normal(batch, heads, tokens, width)}
    call["v"] = normal(batch, heads, tokens, width + 1)
    sides = [s for s in "qk" if any("p" in term.split("2")["qk".index(s)] for term in terms)]
    for side in sides:
        if kind in ("absolute", "both"):
            call[f"pos_{side}"] = normal(heads, tokens, width)
        if kind in ("grid", "both"):
            call[f"rel_{side}"] = [normal(heads, 2 * g - 1, width) for g in GRID]
            if prefix:
                call[f"prefix_{side}"] = normal(heads, 2, prefix, width)
        if kind == "buckets":
            call[f"rel_{side}"] = normal(heads, 8, width)
    if kind in ("grid", "both"):
        call |= {"grid": GRID, "prefix_tokens": prefix}
    if kind == "buckets" and sides:
        call["buckets"] = log_buckets(tokens, num_buckets=4, max_distance=9)
    return call


def tensors(call: dict) -> dict[str, Tensor]:
    """Every input that may need a gradient, tables by axis."""
    found = {}
    for name, x in call.items():
        if isinstance(x, list):
            found |= {f"{name}[{i}]": y for i, y in enumerate(x)}
        elif isinstance(x, Tensor) and x.is_floating_point():
            found[name] = x
    return found


def with_gradients(function, call: dict, dout: Tensor | None = None, **options) -> tuple[Tensor, dict[str, Tensor]]:
    """(out, gradients by name)."""
    fresh = {
        name: [y.detach().clone().requires_grad_() for y in x]
        if isinstance(x, list)
        else x.detach().clone().requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in call.items()
    }
    out = function(**fresh, **options)
    if dout is None:
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(dout.to(out))
    return out.detach(), {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in tensors(fresh).items()}


def assert_same(call: dict, function=disentangled_attention, **options) -> None:
    out, gradients = with_gradients(function, call, **options)
    expected, exact = with_gradients(disentangled_attention_reference, call, **options)
    torch.testing.assert_close(out, expected)
    for name, gradient in exact.items():
        torch.testing.assert_close(gradients[name], gradient, msg=lambda m, name=name: f"{name}: {m}")


def loops(call: dict, *, allowed=lambda b, i, j: True) -> Tensor:
    """The formula, pair by pair, in Python's own arithmetic over vectors."""
    q, k, v, terms = call["q"], call["k"], call["v"], call["terms"]
    batch, heads, tokens, width = q.shape
    prefix = call.get("prefix_tokens", 0)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    place = [None] * prefix + list(itertools.product(*(range(g) for g in GRID)))

    def parts(side: str, b: int, h: int, i: int, j: int) -> list[Tensor]:
        """Absolute, z, y, x."""
        absolute, rel = call.get(f"pos_{side}"), call.get(f"rel_{side}")
        zero = torch.zeros(width, dtype=q.dtype)
        first = zero if absolute is None else absolute[h, i if side == "q" else j]
        if rel is None:
            return [first, zero, zero, zero]
        if isinstance(rel, Tensor):
            return [first, rel[h, call["buckets"][i - j + tokens - 1]], zero, zero]
        at_i, at_j = place[i], place[j]
        if at_j is None:
            return [first, call[f"prefix_{side}"][h, 0, j], zero, zero]
        if at_i is None:
            return [first, call[f"prefix_{side}"][h, 1, i], zero, zero]
        return [first] + [t[h, a - c + g - 1] for t, a, c, g in zip(rel, at_i, at_j, GRID, strict=True)]

    for b, h, i in itertools.product(range(batch), range(heads), range(tokens)):
        scores = torch.full((tokens,), -torch.inf, dtype=q.dtype)
        for j in range(tokens):
            if not allowed(b, i, j):
                continue
            pq, pk = parts("q", b, h, i, j), parts("k", b, h, i, j)
            products = {
                "cc": q[b, h, i] @ k[b, h, j],
                "cp": q[b, h, i] @ torch.stack(pk).sum(0),
                "pc": torch.stack(pq).sum(0) @ k[b, h, j],
                "pp": pq[0] @ torch.stack(pk).sum(0)
                + torch.stack(pq[1:]).sum(0) @ pk[0]
                + sum(a @ c for a, c in zip(pq[1:], pk[1:], strict=True)),
            }
            pairs = [one + other for term in terms for one in term.split("2")[0] for other in term.split("2")[1]]
            scores[j] = sum(products[pair] for pair in pairs) / (width * len(terms)) ** 0.5
        if scores.max() > -torch.inf:
            out[b, h, i] = scores.softmax(0) @ v[b, h]
    return out


@pytest.mark.parametrize("kind", ["absolute", "grid", "buckets", "both"])
def test_reference_is_the_formula(kind: str) -> None:
    prefix = PREFIX if kind == "grid" else 0
    call = inputs(kind, batch=1, heads=1, prefix=prefix)
    torch.testing.assert_close(disentangled_attention_reference(**call), loops(call), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("terms", [*((term,) for term in TERMS), ("c2c", "c2p", "p2c"), ALL], ids=lambda t: "+".join(t))
@pytest.mark.parametrize("kind", ["absolute", "grid", "buckets"])
def test_each_term_and_its_gradients_match_the_reference(kind: str, terms: tuple[str, ...]) -> None:
    assert_same(inputs(kind, terms=terms))


@pytest.mark.parametrize("kind", ["grid", "both"])
def test_prefix_tokens_have_offsets_of_their_own(kind: str) -> None:
    assert_same(inputs(kind, prefix=PREFIX))


@pytest.mark.parametrize("kind", ["absolute", "grid", "both"])
@pytest.mark.parametrize("mask", [False, True], ids=["all", "padded"])
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
def test_wide_dot_product_is_the_same(kind: str, mask: bool, causal: bool) -> None:
    call = inputs(kind, prefix=PREFIX if kind == "grid" else 0)
    options = {"causal": causal}
    if mask:
        options["key_padding_mask"] = (
            torch.rand(2, call["q"].shape[2], generator=torch.Generator().manual_seed(3)) > 0.4
        )
        options["key_padding_mask"][1] = False

    def through_sdpa(**arguments) -> Tensor:
        arguments = {"grid": None, "rel_k": None, "rel_q": None, "pos_q": None, "pos_k": None} | arguments
        made = prepare("test", buckets=None, **arguments)[0]
        x = operands(made.q, made.k, made.weights, **made.positions)
        return wide(x, made.v, made.grid, scale=made.scale, causal=made.causal, key_padding_mask=made.mask)

    assert_same(call, through_sdpa, **options)


@pytest.mark.parametrize("kind", ["absolute", "grid", "buckets"])
def test_causal_and_padding_match_the_loops(kind: str) -> None:
    call = inputs(kind, prefix=PREFIX if kind == "grid" else 0)
    tokens = call["q"].shape[2]
    mask = torch.rand(2, tokens, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[1, :4] = False
    options = {"causal": True, "key_padding_mask": mask}
    expected = loops(call, allowed=lambda b, i, j: j <= i and mask[b, j])
    torch.testing.assert_close(disentangled_attention_reference(**call, **options), expected)
    assert expected[1, :, 0].abs().max() == 0
    assert_same(call, **options)


@pytest.mark.parametrize("kind", ["grid", "buckets"])
def test_dropout_is_the_same_everywhere_and_follows_its_seed(kind: str) -> None:
    call = inputs(kind, prefix=PREFIX if kind == "grid" else 0)
    assert_same(call, dropout=0.3, seed=5)
    out = disentangled_attention(**call, dropout=0.3, seed=5)
    assert (out - disentangled_attention(**call, dropout=0.3, seed=6)).abs().max() > 0.01


def test_dropout_keeps_its_share() -> None:
    v = torch.eye(256).expand(1, 8, -1, -1)
    q = torch.zeros(1, 8, 256, 4)
    weights = disentangled_attention(q, q, v, terms=("c2c",), dropout=0.25, seed=1)
    assert abs((weights > 0).float().mean() - 0.75) < 0.005
    # neither rows, columns nor heads repeat
    kept = (weights > 0).float().flatten(0, 1) - 0.75
    for one, other in ((kept[0], kept[1]), (kept[:, 1:], kept[:, :-1]), (kept[:, :, 1:], kept[:, :, :-1])):
        assert (one * other).mean().abs() < 0.01


def test_gradients_hold_against_finite_differences() -> None:
    call = inputs("grid", batch=1, heads=1, width=2, prefix=1)
    names = list(tensors(call))

    def function(*values: Tensor) -> Tensor:
        given_values = dict(zip(names, values, strict=True))
        fresh = {
            name: [given_values[f"{name}[{i}]"] for i in range(len(x))]
            if isinstance(x, list)
            else given_values.get(name, x)
            for name, x in call.items()
        }
        return disentangled_attention(**fresh)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in tensors(call).values()])


@pytest.mark.parametrize("kind", ["grid", "buckets"])
@settings(deadline=None, max_examples=10)
@given(extra=st.integers(1, 5), seed=st.integers(0, 1000))
def test_padding_never_changes_the_rest(kind: str, extra: int, seed: int) -> None:
    """What padded keys hold, nan and inf too, is never read."""
    call = inputs(kind, batch=1)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[:, torch.randperm(12, generator=generator)[:extra]] = False
    call["key_padding_mask"] = mask
    expected = disentangled_attention(**call)
    wild = call | {name: x.clone() for name, x in call.items() if name in ("k", "v")}
    wild["k"][:, :, ~mask[0]] = float("inf")
    wild["v"][:, :, ~mask[0]] = float("nan")
    torch.testing.assert_close(disentangled_attention(**wild), expected, rtol=0, atol=0)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    call = inputs("grid", batch=3)
    whole = disentangled_attention(**call)
    alone = disentangled_attention(**call | {name: call[name][1:2] for name in "qkv"})
    torch.testing.assert_close(whole[1:2], alone, rtol=0, atol=0)


def test_volumes_laid_end_to_end_do_not_read_each_other() -> None:
    grids = [(2, 3, 2), (1, 2, 2), (2, 1, 2)]
    generator = torch.Generator().manual_seed(0)
    tokens = sum(1 + a * b * c for a, b, c in grids)
    q, k, v = torch.randn(3, 1, 2, tokens, 4, generator=generator, dtype=torch.float64)
    rel = [torch.randn(2, 2 * g - 1, 4, generator=generator, dtype=torch.float64) for g in (2, 3, 2)]
    own = torch.randn(2, 2, 1, 4, generator=generator, dtype=torch.float64)
    options = {"rel_k": rel, "rel_q": rel, "prefix_tokens": 1, "prefix_k": own, "prefix_q": own}
    packed = disentangled_attention(q, k, v, grid=grids, **options)
    start = 0
    for size in grids:
        stop = start + 1 + size[0] * size[1] * size[2]
        small = [t[:, m - g : m + g - 1] for t, g, m in zip(rel, size, (2, 3, 2), strict=True)]
        parts = [x[:, :, start:stop] for x in (q, k, v)]
        alone = disentangled_attention(*parts, grid=size, **options | {"rel_k": small, "rel_q": small})
        torch.testing.assert_close(packed[:, :, start:stop], alone)
        start = stop
    torch.testing.assert_close(packed, disentangled_attention_reference(q, k, v, grid=grids, **options))


def test_documents_do_not_read_each_other() -> None:
    call = inputs("buckets", batch=1)
    cuts = torch.tensor([0, 5, 6, 12])
    expected = disentangled_attention_reference(**call, cu_seqlens=cuts)
    torch.testing.assert_close(disentangled_attention(**call, cu_seqlens=cuts), expected)
    part = {name: call[name][:, :, 6:] for name in "qkv"}
    alone = disentangled_attention(**call | part | {"buckets": call["buckets"][6:17]})
    torch.testing.assert_close(expected[:, :, 6:], alone)


def test_low_precision_on_a_cpu_is_no_worse_than_plain_pytorch() -> None:
    call = inputs("grid", prefix=PREFIX)
    low = {
        name: [y.bfloat16() for y in x] if isinstance(x, list) else x.bfloat16() if isinstance(x, Tensor) else x
        for name, x in call.items()
    }
    exact = {
        name: [y.double() for y in x] if isinstance(x, list) else x.double() if isinstance(x, Tensor) else x
        for name, x in low.items()
    }
    right = disentangled_attention_reference(**exact)
    plain = (disentangled_attention_reference(**low) - right).norm()
    assert (disentangled_attention(**low) - right).norm() <= 2 * plain


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 63), (5, 1, 26), (1, 130, 1), (2, 1, 200)], ids=str)
def test_takes_any_grid(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, shape[0] * shape[1] * shape[2], 4, generator=generator, dtype=torch.float64)
    rel = [torch.randn(1, 2 * g - 1, 4, generator=generator, dtype=torch.float64) for g in shape]
    assert_same({"q": q, "k": k, "v": v, "grid": shape, "rel_k": rel, "rel_q": rel})


def test_queries_and_keys_may_differ_in_number() -> None:
    call = inputs("buckets")
    call |= {
        "k": call["k"][:, :, :7],
        "v": call["v"][:, :, :7],
        "buckets": log_buckets(12, num_buckets=4, max_distance=9)[5:],
    }
    assert_same(call)


def test_torch_compile_takes_it_whole() -> None:
    call = inputs("grid", prefix=1)
    compiled = torch.compile(disentangled_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**call), disentangled_attention(**call))


@pytest.mark.parametrize("kind", ["grid", "buckets"])
def test_operators_pass_opcheck(kind: str) -> None:
    call = inputs(kind, batch=1)
    arguments = {"grid": None, "rel_k": None, "rel_q": None, "pos_q": None, "pos_k": None, "buckets": None} | call
    made = prepare("test", **arguments)[0]
    x = operands(made.q, made.k, made.weights, **made.positions)
    assert x.t is not None
    assert x.u is not None
    leaves = [y.detach().float().requires_grad_() for y in (x.q, x.k, made.v, x.t, x.u)]
    grid = [] if made.grid is None else [0, *GRID]
    mask = torch.ones(1, 12, dtype=torch.bool)
    arguments = (*leaves, made.buckets, mask, torch.tensor(3), grid, 0.5, False, 0.1, 0, "torch")
    torch.library.opcheck(torch.ops.medformer.disentangled_forward.default, arguments)


def test_double_backward_is_refused_by_name() -> None:
    call = inputs("grid", terms=("c2c", "c2p"))
    q = call["q"].requires_grad_()
    (gradient,) = torch.autograd.grad(disentangled_attention(**call).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="disentangled_attention: double backward is not implemented"):
        gradient.sum().backward()


def test_expansion_interpolates_between_rows() -> None:
    table = torch.arange(axis_rows(4, None), dtype=torch.float32) - 4  # the vector of a distance is the distance
    assert (axis_expansion(3, max_distance=4) @ table).tolist() == [-2, -1, 0, 1, 2]
    assert (axis_expansion(8, max_distance=4) @ table).tolist() == [-4, -4, -4, -4, -3, -2, -1, 0, 1, 2, 3, 4, 4, 4, 4]
    # 2.5 mm apart, a row a 2 mm
    assert (axis_expansion(3, max_distance=4, spacing=2.5, unit=2.0) @ table).tolist() == [-2.5, -1.25, 0, 1.25, 2.5]


def test_scans_of_other_spacing_share_the_table_by_distance() -> None:
    fine = axis_expansion(9, max_distance=16, num_buckets=6, spacing=1.0)
    coarse = axis_expansion(5, max_distance=16, num_buckets=6, spacing=2.0)
    torch.testing.assert_close(fine[::2], coarse)
    torch.testing.assert_close(fine.sum(1), torch.ones(17))


def test_log_buckets_match_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
    for tokens, buckets, distance in ((40, 8, 32), (600, 256, 512), (5, 4, 64)):
        x = torch.zeros(1, tokens, 1)
        relative = modeling.build_relative_position(x, x, bucket_size=buckets, max_position=distance)[0]
        ours = log_buckets(tokens, num_buckets=buckets, max_distance=distance)
        i = torch.arange(tokens)
        wanted = (relative + buckets).clamp(0, 2 * buckets - 1)
        assert torch.equal(ours[i[:, None] - i + tokens - 1], wanted)


X = torch.zeros(1, 2, 12, 4)
REL = [torch.zeros(2, 2 * g - 1, 4) for g in GRID]


BAD = {
    "grid=(2, 3, 3) holds 18 tokens, but q has 12 with prefix_tokens=0; the product must be 12": {"grid": (2, 3, 3)},
    "terms holds 'p2q', which must be one of c2c, c2p, p2c, p2p": {"terms": ("c2c", "p2q")},
    "terms=() must name at least one of c2c, c2p": {"terms": ()},
    "terms='c2c' must be a sequence of names": {"terms": "c2c"},
    "need a position of the key; give rel_k or pos_k": {"terms": ("c2p",)},
    "use no position of the query; drop rel_q and pos_q": {
        "terms": ("c2p",), "grid": GRID, "rel_k": REL, "rel_q": REL,
    },
    "rel_k has shapes": {"terms": ("c2p",), "grid": GRID, "rel_k": REL[:1] * 3},
    "prefix_k has shape (1, 2)": {"terms": ("c2p",), "grid": GRID, "rel_k": REL, "prefix_k": torch.zeros(1, 2)},
    "buckets has 5 entries; it must have N + S - 1 = 23": {
        "terms": ("c2p",), "buckets": torch.zeros(5, dtype=torch.long), "rel_k": REL[0],
    },
    "dropout=1.0 must be at least 0 and less than 1": {"dropout": 1.0},
    "key_padding_mask is torch.float32 (1, 12); it must be bool (1, 12)": {"key_padding_mask": torch.zeros(1, 12)},
    "each behind prefix_tokens=0, hold 7 tokens in all, but q has 12": {"grid": [(2, 3, 1), (1, 1, 1)]},
    "cu_seqlens=[0, 5] must rise from 0 to the 12 tokens": {"cu_seqlens": torch.tensor([0, 5])},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named_in_one_line(message: str) -> None:
    with pytest.raises(ValueError, match="disentangled_attention: ") as caught:
        disentangled_attention(X, X, X, **{"terms": ("c2c",)} | BAD[message])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "function", "options"),
    [
        ("max_distance=0 must be positive", axis_expansion, {"max_distance": 0}),
        ("num_buckets=9 must be between 2 and max_distance=8", axis_expansion, {"max_distance": 8, "num_buckets": 9}),
        ("max_distance=0 must be at least 1", log_buckets, {"num_buckets": 4, "max_distance": 0}),
        ("num_buckets=64 must be at least 2 and less than", log_buckets, {"num_buckets": 64, "max_distance": 8}),
    ],
)
def test_distances_that_make_no_table_are_named(message: str, function, options: dict) -> None:
    with pytest.raises(ValueError, match=message):
        function(4, **options)


@pytest.mark.parametrize("causal", [False, True])
def test_distances_of_many_blocks_take_their_own_buckets(causal: bool) -> None:
    """Far keys, whose distances share a bucket, are added as a column: where they begin shifts from block to block."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 150, 4, generator=generator, dtype=torch.float64)
    rel_q, rel_k = torch.randn(2, 1, 8, 4, generator=generator, dtype=torch.float64)
    call = {
        "q": q, "k": k, "v": v, "rel_q": rel_q, "rel_k": rel_k, "terms": ("c2c", "c2p", "p2c"),
        "buckets": log_buckets(150, num_buckets=4, max_distance=9),
    }  # fmt: skip
    assert_same(call, causal=causal)
