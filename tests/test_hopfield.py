"""Modern Hopfield networks: what is retrieved, and when a state rests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medformer import HopfieldAttention, HopfieldLayer, HopfieldLookup, HopfieldPooling, SoftmaxAttention
from medformer.hopfield import hopfield_retrieve

HEADS, WIDTH = 2, 16


def patterns(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def betas(value: float) -> Tensor:
    return torch.full((HEADS,), value, dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 5, None])
def test_a_stored_pattern_is_retrieved_at_large_beta(steps: int | None) -> None:
    stored = patterns(1, HEADS, 20, 32)
    noisy = stored + 0.5 * patterns(1, HEADS, 20, 32, seed=1)
    found = hopfield_retrieve(noisy, stored, stored, betas(8.0), steps=steps)
    torch.testing.assert_close(found, stored, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [0, 1, None])
def test_the_mean_is_retrieved_at_small_beta(steps: int | None) -> None:
    stored, state = patterns(1, HEADS, 20, 32), patterns(1, HEADS, 3, 32, seed=1)
    found = hopfield_retrieve(state, stored, stored, betas(1e-8), steps=steps)
    torch.testing.assert_close(found, stored.mean(2, keepdim=True).expand(-1, -1, 3, -1), atol=1e-6, rtol=0)


def test_each_head_has_its_own_beta() -> None:
    stored = patterns(1, HEADS, 20, 32)
    found = hopfield_retrieve(stored, stored, stored, torch.tensor([8.0, 1e-8]).double())
    torch.testing.assert_close(found[:, 0], stored[:, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[:, 1], stored[:, 1].mean(1, keepdim=True).expand(-1, 20, -1), atol=1e-6, rtol=0)


def test_one_missing_half_is_filled_in_by_values() -> None:
    """Keys and values apart: what is stored beside a pattern is read, and not the pattern."""
    stored, values = patterns(1, HEADS, 20, 32), patterns(1, HEADS, 20, 5, seed=2)
    half = stored.clone()
    half[..., 16:] = 0
    found = hopfield_retrieve(half, stored, values, betas(8.0))
    torch.testing.assert_close(found, values, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_updates_are_those_of_the_formula(steps: int) -> None:
    state, stored, values = patterns(2, HEADS, 7, 8), patterns(2, HEADS, 9, 8, seed=1), patterns(2, HEADS, 9, 4, seed=2)
    beta = torch.tensor([0.3, 0.7]).double()
    expected = state
    for _ in range(steps):
        expected = (beta[:, None, None] * expected @ stored.mT).softmax(-1) @ stored
    expected = (beta[:, None, None] * expected @ stored.mT).softmax(-1) @ values
    torch.testing.assert_close(hopfield_retrieve(state, stored, values, beta, steps=steps, tolerance=0.0), expected)


def test_without_a_limit_the_state_is_a_fixed_point() -> None:
    state, stored = patterns(1, HEADS, 30, 8), patterns(1, HEADS, 12, 8, seed=1)
    found = hopfield_retrieve(state, stored, stored, betas(0.8), tolerance=1e-6)
    again = hopfield_retrieve(found, stored, stored, betas(0.8), steps=0)
    torch.testing.assert_close(again, found, atol=1e-6, rtol=0)


def test_a_state_rests_whatever_the_others_do() -> None:
    state, stored = patterns(1, HEADS, 30, 8), patterns(1, HEADS, 12, 8, seed=1)
    together = hopfield_retrieve(state, stored, stored, betas(0.8), tolerance=1e-2)
    alone = torch.cat(
        [hopfield_retrieve(part, stored, stored, betas(0.8), tolerance=1e-2) for part in state.split(1, dim=2)], dim=2
    )
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_comes_to_rest(dtype: torch.dtype) -> None:
    state, stored = patterns(1, HEADS, 30, 8).to(dtype), patterns(1, HEADS, 12, 8, seed=1).to(dtype)
    found = hopfield_retrieve(state, stored, stored, betas(0.8))
    again = hopfield_retrieve(found, stored, stored, betas(0.8), steps=0)
    assert found.dtype == dtype
    assert ((again - found).float().norm(dim=-1) <= 16 * torch.finfo(dtype).eps * found.float().norm(dim=-1)).all()


def test_zero_steps_are_plain_attention() -> None:
    torch.manual_seed(0)
    plain, hopfield = SoftmaxAttention(WIDTH, HEADS).double(), HopfieldAttention(WIDTH, HEADS, steps=0).double()
    hopfield.load_state_dict(plain.state_dict() | {"log_beta": hopfield.log_beta.detach()})
    x = patterns(2, 9, WIDTH)
    torch.testing.assert_close(hopfield(x), plain(x))


FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor, Tensor | None], Tensor]]] = {
    "layer": (
        lambda: HopfieldLayer(WIDTH, HEADS, stored_width=WIDTH),
        lambda m, x, mask: m(patterns(2, 3, WIDTH, seed=4), x, key_padding_mask=mask),
    ),
    "pooling": (lambda: HopfieldPooling(WIDTH, HEADS, queries=3), lambda m, x, mask: m(x, key_padding_mask=mask)),
    "attention": (lambda: HopfieldAttention(WIDTH, HEADS), lambda m, x, mask: m(x, key_padding_mask=mask)),
}


@pytest.mark.parametrize("form", FORMS)
def test_padding_is_never_read_and_every_gradient_flows(form: str) -> None:
    torch.manual_seed(0)
    make, call = FORMS[form]
    module, x = make().double(), patterns(2, 9, WIDTH)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    mask = torch.arange(9)[None] < torch.tensor([[5], [9]])
    out = call(module, x, mask)
    changed = x.clone()
    changed[0, 5:] = torch.nan if form != "attention" else 1e6
    torch.testing.assert_close(call(module, changed, mask)[:, :3], out[:, :3])
    out[:, :3].square().sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []
    if form == "pooling":
        assert out.shape == (2, 3, WIDTH)


def test_lookup_learns_to_retrieve() -> None:
    """Tokens near one of four prototypes are mapped to that prototype's target, through patterns that are learned."""
    torch.manual_seed(0)
    module = HopfieldLookup(WIDTH, HEADS, patterns=8, steps=2)
    prototypes, targets = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        which = torch.randint(4, (16, 5))
        loss = (module(prototypes[which] + 0.1 * torch.randn(16, 5, WIDTH)) - targets[which]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 0.5
    assert sum(losses[-10:]) / 10 < 0.05
    assert module.stored.grad is not None


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (HopfieldAttention, {"steps": -1}, "HopfieldAttention: steps=-1 must be at least 0"),
        (HopfieldAttention, {"steps": None, "tolerance": 0.0}, "tolerance=0.0 must be at least 0, and above it"),
        (HopfieldLayer, {"beta": 0.0}, "HopfieldLayer: beta=0.0 must be above 0"),
        (HopfieldPooling, {"queries": 0}, "queries=0 must be at least 1"),
        (HopfieldLookup, {"patterns": 0}, "patterns=0 must be at least 1"),
    ],
)
def test_bad_options_are_refused(make: Callable[..., nn.Module], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(WIDTH, HEADS, **options)
