"""From slices to stacks: files grouped by header, sorted by place, checked and decoded into one array."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pydicom

from medformer.data.dicom.headers import SPLIT_TAGS, Frame, SliceFile
from medformer.data.dicom.pixels import read_pixels
from medformer.data.geometry import ORIENTATION_TOLERANCE, ScanError, SliceStack, cluster_orientations, stack_slices
from medformer.data.volumes import MAX_VOLUME_BYTES, Volume, rescale

__all__ = ["Series", "group_slices", "read_series"]

_TILT_NOTED_DEG = 0.1


@dataclass(frozen=True)
class Series:
    """Slices that form one regular stack."""

    files: tuple[SliceFile, ...]
    frames: tuple[Frame, ...]
    stack: SliceStack
    notes: tuple[str, ...]
    repeat: str = ""
    """Which of several stacks at one place it is, e.g. "EchoTime 4.6"; empty for a lone stack."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.stack.groups), self.files[0].rows, self.files[0].columns

    @property
    def folder(self) -> str:
        return os.path.dirname(self.files[0].path)


def group_slices(slices: Iterable[SliceFile]) -> tuple[list[Series], list[tuple[str, str]]]:
    """Sort files into series, series into stacks; what is no regular stack comes back as (path, reason)."""
    series: list[Series] = []
    refused: list[tuple[str, str]] = []
    by_key: dict[tuple, list[SliceFile]] = defaultdict(list)
    for item in slices:
        by_key[item.series].append(item)
    for key in sorted(by_key, key=lambda k: min(f.path for f in by_key[k])):
        files = {f.path: f for f in by_key[key]}
        for frames in _by_orientation([f for path in sorted(files) for f in files[path].frames]):
            for label, part in _split_repeats(frames):
                used = tuple(files[path] for path in dict.fromkeys(f.path for f in part))
                where = used[0].path if len(used) == 1 else os.path.dirname(used[0].path)
                try:
                    series.append(_stack(used, part, label))
                except ScanError as error:
                    refused.append((where, str(error)))
    return series, refused


def _by_orientation(frames: list[Frame]) -> list[list[Frame]]:
    """Split where directions or pixel spacing differ by more than rounding."""
    table = np.array([[*f.orientation, *f.spacing] for f in frames])
    labels = cluster_orientations(table, ORIENTATION_TOLERANCE)
    return [[f for f, label in zip(frames, labels, strict=True) if label == i] for i in range(labels.max() + 1)]


def _split_repeats(frames: list[Frame]) -> list[tuple[str, list[Frame]]]:
    """Split slices that show the same place repeatedly (echoes, b-values, phases), if tags tell how."""
    if len(frames) > 1:
        try:
            groups = _fit(frames, None, "").groups
        except ScanError:
            return [("", frames)]
        repeats = max(len(g) for g in groups)
        if repeats > 1 and (parts := _by_tags(frames, repeats, len(groups), SPLIT_TAGS)) is not None:
            return parts
    return [("", frames)]


