"""Crops and augmentations: where they come from, and that a sample never depends on its neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from views import Plan, ViewsConfig, draw, region_size, render, through_plane_axis

CPU = torch.device("cpu")
EVEN: dict[str, Any] = {"global_scale": (1.0, 1.0), "local_scale": (1.0, 1.0), "through_plane_scale": (1.0, 1.0)}
PLAIN: dict[str, Any] = {"contrast": 0.0, "gamma": 0.0, "noise": 0.0, "blur": 0.0, "flip": (0.0, 0.0, 0.0)}
SMALL = ViewsConfig(global_size=(8, 10, 12), local_size=(5, 6, 4), local_views=3)


def scan(shape: tuple[int, int, int] = (20, 24, 28), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float16)


def plan(voxels: np.ndarray, config: ViewsConfig, seed: int = 0, spacing: tuple = (1.0, 1.0, 1.0)) -> Plan:
    points = np.argwhere(voxels > 0.5).astype(np.int32)
    return draw(voxels, spacing, points, 0.5, config, (seed,))


def test_views_have_the_sizes_asked_for_view_by_view() -> None:
    batch = default_collate([plan(scan(), SMALL, seed) for seed in range(4)])
    far, near = render(batch, SMALL, CPU)
    assert far.shape == (2 * 4, 1, 8, 10, 12)
    assert near.shape == (3 * 4, 1, 5, 6, 4)
    assert torch.isfinite(far).all()
    second = render(default_collate([plan(scan(), SMALL, 1)]), SMALL, CPU)[0]
    torch.testing.assert_close(far[[1, 5]], second)  # views of scan 1: first of each view's block of 4


def test_a_sample_is_the_same_in_any_batch() -> None:
    plans = [plan(scan(seed=seed), SMALL, seed) for seed in range(3)]
    together = render(default_collate(plans), SMALL, CPU)
    alone = [render(default_collate([p]), SMALL, CPU) for p in plans]
    for group in range(2):
        views = together[group].unflatten(0, (-1, 3))
        for i in range(3):
            torch.testing.assert_close(views[:, i], alone[i][group])


def test_drawing_depends_on_the_seed_alone() -> None:
    first = plan(scan(), SMALL, 7)
    again, other = plan(scan(), SMALL, 7), plan(scan(), SMALL, 8)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.boxes, other.boxes)


def test_a_crop_at_scale_one_without_changes_is_the_scan_itself() -> None:
    config = ViewsConfig(global_size=(6, 6, 6), local_views=0, **EVEN, **PLAIN)
    whole = np.arange(6**3, dtype=np.float16).reshape(6, 6, 6)
    (views,) = render(default_collate([plan(whole, config)]), config, CPU)
    torch.testing.assert_close(views[0, 0], torch.from_numpy(whole).float(), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_flip_mirrors_its_axis_only(axis: int) -> None:
    chances = tuple(float(a == axis) for a in range(3))
    config = ViewsConfig(global_size=(6, 7, 8), local_views=0, **EVEN, **{**PLAIN, "flip": chances})
    whole = scan((6, 7, 8))
    (views,) = render(default_collate([plan(whole, config)]), config, CPU)
    expected = torch.from_numpy(whole).float().flip(axis)
    torch.testing.assert_close(views[0, 0], expected, atol=1e-3, rtol=1e-5)


def test_resizing_keeps_a_ramp_a_ramp_in_both_directions() -> None:
    ramp = np.broadcast_to(np.arange(40, dtype=np.float16)[:, None, None], (40, 40, 40)).copy()
    for scale in (0.5, 2.0):
        size = int(16 / scale)
        config = ViewsConfig(
            global_size=(size, size, size), local_views=0, **{**EVEN, "through_plane_scale": (scale, scale)},
            **PLAIN, min_foreground=0.0,
        )  # fmt: skip
        (views,) = render(default_collate([plan(ramp, config)]), config, CPU)
        profile = views[0, 0, :, 0, 0]
        inner = profile[1:-1].diff()
        torch.testing.assert_close(inner, torch.full_like(inner, scale), atol=1e-3, rtol=1e-3)


def test_shrinking_averages_instead_of_skipping() -> None:
    stripes = np.zeros((16, 16, 16), np.float16)
    stripes[::2] = 1.0
    config = ViewsConfig(global_size=(8, 16, 16), local_views=0, **{**EVEN, "through_plane_scale": (2, 2)}, **PLAIN)
    (views,) = render(default_collate([plan(stripes, config)]), config, CPU)
    torch.testing.assert_close(views[0, 0, 1:-1], torch.full((6, 16, 16), 0.5), atol=0.01, rtol=0.0)


def test_boxes_stay_inside_the_scan() -> None:
    for seed in range(50):
        p = plan(scan((9, 40, 13)), SMALL, seed)
        start, size = p.boxes[:, :3], p.boxes[:, 3:]
        assert (start >= 0).all()
        assert (start + size <= p.extent + 1e-4).all()
        assert p.region.shape == region_size(SMALL)


def test_through_plane_scale_follows_the_thickest_voxels() -> None:
    assert through_plane_axis((1.0, 1.0, 1.0)) == 0
    assert through_plane_axis((5.0, 0.7, 0.7)) == 0
    assert through_plane_axis((0.7, 0.7, 5.0)) == 2
    assert through_plane_axis((1.0, 1.05, 1.0)) == 0
    config = ViewsConfig(global_size=(8, 8, 8), local_views=0, global_scale=(2.0, 2.0), through_plane_scale=(1.0, 1.0))
    p = plan(scan((40, 40, 40)), config, spacing=(0.7, 0.7, 5.0))
    assert p.boxes[0, 3:] == pytest.approx([16.0, 16.0, 8.0])


def test_crops_avoid_air() -> None:
    voxels = np.zeros((40, 40, 40), np.float16)
    voxels[28:36, 4:12, 28:36] = 1.0
    sizes: dict[str, Any] = {"global_size": (10, 10, 10), "local_size": (4, 4, 4), "local_views": 4}
    shares = []
    for least in (0.5, 0.0):
        config = ViewsConfig(**sizes, **EVEN, **PLAIN, min_foreground=least)
        plans = default_collate([plan(voxels, config, seed) for seed in range(20)])
        shares.append((render(plans, config, CPU)[1] > 0.5).float().mean().item())
    careful, blind = shares
    assert careful > blind + 0.15
    nowhere = draw(voxels, (1, 1, 1), np.empty((0, 3), np.int32), 2.0, ViewsConfig(**sizes), (0,))
    assert np.isfinite(nowhere.boxes).all()  # a scan without tissue is still cut


def test_a_single_slice_is_padded_with_itself() -> None:
    config = ViewsConfig(global_size=(6, 8, 8), local_size=(3, 4, 4), local_views=1, **EVEN, **PLAIN)
    far, _ = render(default_collate([plan(scan((1, 16, 16)), config)]), config, CPU)
    torch.testing.assert_close(far, far[:, :, :1].expand_as(far))


def test_noise_and_contrast_change_a_view_and_nothing_else_does() -> None:
    batch = default_collate([plan(scan(), SMALL, 3)])
    quiet = default_collate([plan(scan(), ViewsConfig(**{**vars(SMALL), **PLAIN, "flip": SMALL.flip}), 3)])
    assert torch.equal(batch.boxes, quiet.boxes)
    assert not torch.equal(render(batch, SMALL, CPU)[0], render(quiet, SMALL, CPU)[0])
    assert torch.equal(render(batch, SMALL, CPU)[0], render(batch, SMALL, CPU)[0])


def test_blur_smooths_and_keeps_the_mean() -> None:
    base = default_collate([plan(scan(), ViewsConfig(**{**vars(SMALL), **PLAIN}), 3)])
    soft = base._replace(intensity=base.intensity.clone())
    soft.intensity[..., 4] = 1.0
    sharp_view, soft_view = (render(b, SMALL, CPU)[0] for b in (base, soft))
    assert soft_view.std() < 0.7 * sharp_view.std()
    assert (soft_view.mean() - sharp_view.mean()).abs() < 0.05


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"global_size": (0, 8, 8)}, "--views.global_size 0x8x8"),
        ({"global_scale": (2.0, 1.0)}, "--views.global_scale 2.0,1.0"),
        ({"flip": (0.0, 0.0, 1.5)}, "--views.flip"),
        ({"local_views": -1}, "--views.local_views -1"),
        ({"blur": 9.0}, "--views.blur 9.0"),
    ],
)
def test_impossible_settings_name_their_flag(values: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ViewsConfig(**values)
