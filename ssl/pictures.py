"""Pictures of a model: where it looks in images, and how Image-GPT completes what it has half seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from medformer import Backbone
from medformer.data import ScanError
from medformer.data.store.entries import Stored, open_scan
from medformer.files import write_whole
from medformer.image_gpt import ImageGPT
from roots import Prepared
from runs import Metrics
from settings import TrainConfig
from views import draw as draw_views
from views import fitting, render

__all__ = ["attention_picture", "complete", "draw", "to_board"]

_SHOWN = 4  # scans in a picture of completions
_IMAGES = 8  # images in a picture of attention
_SAMPLES = 2  # completions of each scan


def draw(config: TrainConfig, prepared: Prepared, method: Any, path: Path, caption: str) -> bool:
    """The method's picture, or False where there is nothing to draw: no class token, or no scan that can be read."""
    try:
        return _draw(config, prepared, method, path, caption)
    except ScanError as error:
        print(f"WARNING: {path.name} is not drawn: {error}")
        return False


def _draw(config: TrainConfig, prepared: Prepared, method: Any, path: Path, caption: str) -> bool:
    if config.method == "igpt":
        _completions(config, prepared, method.student, path, caption)
        return True
    if not getattr(config.model, "class_token", False):
        return False
    encoder = cast(Backbone, method.encoder)
    was = encoder.training
    encoder.eval()
    held = "Held-out" if prepared.held_out else "Training"
    try:
        if config.model.dims == 2:
            _looks(encoder, prepared, config, path, f"Images, held-out ones first, {caption}")
        else:
            scan = (prepared.held_out or prepared.train)[0]
            z, y, x = (4 * n for n in config.views.global_size)
            attention_picture(encoder, scan, path, caption=f"{held} scan {caption}", limit=(z, y, x))
    finally:
        encoder.train(was)
    return True


def to_board(metrics: Metrics, path: Path, step: int) -> None:
    """The same picture in TensorBoard."""
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as image:
        metrics._board.add_image(path.parent.name, np.asarray(image.convert("RGB")), step, dataformats="HWC")


def _views(config: TrainConfig, prepared: Prepared, count: int, device: torch.device) -> Tensor:
    """One view of each of `count` scans, held-out ones first; always the same ones."""
    scans = [*prepared.held_out, *prepared.train][:count]
    plans = []
    for i, scan in enumerate(scans):
        voxels, points = open_scan(scan)
        seed = (config.seed, 8, i)
        plans.append(
            draw_views(voxels, scan.spacing_mm, points, scan.threshold, config.views, seed, i, scan.modalities)
        )
    views = render(default_collate(plans), config.views, device)[0][: len(scans)]
    return fitting(views, config.model)


def complete(model: ImageGPT, tokens: Tensor, known: int, seed: int) -> Tensor:
    """Tokens whose first `known` (in the model's order) are given and the others sampled."""
    generator = torch.Generator(tokens.device).manual_seed(seed)
    if model.config.objective == "autoregressive":
        return model.complete(tokens, known, generator=generator)
    hidden = (model.places >= known).expand(len(tokens), -1)
    return model.fill(tokens, hidden, generator=generator)


@torch.no_grad()
def _completions(config: TrainConfig, prepared: Prepared, model: ImageGPT, path: Path, caption: str) -> None:
    """Rows: the view, its tokens, what the model was shown, what it made of that."""
    device, was = next(model.parameters()).device, model.training
    views = _views(config, prepared, _SHOWN, device)
    model.eval()
    tokens, grid = model.codebook.encode(views), model.config.grid
    known = model.config.tokens // 2
    seen = (model.places < known).view(1, 1, *grid).float()
    seen = F.interpolate(seen, size=views.shape[2:], mode="nearest")[0, 0] > 0.5
    coded = model.codebook.decode(tokens, grid)
    shown = coded.masked_fill(~seen, torch.nan)
    rows = [("scan", views), (f"{model.config.vocabulary} tokens", coded), ("shown", shown)]
    for sample in range(_SAMPLES):
        made = model.codebook.decode(complete(model, tokens, known, config.seed + sample), grid)
        rows.append((f"completion {sample + 1}", made))
    model.train(was)
    title = f"Image-GPT {caption}: the {'first' if known else ''} half of the tokens given, {model.config.order} order"
    columns = []
    for i in range(len(views)):
        planes = [_planes(x[i, 0].cpu().numpy()) for _, x in rows]
        columns += [list(column) for column in zip(*planes, strict=True)]
    _sheet(path, title, [name for name, _ in rows], columns)


