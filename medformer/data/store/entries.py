"""From scans to stored scans: each is read, checked and written once, to be read by the crop."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from medformer.data import Scan, ScanError, Volume
from medformer.data.intensity import Scaling, count_labels, scaling_of
from medformer.data.modality import could_be_hu, guessed
from medformer.data.store.arrays import MAX_OPEN, Channels, Scaled, compresses, open_array, suffix, write_array
from medformer.data.store.chunks import table_of
from medformer.data.store.limit import Use
from medformer.data.store.remote import Far, open_far
from medformer.data.volumes import nameless
from medformer.files import naming, write_whole
from medformer.locks import held

__all__ = [
    "Damaged",
    "Stored",
    "check",
    "described",
    "keep",
    "keep_case",
    "key_of",
    "load",
    "look_up",
    "mended",
    "open_scan",
    "sealed",
    "serve",
    "served",
    "sidecar",
    "store_scan",
    "stored_once",
    "taken_as",
    "unsealed",
]

# Part of every cache key: raise it when what is stored changes.
_VERSION = 4
_POINTS = 2048  # places in the tissue kept for each scan
_CHEAP = 2**20  # bytes of a file that is read whole to be checked
_NEEDED = {"suffix", "shape", "spacing_mm", "modality", "threshold", "notes", "scaling"}  # of a sidecar


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One scan in the cache."""

    name: str
    path: str
    """.b2nd or .npy file [Z, Y, X], axes nearest to S, A and R; `load` gives its scaled values."""
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    modality: str
    threshold: float
    """Tissue is above it, air below."""
    notes: tuple[str, ...]
    labels: int = 0
    """Labels in what looks like a label map; 0 for a scan."""
    guessed: bool = False
    """Whether the file did not say what it is."""
    by_values: str = ""
    """What a guessed one is by its own values, whatever its folder decided: CT or unknown."""
    could_be_hu: bool = False
    content: str = ""
    """A hash of what its files hold, whatever they are called; "" where the entry does not say."""
    far: Far | None = None
    """Set where it lies on a server."""
    parts: tuple[Stored | None, ...] = ()
    """Of a case of several channels each of them, None for one that it lacks; all on the grid of the first there is.
    Its own path names no file, but `load` of it gives [C, Z, Y, X]."""
    channels: tuple[str, ...] = ()
    """What they are called, where a store says it."""

    @property
    def points_path(self) -> str:
        return str(Path(self.path).with_suffix("")) + ".points.npy"

    @property
    def there(self) -> tuple[Stored, ...]:
        """What has voxels of its own: the channels that a case has, or the scan itself."""
        return tuple(part for part in self.parts if part is not None) or (self,)

    @property
    def modalities(self) -> str | tuple[str, ...]:
        """What the scan is, or each channel of a case; "unknown" for one that is missing."""
        return tuple("unknown" if part is None else part.modality for part in self.parts) or self.modality


class Damaged(ScanError):
    """An entry whose files are cut short, changed or not ours."""


def store_scan(
    scan: Scan,
    cache: Path,
    modality: str | None = None,
    say: Callable[[str], object] = warnings.warn,
    use: Use | None = None,
) -> Stored:
    """Read, check and write one scan, unless the cache has it. A damaged entry is set aside, said and made anew.

    modality: what it is taken as; "unknown" for values of no unit, None for what the file or its values say. use: keeps
    the entry from being removed, and the cache below its limit.

    Raises:
        ScanError: it cannot be read.
        UserError: the cache cannot be written, or grows beyond its limit.
    """
    # Several stacks of one file, and one file taken as this and as that, are different entries.
    taken = modality or scan.said or ""
    base = cache / key_of(scan.files, *(part for part in (scan.repeat, taken) if part))

    def make() -> Stored:
        return keep(taken_as(scan.read(modality=modality), modality), base, scan.name, scan.files)

    return stored_once(base, scan.name, make, say, use)


def stored_once(
    base: Path, name: str, make: Callable[[], Stored], say: Callable[[str], object], use: Use | None
) -> Stored:
    """The entry under `base` of a cache, made where it is not there; of two runs one makes it."""
    if use is not None:
        use.note(base.name)
    try:
        known = look_up(base, name)
    except Damaged:
        known = None
    if known is not None:
        return known
    with held(base.parent / ".locks" / base.name[:2]):  # 256 of them, for any number of scans
        known = mended(base, name, say)  # another run may have made it since
        if known is not None:
            return known
        stored = make()
    if use is not None:
        use.added(base.name)
    return stored


