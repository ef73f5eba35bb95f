"""From slices to stacks: files grouped by header, sorted by place, checked and decoded into one array."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import pydicom

from medformer.data.dicom.headers import MARKS, NUMBER, SPLIT_TAGS
from medformer.data.dicom.parts import Series, join_parts
from medformer.data.dicom.pixels import read_pixels
from medformer.data.dicom.records import Frame, SliceFile
from medformer.data.geometry import (
    ORIENTATION_TOLERANCE,
    ScanError,
    SliceStack,
    check_affine,
    cluster_orientations,
    stack_slices,
)
from medformer.data.volumes import MAX_VOLUME_BYTES, Volume, odd_values, rescale

__all__ = ["Series", "group_slices", "read_series"]

_TILT_NOTED_DEG = 0.1
# Slopes of PET and Philips MR vary from slice to slice by some hundred times at most.
_MOST_SCALE = 1e3
_MOST_HU = 70_000  # 16 bits and an intercept


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
            for label, part, remarks in _split(frames, MARKS):
                used = tuple(files[path] for path in dict.fromkeys(f.path for f in part))
                where = used[0].path if len(used) == 1 else os.path.dirname(used[0].path)
                try:
                    series.append(_stack(used, part, label, remarks))
                except ScanError as error:
                    refused.append((where, str(error)))
                except (ArithmeticError, ValueError, LookupError, np.linalg.LinAlgError) as error:
                    reason = f"{os.path.basename(where)}: no stack can be made of it ({type(error).__name__}: {error})"
                    refused.append((where, reason))
    return join_parts(series, _stack), refused


def _by_orientation(frames: list[Frame]) -> list[list[Frame]]:
    """Split where directions or pixel spacing differ by more than rounding."""
    table = np.array([[*f.orientation, *f.spacing] for f in frames])
    labels = cluster_orientations(table, ORIENTATION_TOLERANCE)
    return [[f for f, label in zip(frames, labels, strict=True) if label == i] for i in range(labels.max() + 1)]


def _split(frames: list[Frame], marks: Sequence[str]) -> list[tuple[str, list[Frame], tuple[str, ...]]]:
    """The stacks in slices that lie alike, each with what tells it apart and notes.

    Slices that make one stack stay together whatever their marks say. Repeats of a place (echoes, b-values, phases)
    are split by the tags that do so evenly; what is no stack, by the marks, unless its parts lie in one another's
    gaps: those are one scan with a slice lost or moved. Whole volumes are told apart by InstanceNumber at the last.
    """
    whole: list[tuple[str, list[Frame], tuple[str, ...]]] = [("", frames, ())]
    if len(frames) == 1:
        return whole
    fitted = _try(frames)
    repeats, places = 0, {}
    if isinstance(fitted, SliceStack):
        repeats = max(len(g) for g in fitted.groups)
        if repeats == 1:
            return whole
        places = {id(frames[i]): at for at, group in enumerate(fitted.groups) for i in group}
        if (parts := _by_tags(frames, repeats, places, SPLIT_TAGS)) is not None:
            return [(label, part, ()) for label, part in parts]
        if (parts := _by_sets(frames, repeats, places)) is not None:
            return [(label, part, ()) for label, part in parts]
    for i, mark in enumerate(marks):
        values: dict[str, list[Frame]] = defaultdict(list)
        for frame in frames:
            values[frame.split.get(mark, "")].append(frame)
        fits = {value: _try(part) for value, part in values.items()}
        stacks = [f for f in fits.values() if isinstance(f, SliceStack)]
        good = [f for f in stacks if len(f.groups) > 1]
        if len(values) < 2 or not good or (repeats and max(len(g) for f in stacks for g in f.groups) >= repeats):
            continue
        if not repeats and _interleaved(frames, list(values.values())):
            continue
        reason = "" if isinstance(fitted, SliceStack) else f", which together are no stack ({fitted})"
        remarks = (f"one of {len(values)} parts of a series by {mark}{reason}",)
        out = []
        for number, value in enumerate(sorted(values)):
            label = _label(mark, value, number)
            below = _split(values[value], marks[i + 1 :])
            out += [
                (f"{label}, {deeper}" if deeper else label, part, (*remarks, *more)) for deeper, part, more in below
            ]
        return out
    return (_by_number(frames, repeats, places) if repeats > 1 else None) or whole


def _try(frames: Sequence[Frame]) -> SliceStack | ScanError:
    try:
        return _fit(frames, None, "")
    except ScanError as error:
        return ScanError(str(error).removeprefix(": "))


def _interleaved(frames: list[Frame], parts: list[list[Frame]]) -> bool:
    """Whether a part has its slices in the gaps of another: then its own gaps are wider than those of all."""
    row, column = np.reshape(frames[0].orientation, (2, 3))
    normal = np.cross(row, column)

    def gap(some: list[Frame]) -> float:
        depths = np.unique(np.round(np.array([f.position for f in some]) @ normal, 3))
        return float(np.median(np.diff(depths))) if len(depths) > 1 else 0.0

    usual = gap(frames)
    return usual > 0 and any(gap(part) > 1.5 * usual for part in parts)


def _label(tag: str, value: str, number: int) -> str:
    """UIDs are counted and not shown: a label travels with the volume."""
    return f"frame of reference {number + 1}" if tag == "FrameOfReferenceUID" else f"{tag} {value or 'blank'}"


def _by_tags(
    frames: list[Frame], repeats: int, places: dict[int, int], tags: Sequence[str]
) -> list[tuple[str, list[Frame]]] | None:
    """One stack for each value of a tag, or of two tags and more; None where that does not come out even.

    places: id of a frame to the number of its position.
    """
    slices = len(set(places.values()))
    for i, tag in enumerate(tags):
        values: dict[str, list[Frame]] = defaultdict(list)
        for frame in frames:
            values[frame.split.get(tag, "")].append(frame)
        count = len(values)
        if count < 2 or repeats % count or {len(v) for v in values.values()} != {len(frames) // count}:
            continue
        out: list[tuple[str, list[Frame]]] = []
        for number, value in enumerate(sorted(values, key=_numeric)):
            label = _label(tag, value, number)
            if repeats == count:
                out.append((label, values[value]))
                continue
            deeper = _by_tags(values[value], repeats // count, places, tags[i + 1 :])
            if deeper is None:
                break
            out += [(f"{label}, {below}", part) for below, part in deeper]
        if len(out) == repeats and all(len({places[id(f)] for f in part}) == len(part) == slices for _, part in out):
            return out
    return None


def _by_sets(frames: list[Frame], repeats: int, places: dict[int, int]) -> list[tuple[str, list[Frame]]] | None:
    """One stack for each set of values that some tags have together, such as b-value and direction; None where that
    does not come out even. Tags whose values are not the same at each place have no say."""
    tags = []
    for tag in SPLIT_TAGS:
        seen: dict[int, Counter[str]] = defaultdict(Counter)
        for frame in frames:
            seen[places[id(frame)]][frame.split.get(tag, "")] += 1
        first = next(iter(seen.values()))
        if len(first) > 1 and all(values == first for values in seen.values()):
            tags.append(tag)
    sets: dict[tuple[str, ...], list[Frame]] = defaultdict(list)
    for frame in frames:
        sets[tuple(frame.split.get(tag, "") for tag in tags)].append(frame)
    slices = len(set(places.values()))
    if len(sets) != repeats or any(len({places[id(f)] for f in part}) != slices for part in sets.values()):
        return None
    ordered = sorted(sets, key=lambda values: [_numeric(v) for v in values])
    return [
        (", ".join(_label(t, v, number) for t, v in zip(tags, values, strict=True)), sets[values])
        for number, values in enumerate(ordered)
    ]


def _by_number(
    frames: list[Frame], repeats: int, places: dict[int, int]
) -> list[tuple[str, list[Frame], tuple[str, ...]]] | None:
    """Volumes one after another by InstanceNumber, as GE writes them; None unless each goes through all places once,
    and all in the same order."""
    slices = len(set(places.values()))
    numbers = [frame.split.get(NUMBER, "") for frame in frames]
    if slices < 2 or len(frames) != repeats * slices or len(set(numbers)) != len(frames):
        return None
    if not all(number.isdecimal() for number in numbers):
        return None
    ordered = sorted(frames, key=lambda f: int(f.split[NUMBER]))
    parts = [ordered[at : at + slices] for at in range(0, len(ordered), slices)]
    orders = {tuple(places[id(frame)] for frame in part) for part in parts}
    if len(orders) != 1 or len(set(orders.pop())) != slices:
        return None
    remark = f"one of {repeats} volumes told apart by {NUMBER} alone, which runs through the slices in the same order"
    return [(f"volume {number + 1} by {NUMBER}", part, (remark,)) for number, part in enumerate(parts)]


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


def _stack(
    files: tuple[SliceFile, ...], frames: list[Frame], repeat: str = "", remarks: tuple[str, ...] = ()
) -> Series:
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
    _check_scales(files, frames, what)
    check_affine(stack.affine, what)
    notes = [*remarks, *dict.fromkeys(n for f in files for n in f.notes)]
    kinds = sorted({f.split.get("ImageType", "") for f in frames})
    if len(kinds) > 1:
        notes.append(f"ImageType differs between slices ({'; '.join(kinds[:4])}): taken as one stack")
    if len({f.split.get("FrameOfReferenceUID", "") for f in frames}) > 1:
        notes.append("FrameOfReferenceUID differs between slices of one series: taken as one stack")
    if len(stack.groups) == 1:
        source = f"{first.depth_source} {first.depth_mm:.4g} mm" if first.depth_mm else "assumed 1 mm, header has none"
        notes.append(f"single slice: depth {source}")
    if stack.tilt_deg > _TILT_NOTED_DEG:
        notes.append(f"gantry tilt {stack.tilt_deg:.1f} deg: affine is sheared")
    if stack.residual_mm > 0.01:
        notes.append(f"slices lie up to {stack.residual_mm:.2g} mm off an even step")
    if not first.series_uid:
        notes.append("no SeriesInstanceUID: files of one folder taken as a series")
    repeats = max(len(g) for g in stack.groups)
    doubts = (
        f"{sum(len(g) > 1 for g in stack.groups)} of {len(stack.groups)} positions hold up to {repeats} images that no "
        "tag tells apart: refused unless they are equal, which only reading shows",
    )
    return Series(files, tuple(frames), stack, tuple(notes), repeat, doubts if repeats > 1 else ())


def _check_scales(files: Sequence[SliceFile], frames: Sequence[Frame], what: str) -> None:
    """A slope or an intercept far beyond those of the other slices is damage; scanners vary them slice by slice."""
    for tag, values, least in (
        ("RescaleSlope", np.abs([f.slope for f in frames]), 0.0),
        ("RescaleIntercept", np.abs([f.intercept for f in frames]), 1e4),
    ):
        usual, highest = float(np.median(values)), float(values.max())
        if highest > max(_MOST_SCALE * usual, least):
            raise ScanError(
                f"{what}: {tag} {highest:g} on a slice, {usual:g} on most of its {len(values)}; the header is damaged"
            )


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
    scaled = _rescale_measured(voxels, valid, slopes, intercepts, name)
    notes += odd_values(scaled)
    if hounsfield and (beyond := _beyond_hu(scaled, valid)):
        notes.append(beyond)
    return Volume(
        voxels=scaled,
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


def _beyond_hu(voxels: np.ndarray, valid: np.ndarray | None) -> str:
    """A note for a CT whose values are none that Hounsfield units take."""
    low, high = float(voxels.min()), float(voxels.max())
    if max(-low, high) <= _MOST_HU:
        return ""
    measured = voxels if valid is None or not valid.any() else voxels[valid]
    low, high = float(measured.min()), float(measured.max())
    return f"CT values from {low:g} to {high:g}, which are no HU" if max(-low, high) > _MOST_HU else ""


def _rescale_measured(
    stored: np.ndarray, valid: np.ndarray | None, slopes: np.ndarray, intercepts: np.ndarray, name: str
) -> np.ndarray:
    """Rescale; padding far outside the measured range must not force a wider type."""
    if valid is not None and valid.any():
        measured = stored[valid]
        narrow = rescale(np.clip(stored, measured.min(), measured.max()), slopes, intercepts, name)
        full = rescale(stored, slopes, intercepts, name)
        return full if full.dtype.itemsize <= narrow.dtype.itemsize else narrow
    return rescale(stored, slopes, intercepts, name)