def _planes(x: np.ndarray) -> list[np.ndarray]:
    """The image; or of a scan a slice in the last quarter, and the coronal plane through the middle, feet down."""
    if x.ndim == 2:
        return [x]
    return [x[(3 * x.shape[0]) // 4, ::-1, ::-1], x[::-1, x.shape[1] // 2, ::-1]]


def _sheet(path: Path, title: str, names: list[str], columns: list[list[np.ndarray]]) -> None:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.3 + 1.7 * len(columns), 0.6 + 1.7 * len(names)), facecolor="black")
    FigureCanvasAgg(figure)
    figure.suptitle(title, color="white", fontsize=11)
    colours = colormaps["gray"].with_extremes(bad="#1d3a5f")
    for c, column in enumerate(columns):
        low, high = np.percentile(column[0], (0.5, 99.5))
        for r, picture in enumerate(column):
            axes = figure.add_subplot(len(names), len(columns), r * len(columns) + c + 1)
            axes.imshow(np.ma.masked_invalid(picture), cmap=colours, vmin=low, vmax=max(high, low + 1e-6))
            axes.set_xticks([])
            axes.set_yticks([])
            if c == 0:
                axes.set_ylabel(names[r], color="white", fontsize=9)
    figure.tight_layout()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110, facecolor="black"))


@torch.no_grad()
def _looks(backbone: Backbone, prepared: Prepared, config: TrainConfig, path: Path, title: str) -> None:
    """Images, and the class token's attention in its last block, each from its own least to its own most."""
    device = next(backbone.parameters()).device
    size = config.views.global_size[1:]
    columns = []
    for scan in [*prepared.held_out, *prepared.train][:_IMAGES]:
        x = torch.from_numpy(np.array(open_scan(scan)[0], dtype=np.float32))[None].to(device)
        least = [max(2 * w, 1) for w in size]  # about the scale of training
        x = F.interpolate(x, size=least, mode="bilinear", align_corners=False)
        heat = backbone.attention_map(x).float().mean(1, keepdim=True)
        heat = F.interpolate(heat, size=least, mode="bilinear", align_corners=False)[0, 0]
        least_heat, span = heat.min(), (heat.max() - heat.min()).clamp_min(1e-12)
        columns.append([x[0, 0].cpu().numpy(), ((heat - least_heat) / span).cpu().numpy()])
    low, high = (np.array([f(column[0]) for column in columns]) for f in (np.min, np.max))
    for i, column in enumerate(columns):  # one grey scale for a column
        column[1] = low[i] + column[1] * (high[i] - low[i])
    _sheet(path, title, ["image", "attention"], columns)


