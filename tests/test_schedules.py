"""Schedules, parameter groups and gradient clipping of the trainer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from schedules import OptimConfig, clip_per_tensor, cosine, linear, parameter_groups


def test_cosine_starts_warm_and_ends_at_its_end() -> None:
    values = [cosine(step, 100, 1.0, 0.1, warmup=10) for step in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == values[10] == 1.0
    assert values[55] == pytest.approx(0.55)
    assert values[100] == pytest.approx(0.1)
    assert cosine(500, 100, 1.0, 0.1) == pytest.approx(0.1)


@given(st.integers(1, 500), st.floats(0.9, 0.999), st.data())
def test_momentum_schedule_only_rises(steps: int, start: float, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, steps))
    assert start - 1e-9 <= cosine(step, steps, start, 1.0) <= cosine(step + 1, steps, start, 1.0) + 1e-12 <= 1.0 + 1e-9


def test_linear_reaches_its_end_and_stays() -> None:
    assert [linear(step, 4, 0.04, 0.08) for step in (0, 2, 4, 9)] == pytest.approx([0.04, 0.06, 0.08, 0.08])
    assert linear(0, 0, 0.04, 0.07) == 0.07


def test_biases_and_norms_are_not_decayed_but_tables_are() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(3, 2), "norm": nn.LayerNorm(2)})
    model.register_parameter("table", nn.Parameter(torch.zeros(4, 2)))
    model.register_parameter("frozen", nn.Parameter(torch.zeros(4, 2), requires_grad=False))
    decayed, plain = parameter_groups(model)
    assert decayed["decay"]
    assert not plain["decay"]
    assert {id(p) for p in decayed["params"]} == {id(model["linear"].weight), id(model.table)}
    assert len(plain["params"]) == 3


def test_clipping_looks_at_each_tensor_for_itself() -> None:
    a, b, c = (nn.Parameter(torch.zeros(4)) for _ in range(3))
    a.grad, b.grad = torch.full((4,), 5.0), torch.full((4,), 0.5)
    norm = clip_per_tensor([a, b, c], 3.0)
    assert norm.item() == pytest.approx(math.sqrt(101.0))
    assert a.grad.norm().item() == pytest.approx(3.0, rel=1e-5)
    assert torch.equal(b.grad, torch.full((4,), 0.5))
    assert c.grad is None


def test_no_clipping_leaves_gradients_alone_and_still_tells_their_norm() -> None:
    a = nn.Parameter(torch.zeros(4))
    a.grad = torch.full((4,), 50.0)
    assert clip_per_tensor([a], 0.0).item() == pytest.approx(100.0)
    assert torch.equal(a.grad, torch.full((4,), 50.0))


def test_norm_of_a_gradient_with_nan_is_not_finite() -> None:
    a = nn.Parameter(torch.zeros(2))
    a.grad = torch.tensor([1.0, float("nan")])
    assert not math.isfinite(clip_per_tensor([a], 3.0).item())


@pytest.mark.parametrize(("name", "value"), [("lr", 0.0), ("clip", -1.0), ("warmup", 1.5), ("weight_decay", -0.1)])
def test_impossible_settings_name_their_flag(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"--optim.{name} {value}"):
        OptimConfig(**{name: value})
