"""Models, scans and a browser for the tests of the page."""

from __future__ import annotations

import base64
import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import medformer
from medformer.answers.model import About, Finetuned, network_of

SHAPE = (24, 32, 40)
BALL = (16, 10, 28)  # zyx, off every middle, so that a mirrored picture is a wrong one


def a_model(**changes: Any) -> medformer.Backbone:
    torch.manual_seed(0)
    changes = {"width": 24, "depth": 2, "heads": 2, "patch_size": 8, "patch_stride": 4, "patch_padding": 2} | changes
    return medformer.tiny_3d(**changes).eval()


def unpacked(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), dtype)


def a_finetuned(kind: str, names: tuple[str, ...], dims: int = 3) -> Finetuned:
    torch.manual_seed(0)
    sizes = {"width": 24, "depth": 1, "heads": 2, "patch_size": 4, "patch_stride": 4, "patch_padding": 0}
    backbone = (medformer.tiny_3d if dims == 3 else medformer.tiny_2d)(**sizes)
    score = {"mean": 0.5, "low": 0.4, "high": 0.6, "sd": None}
    metric = {"segmentation": "dice", "classes": "auroc", "regression": "mae"}[kind]
    about = About(
        task="t", kind=kind, names=names, size=(16,) * dims, method="finetune", cases={"train": 1, "val": 1, "test": 9},
        scores={"test": {metric: score}}, by_class={"test": [0.5] * len(names)},
        number=(60.0, 10.0) if kind == "regression" else None,
    )  # fmt: skip
    return Finetuned(network_of(backbone, about), about).eval()


def a_run(root: Path) -> Path:
    """A checkpoint with curves and a probe beside it, and two scans."""
    medformer.save(a_model(), root / "backbone.safetensors")
    lines = [json.dumps({"step": i, "loss": 7 - i / 50, "lr": None if i == 3 else 1e-3}) for i in range(100)]
    (root / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 100, "lo')
    about = {"task": "<b>organs", "kind": "classes", "names": ["liver", "<img src=x>"], "last": 1, "pool": True,
             "size": [16] * 3, "width": 24}  # fmt: skip
    tensors = {"mean": torch.zeros(48), "spread": torch.ones(48), "weight": torch.randn(2, 48), "bias": torch.zeros(2)}
    save_file(tensors, root / "probe.safetensors", metadata={"medformer_probe": json.dumps(about)})
    zyx = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij"))
    ball = ((zyx - np.array(BALL)[:, None, None, None]) ** 2).sum(0) <= 9
    (root / "cases").mkdir()
    for name, place in (("scan.nii.gz", root), ("case1.nii", root / "cases"), ("case2.nii", root / "cases")):
        noise = np.random.default_rng(len(name)).normal(100, 10, SHAPE)
        voxels = (noise + 900 * ball).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels.T, np.diag([1.0, 1.0, 2.0, 1.0])), place / name)
    return root


def launched() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is in the extra test")
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        pytest.skip("no chromium here; Debian: apt-get install chromium")
    with sync.sync_playwright() as tool:
        opened = tool.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()
