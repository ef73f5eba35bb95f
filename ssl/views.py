"""Multi-crop: global and local views of a scan or image, cut and changed on the training device.

Two halves. `draw` runs where the data is read (numpy, one call a sample) and decides everything random; it sees only
a small region of the scan. `render` runs on the training device (torch, batched) and does the arithmetic: crop, resize,
flip here, warps and intensities in `augment.py`. Both depend on the sample's own seed and on nothing else, so a sample
looks the same in any batch, on any worker and after any restart.

Axes are Z, Y, X; a box is `start, size` in voxels of the region, both fractional. An image is a scan of one slice, and
its views are 1 x Y x X.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import augment
from medformer.channels import flagged

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Plan", "ViewsConfig", "draw", "fitting", "region_size", "render", "through_plane_axis"]

_TRIES = 4  # boxes drawn in search of one that holds more than air
_CT_RANGE = (-2.0, 2.0)  # of normalised CT: HU -1000 to 1000 over 500


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Crops and augmentations. Sizes and per-axis values are in z,y,x order."""

    global_size: tuple[int, int, int] = (24, 32, 32)
    """Voxels of each global view: z,y,x, for instance 24x32x32, or 1x96x96 for images. Scans below it are skipped or
    padded."""
    local_size: tuple[int, int, int] = (16, 16, 16)
    """Voxels of each local view: z,y,x."""
    global_views: int = 2
    """Global views of each scan: 2 for dino and byol, 1 for igpt."""
    local_views: int = 2
    """Local views of each scan (the global ones come on top) [8 in the paper, 2D]. 0 or more; 0 for byol and igpt."""
    global_scale: tuple[float, float] = (0.75, 1.5)
    """In-plane zoom of the global views: voxels of the scan per voxel of the view, lowest and highest. Above 0."""
    local_scale: tuple[float, float] = (0.6, 1.2)
    """In-plane zoom of the local views."""
    through_plane_scale: tuple[float, float] = (0.85, 1.15)
    """Zoom of all views along the axis with the thickest voxels (z in a scan of equal spacing)."""
    min_foreground: float = 0.2
    """Share of a view that should be tissue rather than air; up to four places are tried. 0 to 1."""
    image_side: int = 0
    """Pixels to which the shorter side of each image (--model.dims 2) is resized when it is read, so that a zoom is a
    share of the image whatever its size: at 2 * global_size a zoom of 2 shows the whole side. 0 leaves images as they
    are."""
    flip: tuple[float, float, float] = (0.0, 0.0, 0.5)
    """Chance of a flip along z (feet to head), y (back to front) and x (left to right). 0 to 1 each; 0,0,0 where the
    side matters."""
    rotate: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Largest turn about z (in the axial plane), y and x, in degrees of the patient, whatever the voxels. 0 to 180."""
    shear: float = 0.0
    """Largest shear, in millimetres per millimetre. 0 to 0.5."""
    elastic: float = 0.0
    """Deviation of a smooth random displacement, in voxels of the view. 0 or more."""
    contrast: float = 0.3
    """Largest relative change of contrast, and the largest shift of brightness in standard deviations. 0 to 0.9."""
    gamma: float = 0.3
    """Largest change of ln gamma, applied between each view's darkest and brightest voxel. 0 or more."""
    noise: float = 0.15
    """Largest standard deviation of added noise, in standard deviations of the view. 0 or more."""
    rician: bool = False
    """Noise of MR scans is Rician, as in magnitude images, instead of Gaussian."""
    bias: float = 0.0
    """Largest deviation of the logarithm of a smooth bias field, for scans that are not CT. 0 to 1."""
    window: float = 0.0
    """Largest move inwards of either end of the HU window of CT scans, as a share of its width. 0 to 0.45."""
    coarse: float = 1.0
    """Largest loss of resolution: cells of this many voxels are averaged, for a quarter of the views. 1 or more."""
    blur: float = 1.0
    """Largest width (sigma) of the Gaussian blur, in voxels of the view; used for half of the views. 0 to 1.5."""
    cutmix: float = 0.0
    """Attentive CutMix: share of a global view that is replaced by the cells of another scan to which the teacher pays
    most attention; targets are mixed alike [6/49 = 0.12]. 0 turns it off; at most 0.5."""

    def __post_init__(self) -> None:
        for name in ("global_size", "local_size"):
            if len(getattr(self, name)) != 3 or min(getattr(self, name)) < 1:
                raise ValueError(f"--views.{name} {_by(getattr(self, name))} must be three whole numbers of 1 or more")
        for name in ("global_scale", "local_scale", "through_plane_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"--views.{name} {low},{high} must be a lowest above 0 and a highest not below it")
        if self.global_views not in (1, 2):
            raise ValueError(f"--views.global_views {self.global_views} must be 1 or 2")
        for name in ("local_views", "image_side"):
            if getattr(self, name) < 0:
                raise ValueError(f"--views.{name} {getattr(self, name)} must be 0 or more")
        for name, chances in (("flip", self.flip), ("min_foreground", (self.min_foreground,))):
            if not all(0 <= chance <= 1 for chance in chances):
                raise ValueError(f"--views.{name} {chances} must be between 0 and 1")
        if not all(0 <= degrees <= 180 for degrees in self.rotate):
            raise ValueError(f"--views.rotate {self.rotate} must be between 0 and 180 degrees")
        if not self.coarse >= 1:
            raise ValueError(f"--views.coarse {self.coarse} must be at least 1")
        for name, top in (
            ("contrast", 0.9), ("gamma", math.inf), ("noise", math.inf), ("blur", 1.5), ("shear", 0.5),
            ("elastic", math.inf), ("bias", 1.0), ("window", 0.45), ("cutmix", 0.5),
        ):  # fmt: skip
            if not 0 <= getattr(self, name) <= top:
                raise ValueError(f"--views.{name} {getattr(self, name)} must be between 0 and {top}")

    @property
    def warps(self) -> bool:
        """Whether views are turned, sheared or bent at all."""
        return any(self.rotate) or self.shear > 0 or self.elastic > 0


class Plan(NamedTuple):
    """What was decided for one sample of V views (arrays; a batch of them has one more axis in front)."""

    region: np.ndarray
    """Part of the scan that holds all the views, [Z, Y, X] float16, zero beyond `extent`; of a case of several channels
    [C, Z, Y, X], NaN in one that is missing."""
    extent: np.ndarray
    """Voxels of the region that are real, [3]."""
    boxes: np.ndarray
    """Start and size of each view in the region, [V, 6] float32; global views first."""
    flips: np.ndarray
    """1 where a view is flipped, [V, 3]."""
    intensity: np.ndarray
    """`augment.CHANGES` of each view, [V, P]; of a case of each view and channel, [V, C, P]."""
    warp: np.ndarray
    """Of each view: output voxel (zyx, from its middle) to input voxel, [V, 3, 3]."""
    seed: np.ndarray
    """Seed of the sample's noise, int64."""
    scan: np.ndarray
    """Number of the scan in the training list, int64."""


def _by(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def region_size(config: ViewsConfig) -> tuple[int, int, int]:
    """Voxels of a scan from which one sample is cut: the largest box of any view, on every axis."""
    through = config.through_plane_scale[1]
    sizes = [(config.global_size, config.global_scale[1])]
    if config.local_views:
        sizes.append((config.local_size, config.local_scale[1]))
    z, y, x = (max(math.ceil(size[a] * max(scale, through)) for size, scale in sizes) for a in range(3))
    return z, y, x


def through_plane_axis(spacing_mm: tuple[float, float, float]) -> int:
    """The axis with the thickest voxels; z where they are equal to within 10%."""
    thickest = int(np.argmax(spacing_mm))
    return thickest if spacing_mm[thickest] > 1.1 * spacing_mm[0] else 0


def draw(
    voxels: np.ndarray,
    spacing_mm: tuple[float, float, float],
    points: np.ndarray,
    threshold: float,
    config: ViewsConfig,
    seed: tuple[int, ...],
    scan: int = 0,
    modality: str | Sequence[str] = "unknown",
) -> Plan:
    """Decide the views of one sample.

    `voxels` [Z, Y, X], or [C, Z, Y, X] of a case, may be a memory map: only one region of it is read. `points` [n, 3]
    are places in the tissue, around one of which the region is put; above `threshold` is tissue, of a case in the first
    channel it has. A scan below the size of a global view is padded by repeating its edge. Channels of a case share
    place, zoom, flips and warps; grey values change in each for itself. `modality`: of a case each channel's.
    """
    rng = np.random.default_rng(seed)
    shape, limit = np.array(voxels.shape[-3:]), np.array(region_size(config))
    lead = voxels.shape[:-3]  # (C,) of a case
    anchor = points[rng.integers(len(points))] if len(points) else shape // 2
    start = np.clip(np.floor(anchor - limit * rng.uniform(0.25, 0.75, 3)), 0, np.maximum(shape - limit, 0)).astype(int)
    stop = np.minimum(start + limit, shape)
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    region = np.asarray(voxels[(slice(None),) * len(lead) + box])
    short = np.maximum(np.array(config.global_size) - region.shape[-3:], 0)
    if short.any():
        region = np.pad(region, [(0, 0)] * len(lead) + [(n // 2, n - n // 2) for n in short], mode="edge")
    extent = np.array(region.shape[-3:])

    through = through_plane_axis(spacing_mm)
    seen = region if not lead else next(each for each in region if not np.isnan(each[0, 0, 0]))
    tissue = seen[::2, ::2, ::2] > threshold
    near = config.global_views
    boxes = np.empty((near + config.local_views, 6), np.float32)
    for i in range(len(boxes)):
        size = np.array(config.global_size if i < near else config.local_size)
        scale = config.global_scale if i < near else config.local_scale
        boxes[i] = _box(rng, size, scale, through, extent, tissue, config)

    # The order of these draws is part of a run's identity: changing it changes every view of every seed.
    flips = (rng.random((len(boxes), 3)) < config.flip).astype(np.float32)
    rows = len(boxes) * math.prod(lead)  # a view's channels one after the other
    u = rng.random((rows, 6)).astype(np.float32)
    changes = {
        "contrast": 1 + config.contrast * (2 * u[:, 0] - 1),
        "brightness": config.contrast * (2 * u[:, 1] - 1),
        "gamma": np.exp(config.gamma * (2 * u[:, 2] - 1)),
        "noise": config.noise * u[:, 3],
        "blur": config.blur * u[:, 4] * (u[:, 5] < 0.5),
    }
    noise_seed = np.array(rng.integers(2**62), np.int64)
    u = rng.random((rows, 6)).astype(np.float32)
    said = np.tile([modality] if isinstance(modality, str) else list(modality), len(boxes))
    said = np.resize(said, rows)  # one word for all channels
    ct, width = said == "CT", _CT_RANGE[1] - _CT_RANGE[0]
    jitter = np.where(ct, config.window * width, 0.0).astype(np.float32)
    changes |= {
        "rician": (config.rician & (said == "MR")).astype(float),
        "bias": config.bias * u[:, 0] * ~ct,
        # 0, 0 leaves the window alone.
        "window_low": (_CT_RANGE[0] + jitter * u[:, 1]) * (jitter > 0),
        "window_high": (_CT_RANGE[1] - jitter * u[:, 2]) * (jitter > 0),
        "coarse": 1 + (config.coarse - 1) * u[:, 3] * (u[:, 4] < 0.25),
        "elastic": np.repeat((config.elastic * u[:, 5]).reshape(len(boxes), -1)[:, 0], math.prod(lead)),
    }
    intensity = np.stack([changes[name] for name in augment.CHANGES], axis=1).astype(np.float32)
    intensity = intensity.reshape(len(boxes), *lead, -1)
    sizes = np.array([config.global_size if i < near else config.local_size for i in range(len(boxes))])
    mm = np.array(spacing_mm) * boxes[:, 3:] / sizes
    warps = np.stack([_warp(rng, config, view_mm) for view_mm in mm]).astype(np.float32)
    filled = np.zeros((*lead, *limit), np.float16)
    filled[(..., *(slice(0, n) for n in extent))] = region
    return Plan(filled, extent, boxes, flips, intensity, warps, noise_seed, np.array(scan, np.int64))


def _warp(rng: np.random.Generator, config: ViewsConfig, mm: np.ndarray) -> np.ndarray:
    """A turn and a shear in millimetres, as a matrix of voxels of `mm` millimetres."""
    if not (any(config.rotate) or config.shear):
        return np.eye(3)  # nothing is drawn after this, so what is not drawn here moves nothing
    turn = augment.rotation(np.array(config.rotate) * rng.uniform(-1, 1, 3))
    shear = np.eye(3) + config.shear * np.triu(rng.uniform(-1, 1, (3, 3)), 1)
    return (turn @ shear) * mm[None, :] / mm[:, None]


def _box(
    rng: np.random.Generator,
    size: np.ndarray,
    scale: tuple[float, float],
    through: int,
    extent: np.ndarray,
    tissue: np.ndarray,
    config: ViewsConfig,
) -> np.ndarray:
    best, best_share = np.zeros(6, np.float32), -1.0
    for _ in range(_TRIES):
        zoom = np.full(3, rng.uniform(*scale))
        zoom[through] = rng.uniform(*config.through_plane_scale)
        extents = np.minimum(size * zoom, extent)
        start = rng.uniform(0, 1, 3) * (extent - extents)
        low, high = np.floor(start / 2).astype(int), np.ceil((start + extents) / 2).astype(int)
        share = float(tissue[low[0] : high[0], low[1] : high[1], low[2] : high[2]].mean())
        if share > best_share:
            best, best_share = np.concatenate([start, extents]).astype(np.float32), share
        if share >= config.min_foreground:
            break
    return best


def fitting(view: Float[Tensor, "N C Z Y X"], model: Any) -> Float[Tensor, "N channels *size"]:
    """A rendered view as a network of this configuration takes it: an image is a scan of one slice; where it has more
    channels than the view, they are flags of those that are missing (NaN)."""
    view = view.squeeze(2) if model.dims == 2 else view
    return flagged(view) if model.in_channels > view.shape[1] else view


def render(plans: Plan, config: ViewsConfig, device: torch.device) -> list[Float[Tensor, "N C Z Y X"]]:
    """Cut and change the views of a batch: [global views, local views], each view by view ([V * B, C, Z, Y, X]), NaN in
    a channel that is missing.

    `plans` holds tensors with a batch axis in front, as the default collate makes them of `draw`'s.
    """
    region = torch.as_tensor(plans.region).to(device, non_blocking=True).float()
    extent, boxes, flips, warps = (
        torch.as_tensor(t).to(device) for t in (plans.extent, plans.boxes, plans.flips, plans.warp)
    )
    intensity = torch.as_tensor(plans.intensity)  # stays here: looking at it must not wait for a GPU
    channels, missing = 1, None
    if region.ndim == 5:  # each channel is a scan of its own, that is cut as the others are
        channels, missing = region.shape[1], region[..., 0, 0, 0].isnan()  # [B, C]
        region = region.nan_to_num(nan=0.0).flatten(0, 1)
        intensity = intensity.transpose(1, 2).flatten(0, 1)
        extent, boxes, flips, warps = (t.repeat_interleave(channels, 0) for t in (extent, boxes, flips, warps))
    groups = [(0, config.global_views, config.global_size)]
    if config.local_views:
        groups.append((config.global_views, config.global_views + config.local_views, config.local_size))
    grains = 2 if config.rician else 1
    fields = augment.field_numbers() if config.warps or config.bias else 0
    counts = [(last - first) * (grains * math.prod(size) + fields) for first, last, size in groups]
    noise = _noise(torch.as_tensor(plans.seed), channels * sum(counts), device)
    noise = noise.view(len(region), -1).split(counts, dim=1)
    views = []
    for (first, last, size), numbers in zip(groups, noise, strict=True):
        count, voxels = last - first, math.prod(size)
        rows = intensity[:, first:last].flatten(0, 1)
        matrices = _resize_matrices(boxes[:, first:last], flips[:, first:last], size, extent, region.shape[1:])
        # Linear along each axis, as the resizing is: part of it, unless something that is not comes between them.
        smooth = None if config.warps or config.window else augment.smoothing(rows, size, device)
        if smooth:
            matrices = [s.unflatten(0, m.shape[:2]) @ m for s, m in zip(smooth, matrices, strict=True)]
        x = augment.resample(region, matrices).flatten(0, 1)  # [B * v, Z, Y, X]
        grain, *second = numbers[:, : count * voxels * grains].unflatten(1, (grains, count, voxels)).unbind(1)
        knots = numbers[:, count * voxels * grains :].unflatten(1, (count, fields)).flatten(0, 1)
        if config.warps:
            bends = knots.unflatten(0, (-1, channels, count))[:, :1].expand(-1, channels, -1, -1).flatten(0, 2)
            x = augment.warp(x, warps[:, first:last].flatten(0, 1), rows[:, augment.CHANGES.index("elastic")], bends)
        x = augment.change(x, rows, grain, second[0] if second else None, knots, smoothed=smooth is not None)
        x = x.unflatten(0, (-1, channels, count)).permute(2, 0, 1, 3, 4, 5)  # view, scan, channel
        if missing is not None:
            x = torch.where(missing[None, ..., None, None, None], torch.nan, x)
        views.append(x.flatten(0, 1))
    return views


def _noise(seeds: Tensor, count: int, device: torch.device) -> Float[Tensor, "B count"]:
    """Standard normal numbers of each sample's own."""
    rows = torch.empty(len(seeds), count, device=device)
    for row, seed in zip(rows, seeds.tolist(), strict=True):
        row.normal_(generator=torch.Generator(device).manual_seed(seed))
    return rows


def _resize_matrices(
    boxes: Tensor, flips: Tensor, size: tuple[int, int, int], extent: Tensor, full: Sequence[int]
) -> list[Float[Tensor, "B V out full"]]:
    """Trilinear resize of each box to `size`, a matrix along each axis: row i averages the voxels under voxel i.

    Where a box is shrunk the hat function widens with it, so fine detail is averaged rather than aliased; beyond the
    extent of the region the last voxel repeats.
    """
    device = boxes.device
    out = torch.tensor(size, device=device, dtype=torch.float32)[:, None]
    index = torch.arange(max(size), device=device, dtype=torch.float32)
    index = torch.where(flips[..., None] > 0, out - 1 - index, index)  # [B, V, axis, out]
    step = boxes[..., 3:, None] / out
    last = (extent - 1).float()[:, None, :, None]
    at = boxes[..., :3, None] + (index + 0.5) * step - 0.5
    at = torch.minimum(at.clamp_min(0), last)
    source = torch.arange(max(full), device=device, dtype=torch.float32)
    weights = (1 - (source - at[..., None]).abs_().div_(step.clamp_min(1)[..., None])).clamp_min_(0)
    weights = weights * (source <= last[..., None])
    weights = weights / weights.sum(-1, keepdim=True)
    return [weights[:, :, axis, : size[axis], : full[axis]] for axis in range(3)]
