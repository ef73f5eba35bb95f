"""Pictures of a model: where it looks in images, and how Image-GPT completes what it has half seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

import report
from medformer import Backbone
from medformer.image_gpt import ImageGPT
from prepare import Prepared, load
from runs import Metrics, write_whole
from settings import TrainConfig
from views import draw as draw_views
from views import fitting, render

__all__ = ["complete", "draw", "to_board"]

_SHOWN = 4  # scans in a picture of completions
_IMAGES = 8  # images in a picture of attention
_SAMPLES = 2  # completions of each scan


def draw(config: TrainConfig, prepared: Prepared, method: Any, path: Path, caption: str) -> bool:
    """The method's picture, or False where there is nothing to draw (no class token, and so no attention of it)."""
    if config.method == "igpt":
        _completions(config, prepared, method.student, path, caption)
        return True
    if not getattr(config.model, "class_token", False):
        return False
    encoder = cast(Backbone, method.encoder)
    was = encoder.training
    encoder.eval()
    held = "Held-out" if prepared.held_out else "Training"
    if config.model.dims == 2:
        _looks(encoder, prepared, config, path, f"Images, held-out ones first, {caption}")
    else:
        scan = (prepared.held_out or prepared.train)[0]
        z, y, x = (4 * n for n in config.views.global_size)
        report.attention_picture(encoder, scan, path, caption=f"{held} scan {caption}", limit=(z, y, x))
    encoder.train(was)
    return True


def to_board(metrics: Metrics, path: Path, step: int) -> None:
    """The same picture in TensorBoard."""
    from PIL import Image

    with Image.open(path) as image:
        metrics._board.add_image(path.parent.name, np.asarray(image.convert("RGB")), step, dataformats="HWC")


def _views(config: TrainConfig, prepared: Prepared, count: int, device: torch.device) -> Tensor:
    """One view of each of `count` scans, held-out ones first; always the same ones."""
    scans = [*prepared.held_out, *prepared.train][:count]
    plans = [
        draw_views(
            load(s.path),
            s.spacing_mm,
            load(s.points_path),
            s.threshold,
            config.views,
            (config.seed, 8, i),
            i,
            s.modality,
        )
        for i, s in enumerate(scans)
    ]
    views = render(default_collate(plans), config.views, device)[0][: len(scans)]
    return fitting(views, config.model.dims)


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
    model.eval()
    views = _views(config, prepared, _SHOWN, device)
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
        x = torch.from_numpy(np.array(load(scan.path), dtype=np.float32))[None].to(device)
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