def taken_as(volume: Volume, modality: str | None) -> Volume:
    """The volume that was read as `modality`; "unknown" takes values that look like HU for values of no unit."""
    return replace(volume, modality="unknown", units="arbitrary") if modality == "unknown" else volume


def mended(base: Path, name: str, say: Callable[[str], object]) -> Stored | None:
    """`look_up`, where a damaged entry is set aside and said; None: to be made anew."""
    try:
        return look_up(base, name)
    except Damaged as error:
        aside = base.parent / "damaged"
        with naming(aside):
            aside.mkdir(exist_ok=True)
            for file in base.parent.glob(f"{base.name}.*"):
                os.replace(file, aside / file.name)
        say(f"WARNING: {name}: {error}; it is in {aside} now and is made anew")
        return None


def look_up(base: Path, name: str) -> Stored | None:
    """The entry under `base`, if it is there.

    Checked here: the sidecar by its seal, arrays by their length, those below 1 MiB by a checksum.

    Raises:
        Damaged: it is there, but not as it was written.
    """
    if not base.with_suffix(".json").exists():
        return None
    values = sidecar(base)
    path = base.with_suffix(values["suffix"])
    if values["suffix"] == ".b2nd" and not compresses():
        return None
    for end, seal in values.get("files", {values["suffix"]: {}}).items():  # stores made before 2026-12-01 name none
        check(Path(f"{base}{end}"), seal)
    # The cache may have been moved, and a scan's name depends on the root it was found under.
    return described(values, name, str(path))


def described(values: dict[str, Any], name: str, path: str, far: Far | None = None) -> Stored:
    """The entry whose sidecar says `values`."""
    stem = path.removesuffix(values["suffix"])
    parts = tuple(
        None if part is None else described(part, name, f"{stem}.{c}{part['suffix']}")
        for c, part in enumerate(values.get("parts", ()))
    )
    return Stored(
        name=name, path=path, far=far, parts=parts, channels=tuple(values.get("channels", ())),
        shape=tuple(values["shape"]), spacing_mm=tuple(values["spacing_mm"]),
        modality=values["modality"], threshold=values["threshold"], notes=tuple(values["notes"]),
        labels=values.get("labels", 0),  # stores made before 2026-11-28 do not say
        guessed=values.get("guessed", False), could_be_hu=values.get("could_be_hu", False),
        by_values=values.get("by_values", values["modality"]), content=values.get("source_hash", ""),
    )  # fmt: skip


def keep(
    volume: Volume, base: Path, name: str, files: Sequence[str], by_values: str = "", *, served: bool = False
) -> Stored:
    """Write the voxels, some places in the tissue and the sidecar of one volume.

    by_values: what its own values say, where it is taken as something else. served: with what a reader of ranges on
    another machine needs.
    """
    return _complete(base, name, _arrays(volume, base, files, by_values, served))


def keep_case(
    case: Sequence[Volume | None], base: Path, name: str, files: Sequence[Sequence[str]],
    by_values: Sequence[str] = (), *, served: bool = False, channels: Sequence[str] = (),
) -> Stored:  # fmt: skip
    """As `keep`, of the channels of a case, which are on one grid: files `base`.0, `base`.1, ... and one sidecar.

    Each channel has its own scaling. files, by_values: of each channel; "" where there is nothing to say. channels:
    what they are called, for who reads the store.
    """
    parts = [
        None if volume is None else _arrays(volume, Path(f"{base}.{c}"), each, said, served)
        for c, (volume, each, said) in enumerate(
            zip(case, files, by_values or [""] * len(case), strict=True)
        )
    ]  # fmt: skip
    there = [part for part in parts if part is not None]
    first = there[0]
    content = hashlib.blake2b(
        ",".join("" if part is None else part["source_hash"] for part in parts).encode(), digest_size=16
    )
    entry = {
        **{key: first[key] for key in ("schema", "suffix")},
        "files": {f".{c}{end}": seal for c, part in enumerate(parts) if part for end, seal in part["files"].items()},
        **{key: first[key] for key in ("shape", "spacing_mm", "affine", "geometry")},
        "modality": "+".join(dict.fromkeys(part["modality"] for part in there)),
        **{key: first[key] for key in ("scaling", "threshold", "foreground_zyx")},
        "labels": max(part["labels"] for part in there),
        "notes": list(dict.fromkeys(note for part in there for note in part["notes"])),
        "source_hash": content.hexdigest(),
        "bytes": sum(part["bytes"] for part in there),
        **({"channels": list(channels)} if channels else {}),
        "parts": parts,
    }
    return _complete(base, name, entry)


