"""2D images as training data: folders of pictures, and MedMNIST-style .npz files.

An image is stored as a scan of one slice, so that views, order and resume are those of scans.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medformer.data import ScanError, Volume, normalise
from medformer.data.pictures import find_pictures, grey_array, picture_files, read_picture, unsuffixed
from medformer.data.resample import resize
from medformer.data.store.entries import Damaged, Stored, check, sealed, unsealed
from medformer.data.store.limit import Use
from medformer.errors import UserError
from medformer.files import naming, write_whole
from medformer.locks import held

__all__ = ["store_images"]

# Part of every cache key: raise it when what is stored changes. 2: one reader of pictures, one rule for colours.
# 3: the content of each image is named. 4: and what was changed in it.
_VERSION = 4
_POINTS = 64  # places above the mean kept for each image


def _npz(path: Path) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["train_images"]
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--data.root {path}: no .npz file with train_images ({error})") from error
    if images.ndim != 3 and not (images.ndim == 4 and images.shape[-1] == 3):
        raise UserError(f"--data.root {path}: train_images of shape {images.shape} must be (n, height, width[, 3])")
    return images


def _scaled(pixels: np.ndarray, name: str, side: int) -> np.ndarray:
    """[1, Y, X] float16, normalised as a scan of unknown units is, shorter side `side` unless 0. Raises ScanError."""
    volume = Volume(voxels=pixels[None], affine=np.eye(4), modality="unknown", units="arbitrary", notes=(), source=name)
    image = normalise(volume)
    if side:
        size = tuple(round(n * side / min(pixels.shape)) for n in pixels.shape)
        image = resize(torch.from_numpy(image), size).numpy()
    return image.astype(np.float16)


def _found(root: Path) -> Iterator[tuple[str, Callable[[], tuple[np.ndarray, tuple[str, ...]]]]]:
    if root.suffix == ".npz":
        for i, image in enumerate(_npz(root)):
            yield f"{root.stem}/{i}", lambda image=image: grey_array(image)
    else:
        for path in find_pictures(root):
            yield str(unsuffixed(path).relative_to(root)), lambda path=path: read_picture(path)


def _key(root: Path, side: int) -> str:
    files = [root] if root.is_file() else picture_files(root)
    digest = hashlib.sha256(f"images {_VERSION}{f' side {side}' if side else ''}".encode())
    for file in files:
        stat = file.stat()
        digest.update(f"|{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


def store_images(
    root: Path,
    cache: Path,
    side: int,
    progress: Callable[[list[Any]], Any] = iter,
    say: Callable[[str], object] = warnings.warn,
    use: Use | None = None,
) -> tuple[list[Stored], list[tuple[str, str]]]:
    """Read, check and store one folder of images or the `train_images` of an .npz file, unless the cache has them.

    A damaged copy is set aside, said and made anew. Returns the stored images, and name and reason of those that cannot
    be read; `side`: see `ViewsConfig.image_side`. Raises UserError where the cache cannot be written.
    """
    key = _key(root, side)
    folder = cache / f"images-{key}"
    if use is not None:
        use.note(folder.name)
    try:
        found = _complete(folder)
    except Damaged:
        found = None
    if found is not None:
        return found
    with held(cache / ".locks" / key[:2]):  # of two runs that begin together one reads the images
        try:
            found = _complete(folder)
        except Damaged as error:
            aside = cache / "damaged" / folder.name
            with naming(aside):
                shutil.rmtree(aside, ignore_errors=True)
                aside.parent.mkdir(exist_ok=True)
                folder.rename(aside)
            say(f"WARNING: the stored images of {root}: {error}; they are in {aside} now and are made anew")
        if found is None:
            with naming(folder):
                _write(root, folder, side, progress)
            found = _complete(folder)
            assert found is not None
    if use is not None:
        use.added(folder.name)
    return found


def _write(root: Path, folder: Path, side: int, progress: Callable[[list[Any]], Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    good: list[dict[str, Any]] = []
    bad: list[tuple[str, str]] = []
    for number, (name, read) in enumerate(progress(list(_found(root)))):
        try:
            values, notes = read()
            pixels = _scaled(values, name, side)
        except ScanError as error:
            bad.append((name, str(error)))
            continue
        path = folder / f"{number:07d}.npy"
        threshold = float(pixels.mean())
        points = np.argwhere(pixels > threshold)
        chosen = np.random.default_rng(0).choice(len(points), min(_POINTS, len(points)), replace=False)
        stored = Stored(
            name=name, path=str(path.relative_to(folder)), shape=pixels.shape, spacing_mm=(1.0, 1.0, 1.0),
            modality="unknown", threshold=threshold, notes=notes,
            content=hashlib.blake2b(pixels.tobytes(), digest_size=16).hexdigest(),
        )  # fmt: skip
        np.save(path, pixels)
        np.save(folder / stored.points_path, points[np.sort(chosen)].astype(np.int32))
        sizes = [(folder / name).stat().st_size for name in (path.name, stored.points_path)]
        said = {key: value for key, value in asdict(stored).items() if key not in ("parts", "channels")}
        good.append({**said, "bytes": sizes})
    # The index comes last: with it the folder is complete.
    write_whole(folder / "index.json", lambda file: file.write(sealed({"good": good, "bad": bad})))


def _complete(folder: Path) -> tuple[list[Stored], list[tuple[str, str]]] | None:
    """What `store_images` returns, if it is there; files are checked by their lengths. Raises Damaged."""
    index = folder / "index.json"
    if not index.exists():
        return None
    found = unsealed(index, {"good", "bad"})
    images = []
    for values in found["good"]:
        sizes = values.pop("bytes")
        lists = {key: tuple(values[key]) for key in ("shape", "spacing_mm", "notes")}
        image = Stored(**{**values, **lists, "path": str(folder / values["path"])})
        for path, size in zip((image.path, image.points_path), sizes, strict=True):
            check(Path(path), {"bytes": size})
        images.append(image)
    return images, [(name, reason) for name, reason in found["bad"]]