@torch.no_grad()
def attention_picture(
    backbone: Backbone, scan: Stored, path: Path, *, caption: str, limit: tuple[int, int, int]
) -> None:
    """Axial, coronal and sagittal slices of a scan, plain and with the class token's attention over them.

    Radiological layout: the patient's right is on the left of the picture. Each plane goes through the middle of the
    tissue; pixels are as wide as they are in the patient. A scan above `limit` voxels is cropped around that middle.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    whole, points = open_scan(scan)
    middle = np.median(points, axis=0) if len(points) else np.array(scan.shape) / 2
    size = np.minimum(scan.shape, limit)
    start = np.clip(np.round(middle - size / 2), 0, np.array(scan.shape) - size).astype(int)
    box = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
    channels = np.asarray(whole[(slice(None),) * bool(scan.parts) + box], np.float32).reshape(-1, *size)
    voxels = next(channel for channel in channels if not np.isnan(channel[0, 0, 0]))
    at = np.clip(np.round(middle - start), 0, size - 1).astype(int)

    device = next(backbone.parameters()).device
    x = fitting(torch.from_numpy(channels)[None], backbone.config).to(device)
    kernel = getattr(backbone.config, "kernel", x.shape[2:])  # a TNT takes what is larger than its views
    least = [max(n, k) for n, k in zip(x.shape[2:], kernel, strict=True)]
    if least != list(x.shape[2:]):
        pad = [p for n, k in zip(reversed(x.shape[2:]), reversed(least), strict=True) for p in (0, k - n)]
        x = F.pad(x, pad, mode="replicate")
    weights = backbone.attention_map(x)[0].float().mean(0)  # over the heads
    weights = weights / weights.mean()
    weights = F.interpolate(weights[None, None], size=x.shape[2:], mode="trilinear", align_corners=False)[0, 0]
    attention = weights[tuple(slice(0, n) for n in voxels.shape)].cpu().numpy()

    dark, bright = np.percentile(voxels, (1, 99.5))
    top = max(float(np.percentile(attention, 99.8)), 1.2)
    z_mm, y_mm, x_mm = (float(n * mm) for n, mm in zip(voxels.shape, scan.spacing_mm, strict=True))
    planes = [
        (0, "axial", "RLAP", x_mm, y_mm),
        (1, "coronal", "RLSI", x_mm, z_mm),
        (2, "sagittal", "APSI", y_mm, z_mm),
    ]
    # Laid out in millimetres, so that all planes have one scale: left edges, bottoms of the two rows, margins.
    gap = 0.09 * max(x_mm, y_mm, z_mm)
    row_mm = max(y_mm, z_mm)
    width = 2 * x_mm + y_mm + 7.9 * gap
    height = 2 * row_mm + 5.6 * gap
    inches = 11.5 / max(width, height)
    figure = Figure(figsize=(width * inches, height * inches), facecolor="black")
    FigureCanvasAgg(figure)
    shown = None
    left = gap
    for axis, title, letters, across, up in planes:
        picture = np.take(voxels, at[axis], axis)[:, ::-1]  # x and y run to the right and the front: shown reversed
        heat = np.take(attention, at[axis], axis)[:, ::-1]
        for row, bottom in enumerate((2 * gap + row_mm, gap)):
            bottom += (row_mm - up) / 2
            axes = figure.add_axes((left / width, bottom / height, across / width, up / height))
            axes.set_axis_off()
            layout: dict[str, Any] = {"origin": "lower", "extent": (0.0, across, 0.0, up), "aspect": "auto"}
            axes.imshow(picture, cmap="gray", vmin=dark, vmax=bright, interpolation="bicubic", **layout)
            if row:
                alpha = 0.7 * np.clip((heat - 1) / (top - 1), 0, 1) ** 0.7
                shown = axes.imshow(heat, cmap="inferno", vmin=1, vmax=top, alpha=alpha, **layout)
            sides = ((-0.25 * gap, up / 2), (across + 0.25 * gap, up / 2), (across / 2, up), (across / 2, 0.0))
            for letter, (u, v), va in zip(letters, sides, ("center", "center", "bottom", "top"), strict=True):
                axes.text(u, v, letter, ha="center", va=va, color="#8ecbff", fontsize=9)
        middle_mm = (left + across / 2) / width
        figure.text(middle_mm, (2.7 * gap + 2 * row_mm) / height, title, color="white", ha="center", fontsize=11)
        left += across + 1.1 * gap
    assert shown is not None
    bar_mm = 10.0 * max(1, round(0.2 * x_mm / 10))
    rule = figure.add_axes((gap / width, 0.45 * gap / height, bar_mm / width, 0.08 * gap / height), facecolor="white")
    rule.set_xticks([])
    rule.set_yticks([])
    figure.text((1.3 * gap + bar_mm) / width, 0.33 * gap / height, f"{bar_mm / 10:.0f} cm", color="white", fontsize=9)
    bar = figure.colorbar(shown, cax=figure.add_axes((left / width, gap / height, 0.35 * gap / width, row_mm / height)))
    bar.set_label("attention, times its mean (clear at 1)", color="white")
    bar.ax.tick_params(colors="white")
    bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    bar.ax.yaxis.set_major_formatter("{x:.2f}")
    shape, spacing = "x".join(map(str, scan.shape)), " x ".join(f"{mm:.3g}" for mm in scan.spacing_mm)
    cropped = "" if voxels.shape == scan.shape else f", middle {'x'.join(map(str, voxels.shape))} shown"
    modality = "" if scan.modality == "unknown" else f"{scan.modality}, "
    if len(scan.parts) > 1:
        number = next(c for c, part in enumerate(scan.parts) if part is not None)
        modality += f"channel {number + 1} of {len(scan.parts)}, "
    figure.text(0.5, 1 - 0.75 * gap / height, f"{caption}: {scan.name}", color="white", ha="center", fontsize=13)
    figure.text(
        0.5, 1 - 1.4 * gap / height, f"{modality}{shape} voxels of {spacing} mm (zyx){cropped}; below: attention of "
        "the class token, last block, mean of heads", color="#bbbbbb", ha="center", fontsize=9,
    )  # fmt: skip
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110, facecolor="black"))