def _complete(base: Path, name: str, entry: dict[str, Any]) -> Stored:
    """Write the sidecar, which comes last: with it the entry is complete."""
    write_whole(base.with_name(f"{base.name}.json"), lambda file: file.write(sealed(entry)))
    found = look_up(base, name)
    assert found is not None
    return found


def _arrays(volume: Volume, base: Path, files: Sequence[str], by_values: str, served: bool) -> dict[str, Any]:
    """Write the arrays of one volume; what its sidecar says."""
    scaling = scaling_of(volume)
    voxels, scaled = _narrow(volume, scaling)
    stored = Scaled(voxels, scaled)
    seen = np.asarray(stored)
    threshold = _otsu(seen.astype(np.float32))
    tissue = seen > threshold
    arrays = {suffix(): voxels, ".points.npy": _points(tissue)}
    for end, array in arrays.items():
        write_array(Path(f"{base}{end}"), array)
    entry = {
        "schema": _VERSION,
        "suffix": suffix(),
        "files": {end: _seal(Path(f"{base}{end}")) for end in arrays},
        "shape": volume.shape,
        "spacing_mm": volume.spacing_mm,
        "affine": volume.affine.tolist(),
        "geometry": volume.geometry,
        "modality": volume.modality,
        "units": volume.units if scaled is scaling else "normalised",
        "scaling": asdict(scaled),
        "intensity": {"low": scaling.low, "high": scaling.high, "mean": scaling.mean, "scale": scaling.scale},
        "threshold": threshold,
        "foreground_zyx": _box(tissue),
        "labels": count_labels(volume.voxels),
        "guessed": bool(by_values) or guessed(volume),
        "by_values": by_values or volume.modality,
        "could_be_hu": could_be_hu(volume.voxels),
        "notes": nameless(volume.notes),
        "tags": dict(volume.provenance.get("tags", {})),
        "source_hash": _content(files),
        "bytes": voxels.nbytes,
    }
    return entry | _chunks(base, entry) if served else entry


def sidecar(base: Path) -> dict[str, Any]:
    """What the sidecar of an entry says. Raises Damaged."""
    return unsealed(base.with_suffix(".json"), _NEEDED)


def served(base: Path) -> bool:
    """Whether an entry has what a reader of ranges needs, as far as it can."""
    values = sidecar(base)
    parts = [part for part in values.get("parts", [values]) if part is not None]
    return all("chunks" in part or part["suffix"] != ".b2nd" for part in parts)


def serve(base: Path) -> None:
    """Give it to an entry that was stored without."""
    values = sidecar(base)
    values.setdefault("files", {end: _seal(Path(f"{base}{end}")) for end in (values["suffix"], ".points.npy")})
    values |= _chunks(base, values)
    write_whole(base.with_suffix(".json"), lambda file: file.write(sealed(values)))


