"""Finding scans in folders and reading them: grouping by header, never by path."""

from __future__ import annotations

import multiprocessing
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from medformer.data.dicom import SPLIT_TAGS, NotAnImage, SliceFile, probe_dicom, sniff_dicom
from medformer.data.geometry import ORIENTATION_TOLERANCE, ScanError, SliceStack, cluster_orientations, stack_slices
from medformer.data.nifti import NiftiHeader, probe_nifti, read_nifti, sniff_nifti
from medformer.data.pixels import read_pixels
from medformer.data.volumes import MAX_VOLUME_BYTES, Volume, rescale

__all__ = ["Scan", "ScanIndex", "Skipped", "find_scans", "read_volume"]

# Below this many files a pool costs more than it saves: a header takes about half a millisecond.
_POOL_FROM = 4000
_TILT_NOTED_DEG = 0.1


@dataclass(frozen=True)
class Skipped:
    """A file or series left out, and why."""

    path: str
    reason: str
    refused: bool = False
    """True for a scan that cannot be read right, False for what is no scan at all."""


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A scan found but not read."""

    name: str
    """Short and unique in its index, made of the path below the root."""
    kind: Literal["nifti", "dicom"]
    files: tuple[str, ...]
    modality: str
    shape: tuple[int, int, int] | None
    """(Z, Y, X) as stored, before axes are brought to RAS+."""
    spacing_mm: tuple[float, float, float] | None

    def read(
        self, *, frame: int = 0, canonical: bool = True, strict: bool = False, modality: str | None = None
    ) -> Volume:
        """The volume; options as in `read_volume`. Every check is made again: files may have changed."""
        if self.kind == "nifti":
            volume = read_nifti(self.files[0], frame=frame, modality=modality)
        else:
            _only_frame(frame, self.name)
            parts, refused = _group([_probe_one(f) for f in self.files])
            if refused or len(parts) != 1:
                reason = refused[0].reason if refused else f"{self.name}: files no longer form one series; index again"
                raise ScanError(reason)
            volume = _read_series(parts[0], self.name, os.path.dirname(self.files[0]))
        return _finish(volume, canonical, strict, modality)


@dataclass(frozen=True, kw_only=True)
class ScanIndex:
    """Everything found under a root."""

    scans: list[Scan]
    skipped: list[Skipped]

    def __len__(self) -> int:
        return len(self.scans)


@dataclass(frozen=True)
class _Series:
    files: tuple[SliceFile, ...]
    stack: SliceStack
    notes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.stack.groups), self.files[0].rows, self.files[0].columns

    @property
    def folder(self) -> str:
        return os.path.dirname(self.files[0].path)


def read_volume(
    path: str | os.PathLike[str],
    *,
    frame: int = 0,
    canonical: bool = True,
    strict: bool = False,
    modality: str | None = None,
) -> Volume:
    """Read one scan: a .nii or .nii.gz file, one DICOM file, or a folder that holds one scan.

    frame: which frame of a 4D NIfTI. canonical: flip and swap axes (never resample) to run closest to right,
    anterior, superior. strict: refuse a scan that needs any note, that is where anything was assumed, dropped
    or is unusual. modality: overrides the header, or the guess for NIfTI, which names none.

    Raises ScanError with one line: what is wrong and the way out. Never returns a geometry it is not sure of.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise ScanError(f"read_volume: {os.path.basename(path) or path!r} does not exist (looked at {path!r})")
    if os.path.isdir(path):
        volume = _read_folder(path, frame, modality)
    else:
        found = _probe(path)
        if isinstance(found, Skipped):
            raise ScanError(found.reason)
        if isinstance(found, NiftiHeader):
            volume = read_nifti(path, frame=frame, modality=modality)
        else:
            _only_frame(frame, os.path.basename(path))
            parts, refused = _group([found])
            if refused:
                raise ScanError(refused[0].reason)
            volume = _read_series(parts[0], os.path.basename(path), path)
    return _finish(volume, canonical, strict, modality)


def _only_frame(frame: int, name: str) -> None:
    if frame != 0:
        raise ScanError(f"{name}: frame={frame} must be 0 for DICOM, whose repeats are separate scans; use find_scans")


