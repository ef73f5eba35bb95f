"""Schedules of the trainer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medformer.schedules import cosine, linear


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