def _chunks(base: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Write the table of an entry's chunks; what its sidecar says of it, with the other files."""
    if entry["suffix"] != ".b2nd":
        return {}
    grid, table = table_of(Path(f"{base}.b2nd"))
    path = Path(f"{base}.chunks.npy")
    write_array(path, table)
    return {"chunks": asdict(grid), "files": entry["files"] | {".chunks.npy": _seal(path)}}


def sealed(entry: dict[str, Any]) -> bytes:
    """A JSON file's bytes, with a seal of what it says."""
    return json.dumps({**entry, "seal": _hash(json.dumps(entry).encode())}).encode()


def unsealed(path: Path, needed: set[str]) -> dict[str, Any]:
    """What such a file says. Raises Damaged, where names of `needed` are not in it too."""
    try:
        values = json.loads(path.read_bytes())
        seal = values.pop("seal", None)
        old = seal is None and not values.keys() & {"files", "good"}  # of a store made before 2026-12-01
        intact = old or seal == _hash(json.dumps(values).encode())
        complete = needed <= values.keys()
    except (ValueError, AttributeError, TypeError):
        raise Damaged(f"{path.name} is cut short or not ours") from None
    if not intact or not complete:
        raise Damaged(f"{path.name} was changed or is not of this version")
    return values


def _seal(path: Path) -> dict[str, Any]:
    """What `check` compares."""
    size = path.stat().st_size
    return {"bytes": size} | ({"hash": _hash(path.read_bytes())} if size <= _CHEAP else {})


def check(path: Path, seal: dict[str, Any]) -> None:
    """Raises Damaged where a file is not as it was written: its length, and its hash where `seal` has one."""
    try:
        found = _seal(path) if "hash" in seal else {"bytes": path.stat().st_size}
    except OSError:
        raise Damaged(f"{path.name} is not there") from None
    if found != {"bytes": found["bytes"]} | seal:
        if found["bytes"] != seal.get("bytes", found["bytes"]):
            raise Damaged(f"{path.name} has {found['bytes']} bytes of {seal['bytes']}")
        raise Damaged(f"{path.name} was changed")


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _narrow(volume: Volume, scaling: Scaling) -> tuple[np.ndarray, Scaling]:
    """Voxels in 16 bits: whole numbers that fit as they are, everything else scaled, as float16.

    Padding becomes the lowest value that scaling clips to, so it looks like the air around it.
    """
    voxels = volume.voxels
    if volume.valid is not None:
        low = np.floor(scaling.low)
        low = max(low, np.iinfo(voxels.dtype).min) if voxels.dtype.kind in "iu" else low
        voxels = np.where(volume.valid, voxels, np.asarray(low).astype(voxels.dtype))
    for dtype in (np.uint8, np.int16, np.uint16) if voxels.dtype.kind in "iu" else ():
        limits = np.iinfo(dtype)
        if voxels.dtype == dtype or (voxels.min() >= limits.min and voxels.max() <= limits.max):
            return voxels.astype(dtype, copy=False), scaling
    limit = float(np.finfo(np.float16).max)
    return scaling.apply(voxels).clip(-limit, limit).astype(np.float16), Scaling(
        low=-limit, high=limit, mean=0.0, scale=1.0
    )


def key_of(files: Sequence[str], *parts: str) -> str:
    """Changes with the files' paths, sizes and times, with what of them is meant, and with how they are stored."""
    digest = hashlib.sha256("|".join((f"{_VERSION}{suffix()}", *parts)).encode())
    for file in files:
        stat = os.stat(file)
        digest.update(f"|{Path(file).resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


def _content(files: Sequence[str]) -> str:
    """A hash of what the files hold, whatever they are called."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with open(file, "rb") as source:
            while block := source.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _box(tissue: np.ndarray) -> list[list[int]]:
    """First and last index of the tissue along z, y and x."""
    if not tissue.any():
        return [[0, n - 1] for n in tissue.shape]
    lines = [np.flatnonzero(tissue.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    return [[int(line[0]), int(line[-1])] for line in lines]


def _otsu(voxels: np.ndarray) -> float:
    """The value that parts the histogram best into two classes (Otsu 1979): air and the rest, nearly always."""
    counts, edges = np.histogram(voxels.reshape(-1)[:: max(1, voxels.size // 200_000)], bins=128)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1 + int(np.nanargmax(np.where(above > 0, between, -1)))])


def _points(tissue: np.ndarray) -> np.ndarray:
    """Up to 2048 random places in the tissue, [n, 3] int32 zyx; the same for the same scan."""
    flat = np.flatnonzero(tissue.reshape(-1))
    chosen = np.random.default_rng(0).choice(flat, min(_POINTS, len(flat)), replace=False) if len(flat) else flat
    return np.stack(np.unravel_index(np.sort(chosen), tissue.shape), axis=1).astype(np.int32)


@lru_cache(maxsize=2 * MAX_OPEN)
def load(path: str) -> Any:
    """A stored array, read by the slice: scaled where a sidecar says how, else as it is; [C, Z, Y, X] of a case. 64
    scans stay open."""
    about = Path(path).with_suffix(".json")
    if path.endswith(".points.npy") or not about.exists():
        return open_array(path)
    values = json.loads(about.read_text())
    if "parts" in values:
        stem = about.with_suffix("")
        return Channels([
            None if part is None else Scaled(open_array(f"{stem}.{c}{part['suffix']}"), Scaling(**part["scaling"]))
            for c, part in enumerate(values["parts"])
        ])  # fmt: skip
    return Scaled(open_array(path), Scaling(**values["scaling"]))


def open_scan(scan: Stored) -> tuple[Any, np.ndarray]:
    """Its voxels as the network sees them, read by the slice, and the places in its tissue, of a case in that of the
    first channel there is."""
    if scan.far is None:
        return load(scan.path), load(scan.there[0].points_path)
    if not scan.parts:
        return open_far(scan.far, scan.name)
    opened = [None if part is None or part.far is None else open_far(part.far, scan.name) for part in scan.parts]
    points = next(each[1] for each in opened if each is not None)
    return Channels([None if each is None else each[0] for each in opened]), points