def _read_folder(path: str, frame: int, modality: str | None) -> Volume:
    name = os.path.basename(os.path.abspath(path))
    scans, skipped, seen, series = _index(path, 0, False)
    broken = [s for s in skipped if s.refused]
    if len(scans) > 1 or (scans and broken):
        names = ", ".join(repr(s.name) for s in scans[:4]) + (", ..." if len(scans) > 4 else "")
        also = f" and {len(broken)} that cannot be read ({broken[0].reason})" if broken else ""
        raise ScanError(
            f"{name}: folder holds {len(scans)} scans ({names}){also}; use find_scans, or a folder with one"
        )
    if broken:
        raise ScanError(broken[0].reason)
    if not scans:
        raise ScanError(f"{name}: no NIfTI or DICOM scan in this folder ({seen} files looked at){_why(skipped)}")
    if scans[0].kind == "dicom":
        # Not Scan.read: every header was checked a moment ago.
        _only_frame(frame, name)
        volume = _read_series(series[0], name, path)
    else:
        volume = scans[0].read(frame=frame, canonical=False, modality=modality)
    dropped = [s for s in skipped if s.reason != _JUNK]
    notes = (*volume.notes, *(f"left out: {s.reason}" for s in dropped))
    return replace(volume, notes=notes, source=path)


def find_scans(root: str | os.PathLike[str], *, workers: int | None = None, progress: bool = False) -> ScanIndex:
    """Index all scans below `root`, whatever its layout: NIfTI and DICOM, nested, mixed with other files.

    workers: processes that read headers; None uses them from 4000 files on, 0 never. progress: show a bar.
    The order of scans and skipped is that of their names, the same on every run. Raises ScanError where
    nothing readable is found. Links to folders are not followed and hidden folders not searched.
    """
    root = os.fspath(root)
    if not os.path.exists(root):
        raise ScanError(f"find_scans: no folder {root!r}; point --data.root at the folder that holds the scans")
    scans, skipped, seen, _ = _index(root, workers, progress)
    if not scans:
        raise ScanError(
            f"find_scans: no NIfTI or DICOM under {root!r} ({seen} files looked at{_why(skipped)}); point "
            "--data.root at the folder that holds the scans"
        )
    return ScanIndex(scans=scans, skipped=skipped)


def _why(skipped: Sequence[Skipped]) -> str:
    told = [s.reason for s in skipped if s.reason != _JUNK]
    return f"; first reason: {told[0]}" if told else ""


_JUNK = "not a scan"
_Found = NiftiHeader | SliceFile | Skipped


def _index(root: str, workers: int | None, progress: bool) -> tuple[list[Scan], list[Skipped], int, list[_Series]]:
    paths = [root] if os.path.isfile(root) else _walk(root)
    base = os.path.dirname(root) if os.path.isfile(root) else root
    found = _probe_all(paths, workers, progress)
    skipped = [f for f in found if isinstance(f, Skipped)]
    series, refused = _group([f for f in found if isinstance(f, SliceFile)])
    drafts: list[tuple[str, Scan]] = []
    for header in (f for f in found if isinstance(f, NiftiHeader)):
        x, y, z = header.shape_xyz
        spacing = tuple(np.linalg.norm(header.affine[:3, :3], axis=0)[::-1].tolist())
        name = _relative(header.path, base).removesuffix(".gz").removesuffix(".nii")
        drafts.append((name, _scan(name, "nifti", (header.path,), "unknown", (z, y, x), spacing)))
    for part in series:
        one = len(part.files) == 1
        name = _relative(part.files[0].path, base) if one else _relative(part.folder, base)
        name = name.removesuffix(".dcm") if one else name
        name = os.path.basename(os.path.abspath(base)) if name == "." else name
        files = tuple(f.path for f in part.files)
        spacing = tuple(np.linalg.norm(part.stack.affine[:3, :3], axis=0)[::-1].tolist())
        drafts.append((name, _scan(name, "dicom", files, part.files[0].modality, part.shape, spacing)))
    # Stable: scans of one folder stay in the order of their first file, repeats in that of their tag.
    drafts.sort(key=lambda d: d[0])
    skipped = sorted(skipped + refused, key=lambda s: (s.path, s.reason))
    return _unique(drafts), skipped, len(paths), series


