"""`python -m medformer.data inspect DIR`: every scan with its facts, every problem with the way out."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

from medformer.data.geometry import ScanError
from medformer.data.intensity import count_labels
from medformer.data.scans import ScanIndex, Skipped, find_scans

__all__ = ["as_json", "inspect", "report"]


def inspect(root: str, *, images: bool = True, read: bool = False, workers: int | None = None) -> dict[str, Any]:
    """What lies under `root`, as plain JSON: scans, problems (with the fix in their text), and what was left out.

    read: also decode every scan, which finds what headers cannot show. Raises ScanError where `root` is missing.
    """
    try:
        index = find_scans(root, images=images, workers=workers, progress=sys.stderr.isatty())
    except ScanError as error:
        if "no NIfTI or DICOM under" not in str(error):
            raise
        index = ScanIndex(scans=[], skipped=[Skipped(root, str(error), refused=True)])
    scans, problems = [], [s.reason for s in index.skipped if s.refused]
    for scan in index.scans:
        notes = list(scan.notes)
        if read:
            try:
                volume = scan.read(canonical=False, colour="grey")
            except ScanError as error:
                problems.append(f"{scan.name}: {error}")
                continue
            notes = list(volume.notes)
            if labels := count_labels(volume.voxels):
                notes.append(f"looks like a label map ({labels} labels): the trainer skips it")
        scans.append(
            {
                "name": scan.name,
                "kind": scan.kind,
                "modality": scan.modality,
                "shape_zyx": scan.shape,
                "spacing_mm_zyx": scan.spacing_mm and [round(v, 6) for v in scan.spacing_mm],
                "files": len(scan.files),
                "repeat": scan.repeat,
                "notes": notes,
            }
        )
    left_out = Counter(s.reason.partition(": ")[2] or s.reason for s in index.skipped if not s.refused)
    return {"scans": scans, "problems": problems, "left_out": dict(sorted(left_out.items()))}


def report(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = []
    for scan in found["scans"]:
        shape = "x".join(map(str, scan["shape_zyx"]))
        sizes = scan["spacing_mm_zyx"]
        spacing = "no spacing" if sizes is None else " x ".join(f"{v:.4g}" for v in sizes) + " mm"
        many = f", {scan['files']} files" if scan["files"] > 1 else ""
        lines.append(f"ok       {scan['name']}  {scan['modality']} {shape} (zyx), {spacing}{many}")
        lines += [f"           note: {note}" for note in scan["notes"]]
    lines += [f"refused  {problem}" for problem in found["problems"]]
    lines += [f"left out {count} x {reason}" for reason, count in found["left_out"].items()]
    lines.append(f"{len(found['scans'])} readable, {len(found['problems'])} refused")
    return "\n".join(lines)


def as_json(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=1)
