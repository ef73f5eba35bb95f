"""How much two views of a scan have in common before anything is learned, so that views are chosen in seconds.

    python benchmarks/views_agree.py dino --data.root DIR --data.small pad
    python benchmarks/views_agree.py dino --data.root DIR --data.small pad --views.flip 0,0,0 --views.contrast 0.1

Takes the flags of `medformer pretrain`. Prints the agreement (`ssl/dino.py`: share of the variance between scans that
two views of the same scan have in common) of the class token and the mean patch of a backbone with fresh weights, and
of the views themselves averaged in cells of CELL voxels; each feature standardised over the views.

DINO with batches of few scans stays at even answers where this lies below teacher_temp / student_temp (`break-even`):
views that differ by more than scans do teach nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).parents[1] / "ssl"))

import medformer
import settings
from crops import Crops
from dino import agreement
from roots import prepare, prepare_images
from views import fitting, render

CELL = 4
MOST = 96  # scans that are looked at


def standard(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0).clamp(min=1e-6)


@torch.no_grad()
def agreements(config: Any, cache: Path) -> dict[str, float]:
    """Of two views of at most MOST scans."""
    reading = prepare_images if config.model.dims == 2 else prepare
    found = reading(config.data, config.views, cache, config.seed)
    crops = Crops(found.train, config.views, config.seed)
    plans = default_collate([crops[i] for i in range(min(MOST, len(found.train)))])
    views = fitting(render(plans, config.views, torch.device("cpu"))[0], config.model)
    torch.manual_seed(config.seed)
    model = medformer.build(config.model).eval()
    features = [model.forward_features(part) for part in views.split(16)]
    pool = F.avg_pool3d if config.model.dims == 3 else F.avg_pool2d
    seen = {
        "class token": torch.cat([f.cls for f in features]),
        "mean patch": torch.cat([f.patches.mean(1) for f in features]),
        "cells": pool(views, CELL).flatten(1),
    }
    return {name: float(agreement(*standard(x).chunk(2))) for name, x in seen.items()}


def main(argv: list[str]) -> None:
    config = settings.parse(argv)
    if config.views.global_views != 2:
        raise SystemExit(f"{config.method} has one view of a scan; give dino or byol")
    found = agreements(config, Path(config.data.cache or "runs/cache"))
    even = config.dino.teacher_temp / config.dino.student_temp
    print("  ".join(f"{name} {value:.3f}" for name, value in found.items()), f" break-even {even:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
