"""`medformer inspect DIR`: every scan with its facts, every problem with the way out."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from medformer.data.datasets.doctor import State, described, sets_in
from medformer.data.geometry import ScanError, closest_ras
from medformer.data.intensity import count_labels, scaling_of
from medformer.data.modality import could_be_hu, decide
from medformer.data.scans import Scan, ScanIndex, find_scans
from medformer.data.volumes import Volume
from medformer.data.walking import Skipped

__all__ = ["as_json", "inspect", "report"]

_HU, _OWN = "HU / 500", "z-score"
# Formats whose headers name no modality, so that values decide how they are scaled.
_UNNAMED = {"nifti", "itk"}
_VALUES_TELL = "whether it is a scan or a label map, and how it is scaled"
# No places in a patient: an index for pretraining in 3D does not list them.
_IMAGES = {"image", "npy"}


@dataclass(frozen=True)
class _Read:
    """What is kept of a scan that was decoded."""

    modality: str
    units: str
    notes: tuple[str, ...]
    labels: int
    flat: str
    """Why it has no contrast; empty where it has."""
    could_be_hu: bool
    shape: tuple[int, ...]
    """As the crops see it: z, y and x nearest to S, A and R."""


def inspect(
    root: str,
    *,
    images: bool = True,
    read: bool = False,
    workers: int | None = None,
    modality: str | None = None,
    least: tuple[int, int, int] | None = None,
) -> dict[str, Any]:
    """What lies under `root`, as plain JSON: scans, problems (with the fix in their text), and what was left out.

    Each scan says what pretraining on this folder does with it: "use" is yes, no or "only --read knows", "why" the
    reason, "normalised" how its values are scaled.

    read: also decode every scan, which finds what headers cannot show. modality: as --data.modality of a run. least:
    the size (Z, Y, X) of the crops of that run; smaller scans are skipped. Raises ScanError where `root` is missing.
    """
    try:
        index = find_scans(root, images=images, workers=workers, progress=sys.stderr.isatty())
    except ScanError as error:
        if "no NIfTI or DICOM under" not in str(error):
            raise
        index = ScanIndex(scans=[], skipped=[Skipped(root, str(error), refused=True)])
    problems = [s.reason for s in index.skipped if s.refused]
    known: dict[str, _Read] = {}
    unread: set[str] = set()
    for scan in index.scans if read else ():
        try:
            known[scan.name] = _look(scan.read(canonical=False, colour="grey", modality=_given(scan, modality)))
        except ScanError as error:
            problems.append(f"{scan.name}: {str(error).removeprefix(scan.name + ': ')}")
            unread.add(scan.name)
    vote = decide(
        {
            s.name: (known[s.name].modality, known[s.name].could_be_hu)
            for s in index.scans
            if s.name in known and s.kind in _UNNAMED and s.modality == "unknown" and modality is None
            and not known[s.name].labels and not known[s.name].flat
        }
    )  # fmt: skip
    scans = []
    for scan in index.scans:
        if scan.name in unread:
            continue
        found = known.get(scan.name)
        taken = vote.modality.get(scan.name) or (found.modality if found else _given(scan, modality) or scan.modality)
        use, why = _use(scan, found, least)
        scans.append(
            {
                "name": scan.name,
                "kind": scan.kind,
                "modality": taken,
                "shape_zyx": scan.shape,
                "spacing_mm_zyx": scan.spacing_mm and [round(v, 6) for v in scan.spacing_mm],
                "files": len(scan.files),
                "repeat": scan.repeat,
                "notes": list(found.notes if found else scan.notes),
                "use": use,
                "why": why,
                "normalised": _normalised(scan, found, taken),
            }
        )
    left_out = Counter(s.reason.partition(": ")[2] or s.reason for s in index.skipped if not s.refused)
    return {
        "scans": scans,
        "problems": problems,
        "left_out": dict(sorted(left_out.items())),
        "votes": list(vote.lines),
        "data_sets": [asdict(state) for state in sets_in(root)],
    }


def _given(scan: Scan, modality: str | None) -> str | None:
    """What the caller says of a scan whose own files do not say."""
    return modality if scan.kind in _UNNAMED | _IMAGES and scan.modality == "unknown" else None


def _look(volume: Volume) -> _Read:
    try:
        scaling_of(volume)
        flat = ""
    except ScanError as error:
        flat = str(error).partition(": ")[2]
    order, _ = closest_ras(volume.affine)
    return _Read(
        volume.modality, volume.units, volume.notes, count_labels(volume.voxels), flat, could_be_hu(volume.voxels),
        tuple(volume.shape[::-1][axis] for axis in order)[::-1],
    )  # fmt: skip


def _use(scan: Scan, found: _Read | None, least: tuple[int, int, int] | None) -> tuple[str, str]:
    if scan.kind in _IMAGES or scan.spacing_mm is None or (scan.kind == "image" and scan.shape and scan.shape[0] == 1):
        return "no", "an image without a place in a patient: used with --model.dims 2 only"
    shapes = [found.shape] if found else [] if scan.shape is None else list(itertools.permutations(scan.shape))
    small = [any(n < m for n, m in zip(shape, least, strict=True)) for shape in shapes] if least else []
    if small and all(small):
        return "no", f"smaller than the crops of {'x'.join(map(str, least or ()))} voxels; --data.small pad takes it"
    if any(small):
        return "only --read knows", "whether it is smaller than the crops, which depends on how its axes run"
    if found is None and scan.kind in _UNNAMED and scan.modality == "unknown":
        return "only --read knows", _VALUES_TELL
    if found is None:
        doubts = [n for n in scan.notes if "only reading shows" in n]
        return ("only --read knows", "several images at one place") if doubts else ("yes", "")
    if found.labels:
        return (
            "no",
            f"looks like a label map ({found.labels} labels); --data.labels keep trains on it too",
        )
    return ("no", found.flat) if found.flat else ("yes", "")


def _normalised(scan: Scan, found: _Read | None, taken: str) -> str:
    if found is not None:
        named = scan.modality != "unknown" or scan.kind not in _UNNAMED
        return _HU if (found.units == "HU" if named else taken == "CT") else _OWN
    if scan.kind == "dicom":
        unsure = any("not be HU" in n or "not HU" in n for n in scan.notes)
        return _HU if scan.modality == "CT" and not unsure else _OWN
    if scan.kind in _UNNAMED and taken == "unknown":
        return "by values: only --read knows"
    return _HU if taken == "CT" else _OWN


def report(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = []
    words = {"yes": "ok      ", "no": "skip    "}
    for scan in found["scans"]:
        shape = "x".join(map(str, scan["shape_zyx"]))
        sizes = scan["spacing_mm_zyx"]
        spacing = "no spacing" if sizes is None else " x ".join(f"{v:.4g}" for v in sizes) + " mm"
        many = f", {scan['files']} files" if scan["files"] > 1 else ""
        word = words.get(scan["use"], "unsure  ")
        scaled = "" if scan["use"] == "no" else f", {scan['normalised']}"
        lines.append(f"{word} {scan['name']}  {scan['modality']} {shape} (zyx), {spacing}{many}{scaled}")
        if scan["why"] and scan["why"] != _VALUES_TELL:  # which the last line says of all
            lines.append(f"           {scan['why']}")
        lines += [f"           note: {note}" for note in scan["notes"]]
    lines += [f"refused  {problem}" for problem in found["problems"]]
    lines += [f"left out {count} x {reason}" for reason, count in found["left_out"].items()]
    lines += [f"vote     {line}" for line in found["votes"]]
    lines += [line for state in found["data_sets"] for line in described(State(**state))]
    uses = Counter(scan["use"] for scan in found["scans"])
    text = f"{len(found['scans'])} readable, {len(found['problems'])} refused"
    if uses["no"]:
        text += f"; {uses['no']} skipped by pretraining in 3D"
    if any("only --read knows" in (s["use"], *s["normalised"].split(": ")) for s in found["scans"]):
        text += "; label maps, scans without contrast and what names no modality show with --read"
    lines.append(text)
    return "\n".join(lines)


def as_json(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=1)
