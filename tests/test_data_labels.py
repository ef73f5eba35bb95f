"""Labels of data sets: what an outline holds, and what a series is whose slices are not all labelled."""

from __future__ import annotations

import numpy as np
import pytest

from medformer.data.datasets.lidc_idri import Outline, mask_of
from medformer.data.datasets.rsna_ich import _any
from medformer.data.records import NEGATIVE, POSITIVE, UNKNOWN, Record, patient_split


def rectangle(x0: int, x1: int, y0: int, y1: int) -> tuple[tuple[int, int], ...]:
    """Its border, pixel by pixel, as (x, y)."""
    return tuple((x, y) for y in range(y0, y1 + 1) for x in range(x0, x1 + 1) if x in (x0, x1) or y in (y0, y1))


def ordered(points: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Around its middle, as a reader draws."""
    middle = np.mean(points, axis=0)
    return tuple(sorted(points, key=lambda p: float(np.arctan2(p[1] - middle[1], p[0] - middle[0]))))


def test_an_outline_holds_what_lies_inside_it_and_not_itself() -> None:
    """x is the column: the picture, the outline and its place are not symmetric."""
    outline = Outline(1.5, "uid", True, ordered(rectangle(2, 7, 1, 4)))
    expected = np.zeros((12, 10), bool)
    expected[2:4, 3:7] = True
    (z,) = found = mask_of((outline,), 12, 10)
    assert z == 1.5
    np.testing.assert_array_equal(found[z], expected)


def test_a_hole_is_cut_out_with_its_border() -> None:
    outer = Outline(0.0, "uid", True, ordered(rectangle(0, 9, 1, 11)))
    hole = Outline(0.0, "uid", False, ordered(rectangle(2, 5, 4, 8)))
    expected = np.zeros((13, 11), bool)
    expected[2:11, 1:9] = True
    expected[4:9, 2:6] = False
    np.testing.assert_array_equal(mask_of((hole, outer), 13, 11)[0.0], expected)


@pytest.mark.parametrize(
    ("states", "count", "expected"),
    [
        ([NEGATIVE, NEGATIVE], 2, NEGATIVE),
        ([NEGATIVE, NEGATIVE], 3, UNKNOWN),
        ([NEGATIVE, POSITIVE], 3, POSITIVE),
        ([NEGATIVE, UNKNOWN], 2, UNKNOWN),
        ([], 2, UNKNOWN),
    ],
)
def test_a_series_is_negative_only_where_every_slice_is(states: list[str], count: int, expected: str) -> None:
    slices = {f"slice {i}": {"any": state} for i, state in enumerate(states)}
    assert _any(slices, "any", count) == expected


def test_patients_without_an_official_split_are_drawn_by_the_seed() -> None:
    records = [
        Record(dataset="set", patient=f"p{i // 2}", study=str(i), paths=("x",), modality="CT") for i in range(400)
    ]

    def drawn(seed: int, some: list[Record] = records) -> dict[str, set[str]]:
        return {part: {r.patient for r in found} for part, found in patient_split(some, seed=seed).items()}

    first = drawn(0)
    assert first == drawn(0)
    assert sorted(len(patients) for patients in first.values()) == pytest.approx([20, 20, 160], abs=15)
    assert all(first[part] != drawn(1)[part] for part in first)
    fewer = drawn(0, records[:200])
    assert all(fewer[part] <= first[part] for part in first)