def _by_tags(
    frames: list[Frame], repeats: int, slices: int, tags: Sequence[str]
) -> list[tuple[str, list[Frame]]] | None:
    """One stack for each value of a tag, or of two tags and more; None where that does not come out even."""
    for i, tag in enumerate(tags):
        values: dict[str, list[Frame]] = defaultdict(list)
        for frame in frames:
            values[frame.split.get(tag, "")].append(frame)
        count = len(values)
        if count < 2 or repeats % count or {len(v) for v in values.values()} != {len(frames) // count}:
            continue
        out: list[tuple[str, list[Frame]]] = []
        for value in sorted(values, key=_numeric):
            label = f"{tag} {value}"
            if repeats == count:
                out.append((label, values[value]))
                continue
            deeper = _by_tags(values[value], repeats // count, slices, tags[i + 1 :])
            if deeper is None:
                break
            out += [(f"{label}, {below}", part) for below, part in deeper]
        if len(out) == repeats and all(len(part) == slices for _, part in out):
            return out
    return None


def _numeric(value: str) -> tuple[list[float], str]:
    try:
        return [float(v) for v in value.split("/")], value
    except ValueError:
        return [float("inf")], value


def _fit(frames: Sequence[Frame], depth_mm: float | None, what: str) -> SliceStack:
    positions = np.array([f.position for f in frames])
    orientation = np.mean([f.orientation for f in frames], axis=0)
    row_mm, col_mm = np.mean([f.spacing for f in frames], axis=0).tolist()
    return stack_slices(positions, orientation, (row_mm, col_mm), single_depth_mm=depth_mm, what=what)


def _stack(files: tuple[SliceFile, ...], frames: list[Frame], repeat: str) -> Series:
    what = os.path.basename(files[0].path if len(files) == 1 else os.path.dirname(files[0].path)) or "series"
    broken = [f.problem for f in files if f.problem]
    if broken:
        more = f" ({len(broken)} of {len(files)} files of the series)" if len(files) > 1 else ""
        raise ScanError(broken[0] + more)
    first = files[0]
    stack = _fit(frames, first.depth_mm, what)
    size = len(stack.groups) * first.rows * first.columns * 4
    if size > MAX_VOLUME_BYTES:
        raise ScanError(f"{what}: {size:,} bytes declared, at most {MAX_VOLUME_BYTES:,} are read")
    notes = list(dict.fromkeys(n for f in files for n in f.notes))
    if len(stack.groups) == 1:
        source = f"{first.depth_source} {first.depth_mm:.4g} mm" if first.depth_mm else "assumed 1 mm, header has none"
        notes.append(f"single slice: depth {source}")
    if stack.tilt_deg > _TILT_NOTED_DEG:
        notes.append(f"gantry tilt {stack.tilt_deg:.1f} deg: affine is sheared")
    if stack.residual_mm > 0.01:
        notes.append(f"slices lie up to {stack.residual_mm:.2g} mm off an even step")
    if not first.series_uid:
        notes.append("no SeriesInstanceUID: files of one folder and frame of reference taken as a series")
    return Series(files, tuple(frames), stack, tuple(notes), repeat)


def read_series(series: Series, name: str, source: str) -> Volume:
    """Decode a checked series into one array, dropping true duplicates."""
    places = {}
    for depth, group in enumerate(series.stack.groups):
        for i in group:
            places[i] = depth
    by_path: dict[str, list[int]] = defaultdict(list)
    for number, frame in enumerate(series.frames):
        by_path[frame.path].append(number)
    voxels: np.ndarray | None = None
    valid: np.ndarray | None = None
    slopes = np.ones((len(series.stack.groups), 1, 1))
    intercepts = np.zeros((len(series.stack.groups), 1, 1))
    filled: set[int] = set()
    notes, dropped, size, tags = list(series.notes), 0, 0, {}
    for file in series.files:
        pixels = read_pixels(file.path, tiles=file.tiles, count=len(file.frames))
        size += os.path.getsize(file.path)
        tags = tags or pixels.tags
        notes += [n for n in pixels.notes if n not in notes]
        stored, mask = pixels.stored, pixels.padding
        if stored.ndim != 3 or len(stored) != len(file.frames) or stored.shape[1:] != (file.rows, file.columns):
            raise ScanError(f"{name}: {os.path.basename(file.path)} changed since it was indexed; index again")
        if voxels is None:
            voxels = np.empty(series.shape, stored.dtype)
        elif stored.dtype != voxels.dtype:
            voxels = voxels.astype(np.promote_types(voxels.dtype, stored.dtype))
        for number in by_path[file.path]:
            frame, at = series.frames[number], places[number]
            if at in filled:
                same_scale = slopes[at] == frame.slope and intercepts[at] == frame.intercept
                if not (same_scale and np.array_equal(voxels[at], stored[frame.index])):
                    raise ScanError(
                        f"{name}: two different images at one position (slice {at + 1} of {series.shape[0]}) and no "
                        "tag tells them apart; keep one set of files in the folder"
                    )
                dropped += 1
            else:
                voxels[at], slopes[at], intercepts[at] = stored[frame.index], frame.slope, frame.intercept
                if mask is not None and mask[frame.index].any():
                    valid = np.ones(series.shape, bool) if valid is None else valid
                    valid[at] = ~mask[frame.index]
                filled.add(at)
    assert voxels is not None
    if dropped:
        notes.append(f"{dropped} duplicate slice{'s' if dropped > 1 else ''} dropped")
    first = series.files[0]
    hounsfield = all(f.hounsfield for f in series.files)
    return Volume(
        voxels=_rescale_measured(voxels, valid, slopes, intercepts),
        affine=series.stack.affine,
        modality=first.modality,
        units="HU" if hounsfield else "arbitrary",
        notes=tuple(notes),
        source=source,
        valid=valid,
        provenance={
            "format": "DICOM",
            "reader": f"pydicom {pydicom.__version__}",
            "files": len(series.files),
            "bytes": size,
            "tags": tags | ({"repeat": series.repeat} if series.repeat else {}),
        },
    )


def _rescale_measured(
    stored: np.ndarray, valid: np.ndarray | None, slopes: np.ndarray, intercepts: np.ndarray
) -> np.ndarray:
    """Rescale; padding far outside the measured range must not force a wider type."""
    if valid is not None and valid.any():
        measured = stored[valid]
        narrow = rescale(np.clip(stored, measured.min(), measured.max()), slopes, intercepts)
        full = rescale(stored, slopes, intercepts)
        return full if full.dtype.itemsize <= narrow.dtype.itemsize else narrow
    return rescale(stored, slopes, intercepts)
