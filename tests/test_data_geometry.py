"""The affine of a stack of slices is recovered from header numbers alone, whatever its direction."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medformer.data import ScanError, Volume, read_volume, write_dicom_series
from medformer.data.geometry import axis_codes, check_affine, closest_ras, cluster_orientations, stack_slices

unit = st.floats(-1, 1, allow_nan=False)
quaternions = st.tuples(unit, unit, unit, unit).filter(lambda q: np.linalg.norm(q) > 0.2)
lengths = st.floats(0.2, 6.0)


def rotation(quaternion: tuple[float, ...]) -> np.ndarray:
    w, x, y, z = np.array(quaternion) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


@settings(max_examples=150, deadline=None)
@given(
    quaternion=quaternions,
    spacing=st.tuples(lengths, lengths, lengths),
    tilt=st.tuples(st.floats(-0.5, 0.5), st.floats(-0.5, 0.5)),
    origin=st.tuples(*[st.floats(-500, 500)] * 3),
    count=st.integers(2, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_oblique_sheared_shuffled_stack_is_recovered(
    quaternion: tuple[float, ...],
    spacing: tuple[float, float, float],
    tilt: tuple[float, float],
    origin: tuple[float, float, float],
    count: int,
    seed: int,
) -> None:
    frame = rotation(quaternion)
    step = spacing[2] * (frame @ [tilt[0], tilt[1], 1.0])
    positions = np.array(origin) + np.arange(count)[:, None] * step
    shuffle = np.random.default_rng(seed).permutation(count)
    stack = stack_slices(positions[shuffle], frame[:, :2].T.ravel(), (spacing[0], spacing[1]))
    lps = np.eye(4)
    lps[:3, :3] = np.stack([frame[:, 0] * spacing[1], frame[:, 1] * spacing[0], step], axis=1)
    lps[:3, 3] = origin
    np.testing.assert_allclose(stack.affine, np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps, atol=1e-8)
    assert [shuffle[g[0]] for g in stack.groups] == list(range(count))
    assert stack.tilt_deg == pytest.approx(np.degrees(np.arctan(np.hypot(*tilt))), abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(4, 30), seed=st.integers(0, 2**32 - 1), spacing=lengths)
def test_losing_any_inner_slice_is_refused(count: int, seed: int, spacing: float) -> None:
    frame = rotation((0.9, 0.1, -0.3, 0.2))
    positions = np.arange(count)[:, None] * spacing * frame[:, 2]
    lost = int(np.random.default_rng(seed).integers(1, count - 1))
    with pytest.raises(ScanError, match="slices missing"):
        stack_slices(np.delete(positions, lost, axis=0), frame[:, :2].T.ravel(), (1.0, 1.0))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(3, 30), seed=st.integers(0, 2**32 - 1), push=st.floats(0.15, 0.85))
def test_moving_any_slice_by_a_seventh_of_a_step_is_refused(count: int, seed: int, push: float) -> None:
    positions = np.zeros((count, 3))
    positions[:, 2] = np.arange(count) * 2.0
    positions[int(np.random.default_rng(seed).integers(1, count - 1)), 2] += push * 2.0
    with pytest.raises(ScanError, match=r"uneven slices|slices missing"):
        stack_slices(positions, np.array([1.0, 0, 0, 0, 1, 0]), (1.0, 1.0))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(quaternion=quaternions, spacing=st.tuples(lengths, lengths, lengths), seed=st.integers(0, 2**32 - 1))
def test_written_series_reads_back_to_the_same_voxels_and_affine(
    tmp_path_factory: pytest.TempPathFactory,
    quaternion: tuple[float, ...],
    spacing: tuple[float, float, float],
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = rotation(quaternion) * np.array(spacing)
    affine[:3, 3] = rng.uniform(-300, 300, 3)
    voxels = rng.integers(-1024, 3071, (4, 3, 5)).astype(np.int16)
    volume = Volume(voxels=voxels, affine=affine, modality="CT", units="HU", notes=(), source="made").canonical()
    folder: Path = tmp_path_factory.mktemp("series") / "s"
    write_dicom_series(volume, folder)
    again = read_volume(folder)
    np.testing.assert_array_equal(again.voxels, volume.voxels)
    np.testing.assert_allclose(again.affine, volume.affine, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(quaternion=quaternions, spacing=st.tuples(lengths, lengths, lengths), mirror=st.booleans())
def test_canonical_keeps_every_voxel_in_place(
    quaternion: tuple[float, ...], spacing: tuple[float, float, float], mirror: bool
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = rotation(quaternion) * np.array(spacing) * np.array([-1.0 if mirror else 1.0, 1, 1])
    affine[:3, 3] = [5, -7, 11]
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    volume = Volume(voxels=voxels, affine=affine, modality="MR", units="arbitrary", notes=(), source="made")
    turned = volume.canonical()
    assert turned.orientation == "RAS"
    for value in range(24):
        z, y, x = np.argwhere(voxels == value)[0]
        tz, ty, tx = np.argwhere(turned.voxels == value)[0]
        np.testing.assert_allclose(turned.affine @ [tx, ty, tz, 1], affine @ [x, y, z, 1], atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(quaternion=quaternions, spacing=st.tuples(lengths, lengths, lengths))
def test_axis_codes_agree_with_nibabel_away_from_ties(
    quaternion: tuple[float, ...], spacing: tuple[float, float, float]
) -> None:
    frame = rotation(quaternion)
    strongest = np.sort(np.abs(frame), axis=0)
    affine = np.eye(4)
    affine[:3, :3] = frame * np.array(spacing)
    # Where each axis clearly runs along one direction there is only one right answer.
    clear = bool((strongest[2] > 0.8).all())
    assert axis_codes(affine) == "".join(nib.orientations.aff2axcodes(affine)) or not clear


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (np.zeros((4, 4)), "must be 0 0 0 1"),
        (np.diag([1.0, 1.0, 0.0, 1.0]), "singular"),
        (np.full((4, 4), np.nan), "finite"),
        (np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "singular"),
    ],
)
def test_affines_without_volume_are_refused(bad: np.ndarray, reason: str) -> None:
    with pytest.raises(ScanError, match=reason):
        check_affine(bad, "x.nii")


def test_closest_ras_of_a_permuted_grid() -> None:
    affine = np.zeros((4, 4))
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = -3, 2, 1, 1
    assert closest_ras(affine) == ((1, 2, 0), (False, False, True))
    assert axis_codes(affine) == "IRA"


def test_clusters_do_not_split_rounding() -> None:
    rows = np.array([[0.00005, 1.0], [0.0, 1.0], [0.00015, 1.0], [0.1, 1.0]])
    np.testing.assert_array_equal(cluster_orientations(rows, 1.5e-4), [0, 0, 0, 1])


def test_messages_are_one_line() -> None:
    assert "\n" not in str(ScanError("a\n  b"))


@pytest.mark.parametrize(
    ("step", "off", "even"),
    [(10.0, 0.18, True), (10.0, 0.23, False), (1.0, 0.055, True), (1.0, 0.07, False), (0.3, 0.028, True),
     (0.3, 0.035, False)],
)  # fmt: skip
def test_a_slice_may_lie_off_by_what_the_docstring_says(step: float, off: float, even: bool) -> None:
    """2 % of the step, 0.06 mm where that is more, and never more than a tenth of the step."""
    positions = np.zeros((41, 3))
    positions[:, 2] = np.arange(41) * step
    positions[20, 2] += off
    with nullcontext() if even else pytest.raises(ScanError, match="uneven slices"):
        stack_slices(positions, np.array([1.0, 0, 0, 0, 1, 0]), (1.0, 1.0))
