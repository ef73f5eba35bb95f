"""Crops and augmentations: where they come from, and that a sample never depends on its neighbours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

import augment
import views as views_module
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
            global_size=(size, size, size),
            local_views=0,
            **{**EVEN, "through_plane_scale": (scale, scale)},
            **PLAIN,
            min_foreground=0.0,
        )
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
    assert not torch.equal(render(batch, SMALL, CPU)[0], render(batch._replace(seed=batch.seed + 1), SMALL, CPU)[0])


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


def blob(size: tuple[int, int, int] = (9, 11, 13)) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.nn.functional.avg_pool3d(torch.randn(1, *size), 3, 1, 1)


def rows(count: int = 1, **values: float) -> torch.Tensor:
    plain = dict.fromkeys(augment.CHANGES, 0.0) | {"contrast": 1.0, "gamma": 1.0, "coarse": 1.0} | values
    return torch.tensor([[plain[name] for name in augment.CHANGES]] * count)


def changed(x: torch.Tensor, seed: int = 0, **values: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    grain, second = (torch.randn(x.shape, generator=generator) for _ in range(2))
    knots = torch.randn(len(x), augment.field_numbers(), generator=generator)
    return augment.change(x, rows(len(x), **values), grain, second, knots)


def test_a_row_of_zeros_and_ones_changes_nothing() -> None:
    torch.testing.assert_close(changed(blob()), blob())


def test_windowing_clips_and_nothing_else() -> None:
    x = 3 * blob()
    torch.testing.assert_close(changed(x, window_low=-0.5, window_high=0.7), x.clamp(-0.5, 0.7))


def test_coarse_views_hold_the_means_of_cells() -> None:
    x = torch.randn(1, 4, 4, 4)
    cells = torch.nn.functional.avg_pool3d(x[None], 2)[0].repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(changed(x, coarse=2.0), cells.repeat_interleave(2, 3))


def test_blur_is_a_gaussian_of_the_views_own_width() -> None:
    x, sigma = torch.randn(2, 9, 10, 11), torch.tensor([0.6, 1.4])
    generator = torch.Generator().manual_seed(0)
    both = torch.cat([rows(blur=float(s)) for s in sigma])
    found = augment.change(x, both, torch.randn(x.shape, generator=generator), None, torch.zeros(2, 0))
    for view, s in enumerate(sigma):
        taps = torch.exp(-0.5 * (torch.arange(-3.0, 4.0) / s) ** 2)
        taps = torch.einsum("i,j,k->ijk", taps, taps, taps)
        padded = torch.nn.functional.pad(x[view, None, None], (3,) * 6, mode="replicate")
        expected = torch.nn.functional.conv3d(padded, taps[None, None] / taps.sum())[0, 0]
        torch.testing.assert_close(found[view], expected)


def test_blur_while_cutting_is_blur_after_cutting() -> None:
    """Both are one product along each axis, unless a warp or a window comes between them."""
    config = ViewsConfig(**{**vars(SMALL), "blur": 1.5, "coarse": 2.5})
    plans = default_collate([plan(scan(), config, seed) for seed in range(4)])
    assert (plans.intensity[..., augment.CHANGES.index("coarse")] > 1).any()
    apart = replace(config, window=0.2)  # which no scan that is not CT has, so that nothing else differs
    for together, after in zip(render(plans, config, CPU), render(plans, apart, CPU), strict=True):
        torch.testing.assert_close(together, after)


def test_a_window_clips_before_anything_is_blurred() -> None:
    stripes = np.zeros((12, 12, 12), np.float16)
    stripes[..., ::2] = 50.0
    config = ViewsConfig(global_size=(12, 12, 12), local_views=0, window=0.2, **EVEN, **PLAIN)
    batch = default_collate([draw(stripes, (1, 1, 1), np.argwhere(stripes > 1), 1.0, config, (0,), 0, "CT")])
    batch.intensity[..., augment.CHANGES.index("blur")] = 1.5
    (views,) = render(batch, config, CPU)
    assert views.max() < 1.5  # the middle of 0 and at most 2, not of 0 and 50


def test_what_no_view_asks_for_is_not_done() -> None:
    x = torch.randn(2, 4, 5, 6)
    assert augment.change(x, rows(2), x, None, x) is x
    assert augment.asked(rows(2)) == set()
    assert augment.asked(torch.cat([rows(), rows(noise=0.1, window_high=0.3)])) >= {"noise", "window"}


def test_bias_is_smooth_positive_and_leaves_the_darkest_dark() -> None:
    x = torch.rand(1, 16, 16, 16) + 1
    x[0, 0, 0, 0] = 0.0
    y = changed(x, bias=0.5)
    gain = (y / x)[0, 1:, 1:, 1:]
    assert y[0, 0, 0, 0].item() == pytest.approx(0.0, abs=1e-6)
    assert (gain > 0).all()
    assert gain.std() > 0.05
    assert gain.diff(dim=0).abs().max() < 0.5 * (gain.max() - gain.min())


def test_rician_noise_is_the_magnitude_of_a_complex_one() -> None:
    x = torch.zeros(1, 24, 24, 24)
    x[:, :, :, 12:] = 1.0
    gauss, rice = changed(x, noise=0.3), changed(x, noise=0.3, rician=1.0)
    sigma = 0.3 * x.std(correction=0).item()
    air = rice[..., :12]
    assert (rice >= -1e-6).all()
    assert (gauss < -0.1).any()
    assert air.mean().item() == pytest.approx(sigma * (torch.pi / 2) ** 0.5, rel=0.03)  # Rayleigh
    assert rice[..., 12:].mean().item() == pytest.approx((1 + sigma**2) ** 0.5, abs=0.02)


def test_a_warp_by_nothing_is_nothing_and_a_quarter_turn_turns() -> None:
    x = torch.randn(2, 5, 8, 8)
    knots = torch.randn(2, augment.field_numbers())
    none = torch.zeros(2)
    still = augment.warp(x, torch.eye(3).expand(2, 3, 3), none, knots)
    torch.testing.assert_close(still, x, atol=1e-5, rtol=1e-5)
    turn = torch.tensor(augment.rotation((90.0, 0.0, 0.0))).expand(2, 3, 3)
    turned = augment.warp(x, turn, none, knots)
    assert any(torch.allclose(turned, torch.rot90(x, k, (2, 3)), atol=1e-4) for k in (1, 3))


def test_turns_are_in_millimetres() -> None:
    """Voxels of 4 x 1 x 1 mm: half a turn about x mirrors z and y; a quarter turn takes 4 voxels in y to 1 in z."""
    config = ViewsConfig(rotate=(0.0, 0.0, 90.0))
    rng = np.random.default_rng(0)
    matrix = views_module._warp(rng, config, np.array([4.0, 1.0, 1.0]))
    physical = np.diag([4.0, 1.0, 1.0]) @ matrix @ np.diag([0.25, 1.0, 1.0])
    np.testing.assert_allclose(physical @ physical.T, np.eye(3), atol=1e-6)
    assert abs(matrix[1, 0]) > abs(matrix[0, 1])


def test_elastic_bends_smoothly_by_about_its_deviation() -> None:
    ramp = torch.arange(32.0).expand(1, 32, 32, 32)
    knots = torch.randn(1, augment.field_numbers(), generator=torch.Generator().manual_seed(1))
    moved = augment.warp(ramp, torch.eye(3)[None], torch.tensor([1.5]), knots) - ramp
    inner = moved[0, 6:-6, 6:-6, 6:-6]
    assert 0.3 < inner.std() < 3.0
    assert inner.diff(dim=0).abs().max() < 1.0


def test_every_change_is_reproducible_in_any_batch() -> None:
    config = ViewsConfig(
        **{**vars(SMALL), "rotate": (20.0, 10.0, 10.0), "shear": 0.1, "elastic": 1.0, "rician": True, "bias": 0.4,
           "window": 0.2, "coarse": 2.0}
    )  # fmt: skip
    plans = [
        draw(
            scan(seed=s), (3.0, 1.0, 1.0), np.argwhere(scan(seed=s) > 0.5), 0.5, config, (s,), s, ("CT", "MR", "PT")[s]
        )
        for s in range(3)
    ]
    together = render(default_collate(plans), config, CPU)
    for i, p in enumerate(plans):
        alone = render(default_collate([p]), config, CPU)
        for group in range(2):
            torch.testing.assert_close(together[group].unflatten(0, (-1, 3))[:, i], alone[group])
            assert alone[group].isfinite().all()


def test_windows_are_for_ct_bias_and_rician_noise_are_not() -> None:
    config = ViewsConfig(**{**vars(SMALL), "window": 0.2, "bias": 0.4, "rician": True})
    drawn = {m: draw(scan(), (1, 1, 1), np.argwhere(scan() > 0.5), 0.5, config, (0,), 0, m) for m in ("CT", "MR", "PT")}
    column = {m: dict(zip(augment.CHANGES, p.intensity.T, strict=True)) for m, p in drawn.items()}
    assert (column["CT"]["window_high"] > column["CT"]["window_low"]).all()
    assert (column["MR"]["window_high"] == column["MR"]["window_low"]).all()
    assert not column["CT"]["bias"].any()
    assert column["MR"]["bias"].all()
    assert [bool(column[m]["rician"].all()) for m in ("CT", "MR", "PT")] == [False, True, False]


def test_views_of_an_image_stay_flat() -> None:
    config = ViewsConfig(
        global_size=(1, 12, 12), local_size=(1, 6, 6), rotate=(30.0, 0.0, 0.0), shear=0.1, elastic=0.5, coarse=2.0
    )
    plans = default_collate([plan(scan((1, 30, 30), seed), config, seed) for seed in range(2)])
    far, near = render(plans, config, CPU)
    assert far.shape == (4, 1, 1, 12, 12)
    assert near.shape == (4, 1, 1, 6, 6)
    assert far.isfinite().all()
    assert far.std() > 0.1


def test_turns_are_about_z_then_y_then_x() -> None:
    turns = [augment.rotation(degrees) for degrees in ((20.0, 0.0, 0.0), (0.0, 35.0, 0.0), (0.0, 0.0, 50.0))]
    np.testing.assert_allclose(augment.rotation((20.0, 35.0, 50.0)), turns[2] @ turns[1] @ turns[0], atol=1e-12)


def test_noise_is_a_share_of_the_view_whatever_its_contrast() -> None:
    x = torch.randn(2, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    grain = torch.randn(2, 216, generator=torch.Generator().manual_seed(1))
    for contrast in (0.7, 1.0, 1.3):
        row = {"contrast": contrast, "gamma": 1.0, "coarse": 1.0}
        quiet = torch.tensor([[row.get(name, 0.0) for name in augment.CHANGES]] * 2)
        noisy = quiet.clone()
        noisy[:, augment.CHANGES.index("noise")] = 0.2
        knots = torch.zeros(2, augment.field_numbers())
        added = augment.change(x, noisy, grain, None, knots) - augment.change(x, quiet, grain, None, knots)
        expected = 0.2 * x.flatten(1).std(1, correction=0)[:, None] * grain
        torch.testing.assert_close(added.flatten(1), expected, rtol=1e-4, atol=1e-5)
