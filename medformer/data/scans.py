"""Finding scans in folders and reading them: grouping by header, never by path."""

from __future__ import annotations

import multiprocessing
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from medformer.data.archives import archive_note, sniff_zip, unpacked, unpacked_for_good
from medformer.data.dicom.headers import probe_dicom, sniff_dicom
from medformer.data.dicom.planar import read_image, why_left_out
from medformer.data.dicom.records import ImageFile, NotAnImage, SliceFile
from medformer.data.dicom.series import Series, group_slices, read_series
from medformer.data.fastmri import probe_fastmri, read_fastmri, sniff_hdf5
from medformer.data.geometry import ScanError
from medformer.data.itk import ItkHeader, probe_itk, read_itk, sniff_itk
from medformer.data.modality import MODALITY_FILE
from medformer.data.nifti import NiftiHeader, header_of, probe_nifti, read_nifti, sniff_nifti
from medformer.data.pictures import split_page
from medformer.data.plain import PlainHeader, probe_plain, read_plain, sniff_plain
from medformer.data.resample import deskew as upright
from medformer.data.volumes import Volume
from medformer.data.walking import Said, Skipped, walk

__all__ = ["EMPTY", "JUNK", "Scan", "ScanIndex", "Skipped", "find_scans", "index_scans", "read_volume"]