def _scan(
    name: str,
    kind: Literal["nifti", "dicom"],
    files: tuple[str, ...],
    modality: str,
    shape: tuple[int, int, int],
    spacing: tuple[float, ...],
) -> Scan:
    return Scan(
        name=name,
        kind=kind,
        files=files,
        modality=modality,
        shape=shape,
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
    )


def _unique(drafts: list[tuple[str, Scan]]) -> list[Scan]:
    """Number the names that occur more than once."""
    count: dict[str, int] = defaultdict(int)
    for name, _ in drafts:
        count[name] += 1
    taken, seen, scans = set(count), defaultdict(int), []
    for name, scan in drafts:
        if count[name] > 1:
            new = name
            while new in taken:
                seen[name] += 1
                new = f"{name}#{seen[name]}"
            taken.add(new)
            scan = replace(scan, name=new)
        scans.append(scan)
    return scans


def _walk(root: str) -> list[str]:
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        paths += [os.path.join(folder, f) for f in sorted(files)]
    return paths


def _relative(path: str, base: str) -> str:
    return Path(os.path.relpath(path, base)).as_posix()


def _probe_all(paths: list[str], workers: int | None, progress: bool) -> list[_Found]:
    if workers is None:
        workers = min(8, os.cpu_count() or 1) if len(paths) >= _POOL_FROM else 0
    bar = {"total": len(paths), "desc": "headers", "unit": "file", "disable": None if progress else True}
    if workers <= 1 or len(paths) < 2 or multiprocessing.current_process().daemon:
        return [_probe(p) for p in tqdm(paths, **bar)]
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            return list(tqdm(pool.map(_probe, paths, chunksize=64), **bar))
    except BrokenProcessPool as error:
        raise ScanError(
            "find_scans: worker processes died; guard the script with if __name__ == '__main__':, or pass workers=0"
        ) from error


