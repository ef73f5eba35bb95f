"""2D images as training data: folders of PNG and JPEG files, and MedMNIST-style .npz files.

An image is stored as a scan of one slice, so that views, order and resume are those of scans.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from medformer.data import ScanError, Volume, normalise
from prepare import DataConfig, Prepared, Stored
from runs import UserError, write_whole
from tasks import resize
from views import ViewsConfig

__all__ = ["prepare_images", "read_image"]

_VERSION = 1
_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
_POINTS = 64  # places above the mean kept for each image


def read_image(path: Path) -> np.ndarray:
    """Grey values of an image file, [Y, X] float32; colours are averaged as the eye does. ScanError says why not."""
    try:
        with Image.open(path) as image:
            grey = image if image.mode in ("L", "I", "I;16", "F") else image.convert("L")
            return np.asarray(grey, dtype=np.float32)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ScanError(f"{path.name}: damaged or no image ({error})") from error


def _npz(path: Path) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["train_images"]
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--data.root {path}: no .npz file with train_images ({error})") from error
    if images.ndim == 4 and images.shape[-1] == 3:
        images = images.mean(-1)
    if images.ndim != 3:
        raise UserError(f"--data.root {path}: train_images of shape {images.shape} must be (n, height, width)")
    return images


def _scaled(pixels: np.ndarray, name: str, side: int) -> np.ndarray:
    """[1, Y, X] float16, normalised as a scan of unknown units is, shorter side `side` unless 0. Raises ScanError."""
    volume = Volume(voxels=pixels[None], affine=np.eye(4), modality="unknown", units="arbitrary", notes=(), source=name)
    image = normalise(volume)
    if side:
        size = tuple(round(n * side / min(pixels.shape)) for n in pixels.shape)
        image = resize(torch.from_numpy(image), size).numpy()
    return image.astype(np.float16)


def _found(root: Path) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    if root.suffix == ".npz":
        for i, image in enumerate(_npz(root)):
            yield f"{root.stem}/{i}", lambda image=image: image
    else:
        for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file()):
            yield str(path.relative_to(root).with_suffix("")), lambda path=path: read_image(path)


def _key(root: Path, side: int) -> str:
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix.lower() in _SUFFIXES)
    digest = hashlib.sha256(f"images {_VERSION}{f' side {side}' if side else ''}".encode())
    for file in files:
        stat = file.stat()
        digest.update(f"|{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


def prepare_images(
    config: DataConfig, views: ViewsConfig, cache: Path, seed: int, progress: Callable[[list[Any]], Any] = iter
) -> Prepared:
    """As `prepare.prepare`, for one folder of images or one .npz file (of which `train_images` are used).

    Raises:
        UserError: there is nothing to train on.
    """
    root = Path(config.root or "")
    if config.root is None or not (root.is_dir() or (root.suffix == ".npz" and root.is_file())):
        raise UserError(
            f"--data.root {config.root}: with --model.dims 2 it must be a folder of PNG or JPEG images, or an .npz "
            "file with train_images"
        )
    folder = cache / f"images-{_key(root, views.image_side)}"
    index = folder / "index.json"
    if not index.exists():
        folder.mkdir(parents=True, exist_ok=True)
        good: list[dict[str, Any]] = []
        bad: list[tuple[str, str]] = []
        for number, (name, read) in enumerate(progress(list(_found(root)))):
            try:
                pixels = _scaled(read(), name, views.image_side)
            except ScanError as error:
                bad.append((name, str(error)))
                continue
            path = folder / f"{number:07d}.npy"
            threshold = float(pixels.mean())
            points = np.argwhere(pixels > threshold)
            chosen = np.random.default_rng(0).choice(len(points), min(_POINTS, len(points)), replace=False)
            stored = Stored(
                name=name, path=str(path.relative_to(folder)), shape=pixels.shape, spacing_mm=(1.0, 1.0, 1.0),
                modality="unknown", threshold=threshold, notes=(),
            )  # fmt: skip
            np.save(path, pixels)
            np.save(folder / stored.points_path, points[np.sort(chosen)].astype(np.int32))
            good.append(asdict(stored))
        # The index comes last: with it the folder is complete.
        text = json.dumps({"good": good, "bad": bad})
        write_whole(index, lambda file: file.write(text.encode()))
    found = json.loads(index.read_text())
    skipped = [(name, reason) for name, reason in found["bad"]]
    images: list[Stored] = []
    for values in found["good"]:
        shape = tuple(values["shape"])
        if config.small != "pad" and any(n < w for n, w in zip(shape, views.global_size, strict=True)):
            size, wanted = ("x".join(map(str, s)) for s in (shape[1:], views.global_size[1:]))
            skipped.append((values["name"], f"{size} pixels (yx) is below --views.global_size {wanted}"))
            continue
        images.append(
            Stored(**{**values, "shape": shape, "spacing_mm": (1.0, 1.0, 1.0), "notes": (),
                      "path": str(folder / values["path"])})
        )  # fmt: skip
    if not images:
        why = f"; for instance {skipped[-1][0]}: {skipped[-1][1]}" if skipped else ""
        raise UserError(f"--data.root {root}: no image that can be used{why}")
    held = np.random.default_rng((seed, 1)).permutation(len(images))[: min(config.held_out, len(images) - 1)]
    chosen_out = {int(i) for i in held}
    return Prepared(
        train=[image for i, image in enumerate(images) if i not in chosen_out],
        held_out=[images[i] for i in sorted(chosen_out)],
        skipped=skipped,
    )
