"""FAVOR+ with a state for each block of the grid: kernels' function, module, and where one state fails."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medformer import Backbone, PerformerAttention, load, save
from medformer.config import BackboneConfig
from medformer_kernels import (
    orthogonal_features,
    performer_attention,
    performer_block_attention,
    performer_block_attention_reference,
)
from tests import launches
from tests.rule import assert_as_good_as_pytorch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("out", "q", "k", "v", "omega", "log_weights")
LAYOUTS = {
    "even": ((4, 6, 4), (2, 3, 2), 0),
    "ragged": ((5, 4, 3), (2, 4, 2), 3),
    "plane": ((7, 5), (3, 2), 1),
    "short": ((3, 2), (2, 2), 1),
    "line": ((11,), (4,), 0),
    "one block": ((3, 3, 2), (8, 8, 8), 2),
}  # fmt: skip


def inputs(layout: str, dtype=torch.float64, width=8, width_v=12) -> tuple[list[Tensor], dict]:
    grid, block, prefix = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    tokens = prefix + math.prod(grid)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = [drawn(2, 2, tokens, width), drawn(2, 2, tokens, width), drawn(2, 2, tokens, width_v)]
    x += [orthogonal_features(16, width, heads=2).double(), drawn(len(grid), 2, 5)]
    x = [t.to(DEVICE, dtype).requires_grad_() for t in x]
    return x, {"grid": grid, "block": block, "prefix_tokens": prefix}


def padding(tokens: int) -> Tensor:
    mask = torch.rand(2, tokens, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0] = False  # a sample without any valid key
    return mask.to(DEVICE)


def outputs_and_gradients(function, x, **kwargs) -> list[Tensor]:
    out = function(*x, **kwargs)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, x, dout.to(out.device, out.dtype))]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("layout", "backend"),
    [
        *(pytest.param(layout, "torch", marks=launches.none) for layout in LAYOUTS),
        pytest.param("short", "triton", marks=launches.performer),
    ],
)
def test_equals_the_definition_with_every_gradient(layout, masked, backend):
    x, kwargs = inputs(layout, torch.float64 if backend == "torch" else torch.float32)
    kwargs["key_padding_mask"] = padding(x[0].shape[2]) if masked else None
    found = outputs_and_gradients(performer_block_attention, x, backend=backend, **kwargs)
    wide = [t.detach().double().requires_grad_() for t in x]
    expected = outputs_and_gradients(performer_block_attention_reference, wide, **kwargs)
    tolerance = {"atol": 1e-10, "rtol": 1e-8} if backend == "torch" else {"atol": 2e-4, "rtol": 1e-3}
    for name, a, b in zip(NAMES, found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("feature", ["softmax", "hyperbolic"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_weights_are_plain_favor(layout, feature):
    x, kwargs = inputs(layout)
    q, k, v, omega, log_weights = x
    mask = padding(q.shape[2])
    equal = torch.full_like(log_weights, 1.25)
    found = performer_block_attention(q, k, v, omega, equal, key_padding_mask=mask, feature=feature, **kwargs)
    torch.testing.assert_close(found, performer_attention(q, k, v, omega, key_padding_mask=mask, feature=feature))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_good_as_the_definition_in_the_same_dtype(dtype):
    x, kwargs = inputs("ragged", dtype)
    exact = [t.detach().double().requires_grad_() for t in x]
    found = outputs_and_gradients(performer_block_attention, x, backend="torch", **kwargs)
    same = outputs_and_gradients(performer_block_attention_reference, x, **kwargs)
    right = outputs_and_gradients(performer_block_attention_reference, exact, **kwargs)
    assert_as_good_as_pytorch(found, same, right, NAMES)


def test_what_a_masked_key_holds_is_never_read():
    x, kwargs = inputs("ragged")
    q, k, v, omega, log_weights = (t.detach() for t in x)
    mask = padding(q.shape[2])
    clean = performer_block_attention(q, k, v, omega, log_weights, key_padding_mask=mask, **kwargs)
    k, v = (t.masked_fill(~mask[:, None, :, None], math.nan) for t in (k, v))
    found = performer_block_attention(q, k, v, omega, log_weights, key_padding_mask=mask, **kwargs)
    assert torch.equal(found, clean)
    assert (found[0] == 0).all()


def test_blocks_beyond_the_last_offset_take_its_weight():
    grid, omega = (12,), orthogonal_features(16, 8)
    q, k, v = torch.randn(3, 1, 2, 12, 8, generator=torch.Generator().manual_seed(0))
    short = torch.tensor([0.3, 0.0, -1.0]).expand(1, 2, 3)
    long = torch.tensor([0.3] * 5 + [0.0] + [-1.0] * 5).expand(1, 2, 11)
    found = [performer_block_attention(q, k, v, omega, w, grid=grid, block=(2,)) for w in (short, long)]
    torch.testing.assert_close(*found)


def test_keys_of_one_block_that_outweigh_all_others():
    """exp(60) between blocks: their states have one scale, and the light ones are read where they weigh most."""
    grid, omega = (4, 4), orthogonal_features(64, 8).double()
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 16, 8, generator=generator, dtype=torch.float64)
    k[:, :, :2] *= 6
    log_weights = torch.full((2, 1, 3), -40.0, dtype=torch.float64)
    log_weights[..., 1] = 0
    kwargs = {"grid": grid, "block": (2, 2)}
    found = performer_block_attention(q, k, v, omega, log_weights, **kwargs)
    torch.testing.assert_close(found, performer_block_attention_reference(q, k, v, omega, log_weights, **kwargs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (4, 6, 5)}, r"grid=\(4, 6, 5\) behind prefix_tokens=0 must be the 96 tokens of q"),
        ({"block": (2, 2)}, r"block=\(2, 2\) must be one positive number of tokens for each axis of grid=\(4, 6, 4\)"),
        ({"block": (2, 0, 2)}, r"block=\(2, 0, 2\) must be one positive"),
        ({"prefix_tokens": 1}, r"behind prefix_tokens=1 must be the 96 tokens"),
        ({"feature": "relu"}, r"feature='relu' must be 'softmax' or 'hyperbolic'"),
        ({"log_weights": torch.zeros(3, 2, 4)}, r"log_weights has shape \(3, 2, 4\); it must be \(3, 2, 2 R \+ 1\)"),
    ],
)
def test_bad_arguments_name_themselves(change, message):
    (q, k, v, omega, log_weights), kwargs = inputs("even")
    kwargs = {"log_weights": log_weights, **kwargs, **change}
    with pytest.raises(ValueError, match=message):
        performer_block_attention(q, k, v, omega, **kwargs)


def test_what_one_state_cannot_hold_and_states_by_block_can():
    """512 keys, each asked for by a query of its own block of 8: exact attention finds them, 256 features do not."""
    generator = torch.Generator().manual_seed(0)
    side, block, width = 8, 2, 32
    tokens = side**3
    k = F.normalize(torch.randn(1, 1, tokens, width, generator=generator), dim=-1) * 3 * width**0.25
    v = torch.randn(1, 1, tokens, width, generator=generator)
    place = torch.cartesian_prod(*[torch.arange(side) // block] * 3) @ torch.tensor([100, 10, 1])
    asked = [torch.nonzero(place == mine).flatten() for mine in place]
    pick = torch.stack([keys[torch.randint(len(keys), (), generator=generator)] for keys in asked])
    q, omega = k[:, :, pick], orthogonal_features(256, width)

    def found(out: Tensor) -> float:
        return (torch.cdist(out[0, 0], v[0, 0]).argmin(-1) == pick).double().mean().item()

    near = torch.full((3, 1, 3), -6.0)
    near[..., 1] = 0
    assert found(F.scaled_dot_product_attention(q, k, v)) > 0.95
    assert found(performer_attention(q, k, v, omega)) < 0.1
    assert found(performer_block_attention(q, k, v, omega, near, grid=(side,) * 3, block=(block,) * 3)) > 0.85


@pytest.mark.parametrize(("dims", "size"), [(3, (16, 24, 20)), (2, (24, 20))])
def test_a_backbone_learns_its_weights_and_goes_through_a_file(tmp_path, dims, size):
    config = BackboneConfig(
        dims=dims, width=16, depth=2, heads=2, patch_size=4, patch_stride=4, state_blocks=2, classes=3
    )
    model = Backbone(config)
    x = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(0))
    model.forward_features(x).patches.square().mean().backward()
    weights = [p for name, p in model.named_parameters() if name.endswith("block_log_weights")]
    assert len(weights) == 2
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in weights)
    assert weights[0].shape == (dims, 2, 17)
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert again.config.state_blocks == 2
    assert torch.equal(again.eval()(x), model.eval()(x))
    rows = model.attention_map(x)
    assert rows.shape == (2, 2, *model.grid_of(size))
    assert (rows >= 0).all()


def test_near_tokens_weigh_more_at_the_start():
    torch.manual_seed(0)
    attention = PerformerAttention(16, 2, state_blocks=(2,))
    rows = attention.attention_rows(torch.zeros(1, 8, 16), [0], grid=(8,))[0, 0, 0]
    expected = torch.tensor([1, 1, *[math.exp(-0.5)] * 2, *[math.exp(-1)] * 2, *[math.exp(-1.5)] * 2])
    torch.testing.assert_close(rows, expected / expected.sum())


def test_errors_of_the_module():
    with pytest.raises(ValueError, match="has no causal form"):
        PerformerAttention(16, 2, state_blocks=(2,), causal=True)
    with pytest.raises(ValueError, match="needs `grid`"):
        PerformerAttention(16, 2, state_blocks=(2,))(torch.zeros(1, 8, 16))
    with pytest.raises(ValueError, match="state_blocks=3 needs attention='performer', not 'softmax'"):
        BackboneConfig(attention="softmax", state_blocks=3)
    with pytest.raises(ValueError, match="state_blocks=0 must be"):
        BackboneConfig(state_blocks=0)


def test_half_precision_of_autocast_and_a_copy():
    config = BackboneConfig(dims=3, width=16, depth=1, heads=2, patch_size=4, patch_stride=4, state_blocks=2)
    model = copy.deepcopy(Backbone(config)).eval()
    x = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model.forward_features(x).patches
        with torch.autocast("cpu", torch.bfloat16):
            found = model.forward_features(x).patches
    assert (found.float() - exact).norm() < 0.05 * exact.norm()