def _probe(path: str) -> _Found:
    """What a file is, from its first bytes and its header."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return Skipped(path, _JUNK)
        with open(path, "rb") as file:
            head = file.read(4096)
        if sniff_dicom(head):
            return probe_dicom(path)
        if sniff_nifti(head):
            return probe_nifti(path)
        name = os.path.basename(path)
        named = name.lower().endswith((".nii", ".nii.gz", ".dcm")) and not name.startswith(".")
        reason = f"{name}: named like a scan, but its content is none ({os.path.getsize(path):,} bytes)"
        return Skipped(path, reason, refused=True) if named else Skipped(path, _JUNK)
    except NotAnImage as error:
        return Skipped(path, str(error))
    except ScanError as error:
        return Skipped(path, str(error), refused=True)
    except OSError as error:
        name = os.path.basename(path)
        return Skipped(path, f"{name}: cannot be opened ({error.strerror or error})", refused=True)


def _probe_one(path: str) -> SliceFile:
    found = _probe(path)
    if isinstance(found, SliceFile):
        return found
    reason = found.reason if isinstance(found, Skipped) else f"{os.path.basename(path)}: no longer DICOM; index again"
    raise ScanError(reason)


def _group(slices: Iterable[SliceFile]) -> tuple[list[_Series], list[Skipped]]:
    """Sort files into series, series into stacks; what is no regular stack is refused with its reason."""
    series: list[_Series] = []
    refused: list[Skipped] = []
    by_key: dict[tuple, list[SliceFile]] = defaultdict(list)
    for item in slices:
        by_key[item.series].append(item)
    for key in sorted(by_key, key=lambda k: min(f.path for f in by_key[k])):
        for files in _by_orientation(by_key[key]):
            for part in _split_repeats(files):
                where = part[0].path if len(part) == 1 else os.path.dirname(part[0].path)
                try:
                    series.append(_stack(part))
                except ScanError as error:
                    refused.append(Skipped(where, str(error), refused=True))
    return series, refused


def _by_orientation(files: list[SliceFile]) -> list[list[SliceFile]]:
    """Split where directions or pixel spacing differ by more than rounding."""
    table = np.array([[*f.orientation, *f.pixel_spacing] for f in files])
    labels = cluster_orientations(table, ORIENTATION_TOLERANCE)
    return [[f for f, label in zip(files, labels, strict=True) if label == i] for i in range(labels.max() + 1)]


def _split_repeats(files: list[SliceFile]) -> list[list[SliceFile]]:
    """Split a series that scans the same place repeatedly (echoes, b-values, phases), if one tag tells how."""
    if len(files) < 2 or any(len(f.positions) != 1 for f in files):
        return [files]
    try:
        groups = _fit(files, "").groups
    except ScanError:
        return [files]
    repeats = max(len(g) for g in groups)
    if repeats == 1:
        return [files]
    for tag in SPLIT_TAGS:
        parts: dict[str, list[SliceFile]] = defaultdict(list)
        for item in files:
            parts[item.split.get(tag, "")].append(item)
        sizes = {len(p) for p in parts.values()}
        if len(parts) == repeats and sizes == {len(groups)}:
            return [parts[value] for value in sorted(parts, key=_numeric)]
    return [files]


def _numeric(value: str) -> tuple[float, str]:
    try:
        return float(value), value
    except ValueError:
        return float("inf"), value


def _fit(files: Sequence[SliceFile], what: str) -> SliceStack:
    positions = np.array([p for f in files for p in f.positions])
    orientation = np.mean([f.orientation for f in files], axis=0)
    row_mm, col_mm = np.mean([f.pixel_spacing for f in files], axis=0).tolist()
    return stack_slices(positions, orientation, (row_mm, col_mm), single_depth_mm=files[0].depth_mm, what=what)


def _stack(files: list[SliceFile]) -> _Series:
    files = sorted(files, key=lambda f: f.path)
    what = os.path.basename(files[0].path if len(files) == 1 else os.path.dirname(files[0].path)) or "series"
    broken = [f.problem for f in files if f.problem]
    if broken:
        more = f" ({len(broken)} of {len(files)} files of the series)" if len(files) > 1 else ""
        raise ScanError(broken[0] + more)
    stack = _fit(files, what)
    first = files[0]
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
    return _Series(tuple(files), stack, tuple(notes))


def _read_series(series: _Series, name: str, source: str) -> Volume:
    """Decode a checked series into one array, dropping true duplicates."""
    places = {}
    for depth, group in enumerate(series.stack.groups):
        for i in group:
            places[i] = depth
    voxels: np.ndarray | None = None
    valid: np.ndarray | None = None
    slopes = np.ones((len(series.stack.groups), 1, 1))
    intercepts = np.zeros((len(series.stack.groups), 1, 1))
    filled: set[int] = set()
    notes, dropped, index = list(series.notes), 0, 0
    for file in series.files:
        stored, mask, pixel_notes = read_pixels(file.path)
        notes += [n for n in pixel_notes if n not in notes]
        if len(stored) != len(file.positions) or stored.shape[1:] != (file.rows, file.columns):
            raise ScanError(f"{name}: {os.path.basename(file.path)} changed since it was indexed; index again")
        if voxels is None:
            voxels = np.empty(series.shape, stored.dtype)
        elif stored.dtype != voxels.dtype:
            wide = np.promote_types(voxels.dtype, stored.dtype)
            voxels = voxels.astype(wide)
        for j in range(len(stored)):
            at = places[index]
            if at in filled:
                same_scale = slopes[at] == file.slopes[j] and intercepts[at] == file.intercepts[j]
                if not (same_scale and np.array_equal(voxels[at], stored[j])):
                    raise ScanError(
                        f"{name}: two different images at one position (slice {at + 1} of {series.shape[0]}) and no "
                        "tag tells them apart; keep one set of files in the folder"
                    )
                dropped += 1
            else:
                voxels[at], slopes[at], intercepts[at] = stored[j], file.slopes[j], file.intercepts[j]
                if mask is not None and mask[j].any():
                    valid = np.ones(series.shape, bool) if valid is None else valid
                    valid[at] = ~mask[j]
                filled.add(at)
            index += 1
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


def _finish(volume: Volume, canonical: bool, strict: bool, modality: str | None) -> Volume:
    if modality is not None and modality != volume.modality:
        volume = replace(volume, modality=modality, units="arbitrary")
    if strict and volume.notes:
        raise ScanError(
            f"{os.path.basename(volume.source.rstrip('/'))}: refused by strict=True: {'; '.join(volume.notes)}; pass "
            "strict=False to accept"
        )
    return volume.canonical() if canonical else volume