# Below this many files a pool costs more than it saves: a header takes 0.5 to 2 ms, a worker half a second to start.
_POOL_FROM = 2000
Kind = Literal["nifti", "dicom", "itk", "fastmri", "image", "npy"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to read; the arguments of `read_volume`."""

    frame: int = 0
    canonical: bool = True
    strict: bool = False
    modality: str | None = None
    deskew: bool = False
    colour: Literal["refuse", "grey"] = "refuse"
    voi: bool = False


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A scan found but not read."""

    name: str
    """Short and unique in its index, made of the path below the root."""
    kind: Kind
    files: tuple[str, ...]
    modality: str
    shape: tuple[int, int, int] | None
    """(Z, Y, X) as stored, before axes are brought to RAS+."""
    spacing_mm: tuple[float, float, float] | None
    """In zyx order; None where the files have none."""
    repeat: str = ""
    """Which of several DICOM stacks in the same files it is, e.g. "EchoTime 4.6"."""
    notes: tuple[str, ...] = ()
    """What the headers alone already tell; reading may add to it."""
    said: str | None = None
    """The modality that a modality.txt gives to a scan whose format names none."""

    def read(
        self,
        *,
        frame: int = 0,
        canonical: bool = True,
        strict: bool = False,
        modality: str | None = None,
        deskew: bool = False,
        colour: Literal["refuse", "grey"] = "refuse",
        voi: bool = False,
    ) -> Volume:
        """The volume; options as in `read_volume`. Every check is made again: files may have changed."""
        options = Options(
            frame=frame,
            canonical=canonical,
            strict=strict,
            modality=_known(modality) or self.said,
            deskew=deskew,
            colour=colour,
            voi=voi,
        )
        with _naming(self.name):
            return self._read(options)

    def _read(self, options: Options) -> Volume:
        if self.kind != "dicom":
            return _finish(_read_file(self.files[0], _probe(self.files[0]), options), options)
        _only_frame(options.frame, self.name)
        parts, refused = group_slices([_probe_slices(f) for f in self.files])
        # Files of one repeat alone no longer show that there are others, nor every tag that told them apart.
        told = set(self.repeat.split(", "))
        same = [p for p in parts if p.repeat == self.repeat] or [
            p for p in parts if told.issuperset(p.repeat.split(", "))
        ]
        parts = same if len(parts) > 1 else parts
        if len(parts) != 1:
            raise ScanError(refused[0][1] if refused else f"{self.name}: files no longer form one series; index again")
        volume = read_series(parts[0], self.name, os.path.dirname(self.files[0]))
        # What the index saw of its neighbours is not in these files.
        lost = tuple(n for n in self.notes if n not in volume.notes and n not in parts[0].doubts)
        return _finish(replace(volume, notes=(*lost, *volume.notes)), options)


@dataclass(frozen=True, kw_only=True)
class ScanIndex:
    """Everything found under a root."""

    scans: list[Scan]
    skipped: list[Skipped]
    seen: int = 0
    """Files looked at."""

    def __len__(self) -> int:
        return len(self.scans)


def read_volume(
    path: str | os.PathLike[str],
    *,
    frame: int = 0,
    canonical: bool = True,
    strict: bool = False,
    modality: str | None = None,
    deskew: bool = False,
    colour: Literal["refuse", "grey"] = "refuse",
    voi: bool = False,
) -> Volume:
    """Read one scan or image: a file of any known format, a zip file, or a folder that holds one scan.

    Formats: NIfTI (.nii, .nii.gz, .hdr with .img), DICOM (a slice, a multi-frame file, a mosaic, an X-ray; a folder of
    slices), NRRD and MetaImage, fastMRI HDF5, .npy, PNG, JPEG, TIFF (a page is named `file.tif#2`) and BMP.

    frame: which frame of a 4D NIfTI or a 4D multi-frame DICOM file. canonical: flip and swap axes (never resample) to
    run closest to right, anterior, superior; mammograms: chest wall on the left. strict: refuse a scan that needs any
    note, that is where anything was assumed, dropped or is unusual. modality: overrides the header, or the guess for
    formats that name none (as the first word of a file modality.txt next to one of these does). deskew: resample a
    sheared stack (tilted gantry) onto an upright grid. colour: "grey" weighs colour pictures, which are refused
    otherwise. voi: apply an X-ray's VOI LUT or window, to 0..1.

    Raises ScanError with one line: what is wrong and the way out. Never returns a geometry it is not sure of.
    """
    options = Options(
        frame=frame, canonical=canonical, strict=strict, modality=_known(modality), deskew=deskew, colour=colour,
        voi=voi,
    )  # fmt: skip
    path = os.fspath(path)
    if split_page(path)[1]:
        return _finish(_read_file(path, probe_plain(path), options), options)
    if not os.path.exists(path):
        raise ScanError(f"read_volume: {os.path.basename(path) or path!r} does not exist (looked at {path!r})")
    with _naming(os.path.basename(os.path.abspath(path))):
        return _read_path(path, options)


def _known(modality: str | None) -> str | None:
    return None if modality == "unknown" else modality


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes the refusal of this one scan, so that an index or a preparation goes on."""
    try:
        yield
    except ScanError:
        raise
    except Exception as error:
        raise ScanError(unexpected(name, error)) from error


def unexpected(name: str, error: Exception) -> str:
    """The reason of a refusal that no check foresaw."""
    text = " ".join(str(error).split())[:120]
    return f"{name}: cannot be read, {type(error).__name__}{f' ({text})' if text else ''}; please report it"


def _read_path(path: str, options: Options) -> Volume:
    if os.path.isdir(path):
        return _finish(_read_folder(path, path, options), options)
    if _is_zip(path):
        with unpacked(path) as folder:
            return _finish(_read_folder(folder, path, options), options)
    return _finish(_read_file(path, _probe(path), options), options)


def _only_frame(frame: int, name: str) -> None:
    if frame != 0:
        raise ScanError(f"{name}: frame={frame} must be 0 for DICOM, whose repeats are separate scans; use find_scans")


def _is_zip(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return sniff_zip(file.read(4))
    except OSError:
        return False


def _read_file(path: str, found: _Found, options: Options) -> Volume:
    name = os.path.basename(path)
    match found:
        case Skipped():
            unknown = f"{name}: not a scan, nor a PNG, JPEG, TIFF or BMP picture, whatever its name says"
            raise ScanError(unknown if found.reason == JUNK else found.reason)
        case NiftiHeader():
            return read_nifti(found.path, frame=options.frame, modality=options.modality or _said(path))
        case SliceFile():
            return _read_frames(found, name, path, options.frame)
    if options.frame != 0:
        raise ScanError(f"{name}: frame={options.frame} must be 0, the file holds one")
    match found:
        case ImageFile():
            return read_image(found, canonical=options.canonical, colour=options.colour, voi=options.voi)
        case ItkHeader():
            said = _said(path) if found.modality == "unknown" else None
            return read_itk(path, modality=options.modality or said)
        case PlainHeader():
            return read_plain(path, colour=options.colour, modality=options.modality or _said(path))
        case _FastMri():
            return read_fastmri(path)


def _said(path: str) -> str | None:
    folder = os.path.dirname(os.path.abspath(path))
    return Said(folder).of(folder)


def _read_frames(found: SliceFile, name: str, path: str, frame: int) -> Volume:
    """One DICOM file; of several stacks in it that show one place, one."""
    parts, refused = group_slices([found])
    if refused:
        raise ScanError(refused[0][1])
    if len(parts) > 1 and not all(np.allclose(p.stack.affine, parts[0].stack.affine, atol=1e-3) for p in parts):
        raise ScanError(f"{name}: file holds {len(parts)} stacks that lie differently; use find_scans")
    if not 0 <= frame < len(parts):
        raise ScanError(f"{name}: frame={frame} must be 0 to {len(parts) - 1}; it holds {len(parts)}")
    volume = read_series(parts[frame], name, path)
    if len(parts) > 1:
        note = f"4D: frame {frame} of {len(parts)} used ({parts[frame].repeat})"
        volume = replace(volume, notes=(*volume.notes, note))
    return volume


def _read_folder(path: str, source: str, options: Options) -> Volume:
    name = os.path.basename(os.path.abspath(source))
    scans, skipped, seen, series = _index(path, 0, False, False)
    if not scans and not any(s.refused for s in skipped):
        scans, skipped, seen, series = _index(path, 0, False, True)
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
        raise ScanError(f"{name}: no scan in this folder ({seen} files looked at){_why(skipped)}")
    if scans[0].kind == "dicom":
        # Not Scan.read: every header was checked a moment ago.
        _only_frame(options.frame, name)
        volume = read_series(series[0], name, path)
    else:
        volume = _read_file(scans[0].files[0], _probe(scans[0].files[0]), options)
    dropped = [s for s in skipped if s.reason != JUNK]
    notes = (*volume.notes, *(f"left out: {s.reason}" for s in dropped))
    return replace(volume, notes=notes, source=source)


def find_scans(
    root: str | os.PathLike[str], *, workers: int | None = None, progress: bool = False, images: bool = False
) -> ScanIndex:
    """Index all scans below `root`, whatever its layout and formats: nested, mixed with other files.

    workers: processes that read headers; None uses them from 2000 files on, 0 never. progress: show a bar. images:
    also list what has no place in a patient: X-rays, mammograms, pictures and .npy.
    The order of scans and skipped is that of their names, the same on every run. Raises ScanError where
    nothing readable is found. root may also be one file, or a zip file, which is unpacked until this process ends.
    Linked folders are searched once each; hidden folders are not. A file modality.txt says in its first word what the
    scans below its folder are, where their format does not.
    """
    index = index_scans(root, workers=workers, progress=progress, images=images)
    if not index.scans:
        raise ScanError(
            f"find_scans: no NIfTI or DICOM under {os.fspath(root)!r} ({index.seen} files looked at"
            f"{_why(index.skipped)}); point --data.root at the folder that holds the scans"
        )
    return index


def index_scans(
    root: str | os.PathLike[str], *, workers: int | None = None, progress: bool = False, images: bool = False
) -> ScanIndex:
    """`find_scans` for who asks what became of every file: an index without scans is an answer too."""
    root = os.fspath(root)
    if not os.path.exists(root):
        raise ScanError(f"find_scans: no folder {root!r}; point --data.root at the folder that holds the scans")
    if os.path.isfile(root) and _is_zip(root):
        root = unpacked_for_good(root)
    scans, skipped, seen, _ = _index(root, workers, progress, images)
    return ScanIndex(scans=scans, skipped=skipped, seen=seen)


def _why(skipped: Sequence[Skipped]) -> str:
    told = [s.reason for s in skipped if s.reason != JUNK]
    return f"; first reason: {told[0]}" if told else ""


@dataclass(frozen=True)
class _FastMri:
    path: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float] | None


JUNK = "not a scan"
"""Why a file is left out that nothing in it shows to be one."""
EMPTY = "empty file (0 bytes)"
_Found = NiftiHeader | SliceFile | ImageFile | ItkHeader | PlainHeader | _FastMri | Skipped


def _index(
    root: str, workers: int | None, progress: bool, images: bool
) -> tuple[list[Scan], list[Skipped], int, list[Series]]:
    paths, skipped = ([root], []) if os.path.isfile(root) else walk(root)
    base = os.path.dirname(root) if os.path.isfile(root) else root
    found = _probe_all(paths, workers, progress)
    skipped += [f for f in found if isinstance(f, Skipped)]
    empty: Counter[str] = Counter(os.path.dirname(s.path) for s in skipped if s.reason.endswith(EMPTY))
    said = Said(base)
    series, refused = group_slices([f for f in found if isinstance(f, SliceFile)])
    skipped += [Skipped(path, reason, refused=True) for path, reason in refused]
    drafts: list[Scan] = []
    for item in found:
        if isinstance(item, Skipped | SliceFile):
            continue
        if isinstance(item, ImageFile | PlainHeader) and not images:
            skipped.append(Skipped(item.path, str(why_left_out(item)) if isinstance(item, ImageFile) else _flat(item)))
        elif isinstance(item, ImageFile | PlainHeader) and item.problem:
            skipped.append(Skipped(item.path, item.problem, refused=True))
        else:
            drafts.append(_of_one_file(item, base, said))
    for part in series:
        lost = empty[part.folder]
        one = len(part.files) == 1
        name = _relative(part.files[0].path, base) if one else _relative(part.folder, base)
        name = name.removesuffix(".dcm") if one else name
        drafts.append(
            Scan(
                name=os.path.basename(os.path.abspath(base)) if name == "." else name,
                kind="dicom",
                files=tuple(f.path for f in part.files),
                modality=part.files[0].modality,
                shape=part.shape,
                spacing_mm=_spacing(part.stack.affine),
                repeat=part.repeat,
                notes=(
                    *part.notes,
                    *part.doubts,
                    *([f"{lost} empty files in its folder: slices lost?"] if lost else []),
                ),
            )
        )
    # Stable: scans of one folder stay in the order of their first file, repeats in that of their tag.
    drafts.sort(key=lambda d: d.name)
    return _unique(drafts), sorted(skipped, key=lambda s: (s.path, s.reason)), len(paths), series


def _flat(item: PlainHeader) -> str:
    what = "an array" if item.kind == "npy" else "a picture"
    return f"{os.path.basename(item.path)}: {what} without a place in a patient; find_scans(images=True) lists it"


def _spacing(affine: np.ndarray) -> tuple[float, float, float]:
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return z, y, x


def _of_one_file(item: NiftiHeader | ImageFile | ItkHeader | PlainHeader | _FastMri, base: str, folders: Said) -> Scan:
    name, kind, modality, notes = _relative(item.path, base), "image", "unknown", ()
    stem = name.removesuffix(".gz")
    match item:
        case NiftiHeader():
            kind, notes = "nifti", item.notes
            x, y, z = item.shape_xyz
            shape, spacing = (z, y, x), _spacing(item.affine)
            stem = stem.removesuffix(".nii").removesuffix(".hdr")
        case ItkHeader():
            kind, shape, spacing, notes = "itk", item.shape, _spacing(item.affine), item.notes
            modality = item.modality
            stem = os.path.splitext(name)[0]
        case _FastMri():
            kind, modality, shape, spacing = "fastmri", "MR", item.shape, item.spacing_mm
            stem = os.path.splitext(name)[0]
        case PlainHeader():
            kind, shape, spacing = "npy" if item.kind == "npy" else "image", item.shape, None
            stem = os.path.splitext(name)[0]
        case ImageFile():
            modality, shape, notes = item.modality, (item.frames, item.rows, item.columns), item.notes
            spacing = None if item.spacing is None else (item.depth_mm or 1.0, *item.spacing)
            stem = name.removesuffix(".dcm")
    said = folders.of(os.path.dirname(item.path)) if modality == "unknown" else None
    return Scan(
        name=stem, kind=kind, files=(item.path,), modality=said or modality, shape=shape, spacing_mm=spacing,
        notes=(*notes, f"{said} by {MODALITY_FILE}") if said else notes, said=said,
    )  # fmt: skip


def _unique(drafts: list[Scan]) -> list[Scan]:
    """Number the names that occur more than once."""
    count: dict[str, int] = defaultdict(int)
    for scan in drafts:
        count[scan.name] += 1
    taken, seen, scans = set(count), defaultdict(int), []
    for scan in drafts:
        if count[scan.name] > 1:
            new = scan.name
            while new in taken:
                seen[scan.name] += 1
                new = f"{scan.name}#{seen[scan.name]}"
            taken.add(new)
            scan = replace(scan, name=new)
        scans.append(scan)
    return scans


def _relative(path: str, base: str) -> str:
    return Path(os.path.relpath(path, base)).as_posix()


def _probe_all(paths: list[str], workers: int | None, progress: bool) -> list[_Found]:
    if workers is None:
        workers = min(8, os.cpu_count() or 1) if len(paths) >= _POOL_FROM else 0
    bar = {"total": len(paths), "desc": "headers", "unit": "file", "disable": None if progress else True}
    if workers <= 1 or len(paths) < 2 or multiprocessing.current_process().daemon:
        return [_probe(p, False) for p in tqdm(paths, **bar)]
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            return list(tqdm(pool.map(_probe_many, paths, chunksize=64), **bar))
    except BrokenProcessPool as error:
        raise ScanError(
            "find_scans: worker processes died; guard the script with if __name__ == '__main__':, or pass workers=0"
        ) from error


def _probe(path: str, one: bool = True) -> _Found:
    """What a file is, from its first bytes and its header. one: an .img stands for its .hdr."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return Skipped(path, JUNK)
        with open(path, "rb") as file:
            head = file.read(4096)
        if sniff_dicom(head):
            return probe_dicom(path)
        if sniff_nifti(head):
            return probe_nifti(path)
        if sniff_itk(head):
            return probe_itk(path)
        if sniff_hdf5(head):
            return _FastMri(path, *probe_fastmri(path))
        name = os.path.basename(path)
        if sniff_plain(head):
            return probe_plain(path)
        if one and (header := header_of(path)) is not None:
            return probe_nifti(header)
        if (told := archive_note(path, head)) is not None:
            return Skipped(path, told)
        if not head and name.lower().endswith(".dcm"):
            return Skipped(path, f"{name}: {EMPTY}")
        named = name.lower().endswith((".nii", ".nii.gz", ".dcm")) and not name.startswith(".")
        reason = f"{name}: named like a scan, but its content is none ({os.path.getsize(path):,} bytes)"
        return Skipped(path, reason, refused=True) if named else Skipped(path, JUNK)
    except NotAnImage as error:
        return Skipped(path, str(error))
    except ScanError as error:
        return Skipped(path, str(error), refused=True)
    except OSError as error:
        name = os.path.basename(path)
        return Skipped(path, f"{name}: cannot be opened ({error.strerror or error})", refused=True)
    except Exception as error:
        return Skipped(path, unexpected(os.path.basename(path), error), refused=True)


def _probe_many(path: str) -> _Found:
    return _probe(path, False)


def _probe_slices(path: str) -> SliceFile:
    found = _probe(path)
    if isinstance(found, SliceFile):
        return found
    reason = found.reason if isinstance(found, Skipped) else f"{os.path.basename(path)}: no longer DICOM; index again"
    raise ScanError(reason)


def _finish(volume: Volume, options: Options) -> Volume:
    if options.modality is not None and options.modality != volume.modality:
        volume = replace(volume, modality=options.modality, units="arbitrary")
    if options.deskew:
        volume = upright(volume)
    if options.strict and volume.notes:
        raise ScanError(
            f"{os.path.basename(volume.source.rstrip('/'))}: refused by strict=True: {'; '.join(volume.notes)}; pass "
            "strict=False to accept"
        )
    return volume.canonical() if options.canonical else volume
