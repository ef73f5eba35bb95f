"""Every scan of folders, read here and by dcm2niix, SimpleITK, highdicom and nibabel: equal, different, or refused.

    python benchmarks/dicom_scoreboard.py FOLDER ... [--out table.md] [--most 12]

For each series: volumes that lie in the same place (within 0.05 mm at every corner) with the same values as a peer's;
what differs, in mm and in voxels; who refuses it and why. A peer that is not installed has an empty column. Made for
the public dcm_qa suites (github.com/neurolabusc), nibabel's and pydicom's own test files, and any other folder. Of a
folder with an `In` that is searched alone (`Ref` holds what dcm2niix made).

dcm2niix runs without -m: slices of several echoes, exposures or acquisitions stay apart but in CT, where they are one
scan here too (-m n parts them there, -m y joins series); and with -p n: it applies RescaleSlope and RescaleIntercept,
which the standard names, and not Philips' private scale.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom

from medformer.data import Scan, ScanError, find_scans

SAME_MM, SAME_SHARE = 0.05, 1e-4
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass
class Image:
    """Values [x, y, z] and where they lie (RAS+ mm), axes nearest to R, A, S."""

    values: np.ndarray
    affine: np.ndarray


@dataclass(frozen=True)
class Candidate:
    """A volume of a file that dcm2niix made, read when it is asked for."""

    path: Path
    frame: int | None

    def load(self) -> Image:
        image: nib.Nifti1Image = nib.load(self.path)  # pyright: ignore[reportAssignmentType]
        values = np.asarray(image.dataobj if self.frame is None else image.dataobj[..., self.frame])
        return canonical(values if values.ndim == 3 else values[..., None], image.affine)


@dataclass
class Row:
    """One series."""

    name: str
    files: int
    volumes: int = 0
    refused: list[str] = field(default_factory=list)
    peers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    details: list[str] = field(default_factory=list)


def canonical(values: np.ndarray, affine: np.ndarray | None) -> Image:
    image = nib.as_closest_canonical(nib.Nifti1Image(np.asarray(values, np.float32), affine))
    return Image(np.asarray(image.dataobj), np.asarray(image.affine))


def difference(ours: Image, theirs: Image) -> tuple[float, float]:
    """The farthest apart of the corners in mm, and the share of voxels that differ; 1 where shapes do."""
    if ours.values.shape != theirs.values.shape:
        return np.inf, 1.0
    ends = [(0, n - 1) for n in ours.values.shape]
    corners = np.array([[*c, 1.0] for c in itertools.product(*ends)]).T
    apart = float(np.linalg.norm(((ours.affine - theirs.affine) @ corners)[:3], axis=0).max())
    scale = max(1.0, float(np.abs(theirs.values).max()))
    return apart, float((np.abs(ours.values - theirs.values) > 1e-5 * scale).mean())


def proportion(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    """The factor that takes ours to theirs, if one does."""
    top = float(np.abs(ours).max())
    factor = float(np.abs(theirs).max()) / top if top else 0.0
    alike = factor > 0 and np.abs(ours * factor - theirs).max() <= 1e-5 * float(np.abs(theirs).max())
    return factor if alike else None


def judge(ours: Image, candidates: Sequence[Image | Candidate]) -> tuple[str, str]:
    """equal, or different from the nearest candidate and by how much."""
    best, nearest, shapes = (1.0, np.inf), None, set()
    for candidate in candidates:
        candidate = candidate.load() if isinstance(candidate, Candidate) else candidate
        apart, share = difference(ours, candidate)
        if apart <= SAME_MM and share <= SAME_SHARE:
            return "equal", ""
        if apart <= SAME_MM and (factor := proportion(ours.values, candidate.values)):
            return "equal but for a factor", f"values times {factor:.6g} (a private scale, which is not applied here)"
        if apart <= SAME_MM:
            for axis in range(3):
                if np.array_equal(np.flip(ours.values, axis), candidate.values):
                    return "mirrored", f"the same values, mirrored along {'xyz'[axis]} by the peer"
        shapes.add("x".join(map(str, candidate.values.shape)))
        if nearest is None or (share, apart) < best:
            best, nearest = (share, apart), candidate
    if nearest is None:
        return "refused", ""
    size = "x".join(map(str, ours.values.shape))
    shape = "" if np.isfinite(best[1]) else f", {size} against {', '.join(sorted(shapes)[:3])}"
    return "different", f"{best[1]:.3g} mm, {best[0]:.1%} of voxels{shape}"


def converted(folder: Path, out: Path) -> dict[str, list[Candidate]]:
    """What dcm2niix makes of a folder, by SeriesInstanceUID; a dimension in time gives several."""
    options = ["-z", "n", "-p", "n", "-ba", "n", "-b", "y", "-f", "%s_%n_%j"]
    command = ["dcm2niix", *options, "-o", str(out), str(folder)]
    subprocess.run(command, capture_output=True, check=False, timeout=900)
    found: dict[str, list[Candidate]] = defaultdict(list)
    for sidecar in sorted(out.glob("*.json")):
        path = sidecar.with_suffix(".nii")
        uid = str(json.loads(sidecar.read_text(errors="replace"), strict=False).get("SeriesInstanceUID", ""))
        if path.exists() and not any(tag in path.stem for tag in ("_Eq", "_Tilt")):
            found[uid] += frames(path)
    return found


def frames(path: Path) -> list[Candidate]:
    image: nib.Nifti1Image = nib.load(path)  # pyright: ignore[reportAssignmentType]
    if image.header.get_data_dtype().fields is not None or len(image.shape) > 4:
        return []
    return [Candidate(path, i) for i in range(image.shape[3])] if len(image.shape) == 4 else [Candidate(path, None)]


def by_simpleitk(scan: Scan) -> Image | str:
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        if len(scan.files) == 1:
            image = SimpleITK.ReadImage(scan.files[0])
        else:
            reader = SimpleITK.ImageSeriesReader()
            reader.SetFileNames(sorted(scan.files, key=depth_of))
            image = reader.Execute()
    except RuntimeError as error:
        return " ".join(str(error).split())[-80:]
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        return f"{image.GetDimension()}D image"
    lps = np.eye(4)
    lps[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    lps[:3, 3] = image.GetOrigin()
    return canonical(SimpleITK.GetArrayFromImage(image).T, _LPS_TO_RAS @ lps)


def depth_of(path: str) -> float:
    ds = pydicom.dcmread(
        path, stop_before_pixels=True, specific_tags=["ImagePositionPatient", "ImageOrientationPatient"]
    )
    row, column = np.reshape(np.array(ds.ImageOrientationPatient, float), (2, 3))
    return float(np.array(ds.ImagePositionPatient, float) @ np.cross(row, column))


def by_highdicom(scan: Scan) -> Image | str:
    import highdicom

    try:
        sets = [pydicom.dcmread(path) for path in scan.files]
        if len(sets) == 1 and "NumberOfFrames" in sets[0]:
            volume = highdicom.Image.from_dataset(sets[0], copy=False).get_volume()
        else:
            volume = highdicom.get_volume_from_series(sets)
    except Exception as error:  # its refusals are of many classes
        return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    return canonical(np.asarray(volume.array), _LPS_TO_RAS @ volume.affine)


def by_nibabel(scan: Scan) -> Image | str:
    try:
        return frames(Path(scan.files[0]))[0].load()
    except Exception as error:  # its refusals are of many classes
        return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"


PEERS = {"SimpleITK": by_simpleitk, "highdicom": by_highdicom, "nibabel": by_nibabel}
# Who reads what; dcm2niix reads DICOM too, all of a folder at once.
READS = {"dicom": {"SimpleITK", "highdicom"}, "nifti": {"nibabel", "SimpleITK"}, "itk": {"SimpleITK"}}


def board(folder: Path, most: int, peers: Iterable[str]) -> Iterator[Row]:
    """A row for each series below `folder`."""
    try:
        index = find_scans(folder, workers=0)
    except ScanError as error:
        yield Row(name=f"{folder.name}: {error}", files=0)
        return
    by_uid: dict[str, list[Scan]] = defaultdict(list)
    for scan in index.scans:
        if scan.kind == "dicom":
            by_uid[series_of(scan.files[0])].append(scan)
    refused: dict[tuple[str, str], list[str]] = defaultdict(list)
    for skipped in index.skipped:
        if skipped.refused:
            first = first_file(Path(skipped.path))
            refused[series_of(first), skipped.reason.partition(": ")[2]].append(first)
    found = 0
    with tempfile.TemporaryDirectory() as temporary:
        theirs = converted(folder, Path(temporary)) if shutil.which("dcm2niix") else {}
        # In some sidecars the identifier is cut short: these may be of any series.
        known = {*by_uid, *(uid for uid, _ in refused)}
        strangers = [made for uid, some in theirs.items() if uid not in known for made in some]
        for uid, scans in by_uid.items():
            row = Row(name=scans[0].name, files=len({f for s in scans for f in s.files}), volumes=len(scans))
            for scan in scans[:most]:
                one_series(scan, row, theirs.get(uid) or strangers, peers)
            if theirs.pop(uid, None) is None:
                found += row.peers["dcm2niix"]["equal"]
            yield row
        for (uid, reason), files in refused.items():
            name = Path(os.path.relpath(files[0], folder)).as_posix()
            row = Row(name=name, files=len(files), refused=[f"{reason} | {verdicts(files[0], theirs.get(uid), peers)}"])
            row.peers["dcm2niix"]["only theirs"] = len(theirs.pop(uid, []))
            yield row
        if (missed := sum(map(len, theirs.values())) - found) > 0:
            row = Row(name="(no series of ours)", files=0)
            row.peers["dcm2niix"]["only theirs"] = missed
            yield row
    for scan in index.scans:
        if scan.kind in READS and scan.kind != "dicom":
            row = Row(name=scan.name, files=1, volumes=1)
            one_series(scan, row, None, peers)
            yield row


def series_of(path: str) -> str:
    """SeriesInstanceUID, or nothing."""
    try:
        ds = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=["SeriesInstanceUID"])
        return str(ds.get("SeriesInstanceUID") or "")
    except Exception:  # whatever pydicom says of what is no DICOM
        return ""


def first_file(path: Path) -> str:
    """The path itself, or the first DICOM file of a folder."""
    if not path.is_dir():
        return str(path)
    return str(next((p for p in sorted(path.iterdir()) if p.is_file() and series_of(str(p))), path))


def verdicts(path: str, theirs: Sequence[Candidate] | None, peers: Iterable[str]) -> str:
    """What the peers make of a file that is refused here."""
    kind = "nifti" if ".nii" in path else "dicom"
    said = [] if kind == "nifti" else [f"dcm2niix: {f'{len(theirs)} volumes' if theirs else 'nothing'}"]
    scan = Scan(name="", kind=kind, files=(path,), modality="", shape=None, spacing_mm=None)
    for name in peers:
        if name in READS[kind]:
            try:
                result = PEERS[name](scan)
            except Exception as error:  # a peer that breaks on a file has refused it
                result = type(error).__name__
            said.append(f"{name}: {result[:60] if isinstance(result, str) else 'reads this file'}")
    return "; ".join(said)


def one_series(scan: Scan, row: Row, theirs: list[Candidate] | None, peers: Iterable[str]) -> None:
    """theirs: dcm2niix's volumes of the series; None where it reads no such file."""
    try:
        volume = scan.read(colour="grey")
    except ScanError as error:
        row.refused.append(f"{error} | {verdicts(scan.files[0], theirs, peers)}")
        return
    ours = canonical(volume.voxels.T, volume.affine)
    if theirs is not None:
        verdict, how = judge(ours, theirs)
        row.peers["dcm2niix"][verdict] += 1
        if how:
            row.details.append(f"dcm2niix {how}; notes: {'; '.join(volume.notes) or 'none'}")
    for name in peers if not scan.repeat else ():
        if name not in READS[scan.kind]:
            continue
        result = PEERS[name](scan)
        verdict, how = ("refused", result) if isinstance(result, str) else judge(ours, [result])
        row.peers[name][verdict] += 1
        if how:
            row.details.append(f"{name} {verdict}: {how}")


