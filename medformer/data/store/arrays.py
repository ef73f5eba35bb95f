"""Arrays on disk that are cut at random: compressed where blosc2 is installed, plain .npy where it is not.

Compressed arrays are blosc2 `.b2nd` of 64^3 chunks and 16^3 blocks, bit-shuffled, LZ4HC. A crop touches only the blocks
it needs; handles stay open, since opening costs ten times as much as cutting. Level 3 is as small as level 5 on CT, to
within 0.3 %, and writes faster.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from medformer.data.geometry import ScanError
from medformer.data.intensity import Scaling
from medformer.files import write_whole

__all__ = [
    "MAX_OPEN",
    "Channels",
    "Scaled",
    "compresses",
    "cut",
    "load_blosc2",
    "open_array",
    "random_crop",
    "suffix",
    "write_array",
]

MAX_OPEN = 64
_CHUNK, _BLOCK, _LEVEL = 64, 16, 3


@lru_cache(maxsize=1)
def load_blosc2() -> Any:
    """The module, for one thread; None where it is not installed."""
    try:
        import blosc2
    except ImportError:
        return None
    blosc2.set_nthreads(1)  # a loader has processes of its own
    return blosc2


def compresses() -> bool:
    """Whether blosc2 is installed."""
    return load_blosc2() is not None


def suffix() -> str:
    """That of the arrays `write_array` makes here."""
    return ".b2nd" if compresses() else ".npy"


def write_array(path: Path, array: np.ndarray) -> None:
    """Write .b2nd or .npy, by the suffix of `path`; whole or not at all, and on the disk when it returns.

    Raises UserError where the disk is full or refuses.
    """
    array = np.ascontiguousarray(array)
    if path.suffix == ".npy":
        write_whole(path, lambda file: np.lib.format.write_array(file, array, allow_pickle=False))
        return
    blosc2 = load_blosc2()
    if blosc2 is None:
        raise ScanError(f"write_array: {path.name} needs blosc2; pip install -e '.[store]', or name it .npy")
    chunks, blocks = (tuple(min(size, n) for n in array.shape) for size in (_CHUNK, _BLOCK))
    settings = blosc2.CParams(
        codec=blosc2.Codec.LZ4HC, clevel=_LEVEL, filters=[blosc2.Filter.BITSHUFFLE], filters_meta=[0],
        nthreads=1, typesize=array.dtype.itemsize,
    )  # fmt: skip
    # In memory first: writing a file itself, blosc2 says "error while writing" of a full disk and no more.
    packed = blosc2.asarray(array, contiguous=True, chunks=chunks, blocks=blocks, cparams=settings).to_cframe()
    write_whole(path, lambda file: file.write(packed))


def open_array(path: str | os.PathLike[str]) -> Any:
    """A handle with shape, dtype and slicing that reads on demand. Raises ScanError for a file cut off or lost."""
    name = os.path.basename(path)
    try:
        if str(path).endswith(".npy"):
            return np.load(path, mmap_mode="r", allow_pickle=False)
        blosc2 = load_blosc2()
        if blosc2 is None:
            raise ScanError(f"{name}: compressed with blosc2, which is not installed; pip install -e '.[store]'")
        array = blosc2.open(str(path), mode="r", mmap_mode="r", dparams=blosc2.DParams(nthreads=1))
        if array.schunk.nbytes < int(np.prod(array.shape)) * array.dtype.itemsize:
            raise ScanError(f"{name}: stored array is cut off; prepare it again")
        return array
    except ScanError:
        raise
    except (OSError, ValueError, RuntimeError, EOFError, AttributeError) as error:
        raise ScanError(f"{name}: stored array cannot be opened ({type(error).__name__}); prepare it again") from error


def cut(array: Any, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """The box as an array of its own. Raises ScanError where the file is damaged."""
    box = tuple(slice(int(a), int(a) + int(n)) for a, n in zip(start, size, strict=True))
    try:
        return np.ascontiguousarray(array[box])
    except (RuntimeError, ValueError, OSError) as error:
        raise ScanError(f"stored array is damaged ({error}); prepare it again") from error


_opened = lru_cache(maxsize=MAX_OPEN)(open_array)


def random_crop(path: str | os.PathLike[str], size: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """A box of `size` at a place drawn evenly; at most MAX_OPEN files stay open in a process."""
    array = _opened(os.fspath(path))
    if any(n > have for n, have in zip(size, array.shape, strict=True)):
        raise ScanError(f"random_crop: size {tuple(size)} must fit into {tuple(array.shape)}; pad, or ask for less")
    start = [int(rng.integers(have - n + 1)) for n, have in zip(size, array.shape, strict=True)]
    return cut(array, start, size)


class Scaled:
    """A stored array seen as the network sees it: slices come out scaled, float16.

    Values of 8 and 16 bits go through a table with an entry for each of them, so scaling costs one look-up a voxel
    and is the same as scaling the whole volume first.
    """

    def __init__(self, array: Any, scaling: Scaling) -> None:
        self.array = array
        self.scaling = scaling
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype = np.dtype(np.float16)
        self.table: np.ndarray | None = None
        self.lock = threading.Lock()  # one handle of blosc2 is not for two threads at once
        if array.dtype.kind in "iu" and array.dtype.itemsize <= 2:
            bits = np.arange(2 ** (8 * array.dtype.itemsize)).astype(f"u{array.dtype.itemsize}")
            self.table = scaling.apply(bits.view(array.dtype)).astype(np.float16)

    def __getitem__(self, box: Any) -> np.ndarray:
        try:
            with self.lock:
                stored = np.ascontiguousarray(self.array[box])
        except (RuntimeError, OSError) as error:
            raise ScanError(f"stored array is damaged ({error}); prepare it again") from error
        if self.table is not None:
            return self.table.take(stored.view(f"u{stored.dtype.itemsize}"))
        return self.scaling.apply(stored).astype(np.float16)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[...], dtype=dtype)


class Channels:
    """Arrays [Z, Y, X] of one grid seen as one, [C, Z, Y, X], read by the slice; NaN where one is missing (None)."""

    def __init__(self, arrays: Sequence[Scaled | None]) -> None:
        """At least one is there."""
        self.arrays = list(arrays)
        first = next(array for array in self.arrays if array is not None)
        self.shape: tuple[int, ...] = (len(self.arrays), *first.shape)
        self.dtype = np.dtype(np.float16)

    def __getitem__(self, box: Any) -> np.ndarray:
        """`box`: all channels and three slices, or an ellipsis."""
        inside = box if box is Ellipsis else box[1:]
        found = [None if array is None else array[inside] for array in self.arrays]
        size = next(part.shape for part in found if part is not None)
        return np.stack([np.full(size, np.nan, np.float16) if part is None else part for part in found])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[...], dtype=dtype)