def summed(rows: Sequence[Row], peer: str) -> str:
    total = sum((r.peers[peer] for r in rows if peer in r.peers), Counter[str]())
    return ", ".join(f"{n} {what}" for what, n in sorted(total.items()) if n)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=None, help="write the table here too")
    parser.add_argument("--most", type=int, default=12, help="volumes of a series that are compared")
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    peers = [name for name in PEERS if importlib.util.find_spec(name) is not None]
    lines = [
        "| suite | series | volumes | refused here | dcm2niix | SimpleITK | highdicom | nibabel |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes: list[str] = []
    for folder in args.folders:
        rows = list(board(folder / "In" if (folder / "In").is_dir() else folder, args.most, peers))
        cells = [
            folder.name.replace("neurolabusc+", ""), len(rows), sum(r.volumes for r in rows),
            sum(len(r.refused) for r in rows), *(summed(rows, p) for p in ("dcm2niix", *PEERS)),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        print(lines[-1], flush=True)
        for row in rows:
            said = [f"refused here: {r}" for r in dict.fromkeys(row.refused)] + list(dict.fromkeys(row.details))
            notes += [f"- {cells[0]}/{row.name} ({row.files} files): {text}" for text in said[:6]]
    text = "\n".join([*lines, "", *notes]) + "\n"
    if args.out is not None:
        args.out.write_text(text)
    else:
        print("\n".join(notes))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
