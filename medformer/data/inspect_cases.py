"""`medformer inspect DIR --channels t1=*T1*,flair=*FLAIR*`: every case, what it lacks, what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medformer.data.cases import cases_of, first, read_case
from medformer.data.geometry import ScanError
from medformer.data.intensity import count_labels, scaling_of
from medformer.data.scans import find_scans
from medformer.data.sequences import MISSING_WAY, CaseFiles, patterns_of

__all__ = ["inspect_cases", "report_cases"]


def inspect_cases(root: str, channels: Sequence[str], *, missing: bool = False, read: bool = False) -> dict[str, Any]:
    """What the cases below `root` (a folder, or a table) hold of each channel, and problems, as plain JSON.

    Each channel of a case says its shape and spacing, and "resampled": whether it comes onto the grid of the first
    there is, by sizes alone unless `read`. read: also decode every scan. Raises ScanError where there is no case.
    """
    names = list(patterns_of(channels))
    cases: list[dict[str, Any]] = []
    problems: list[str] = []
    for name, files in cases_of(Path(root), channels, missing):
        try:
            if isinstance(files, ScanError):
                raise files
            cases.append({"name": name, "channels": _channels(names, files, read)})
        except (ScanError, OSError) as error:
            text = str(error).removeprefix(f"{name}: ").replace(MISSING_WAY, MISSING_WAY.replace(" true", ""))
            problems.append(f"{name}: {text}")
    lacking = Counter(n for case in cases for n, scan in case["channels"].items() if scan is None)
    return {"order": names, "cases": cases, "problems": problems, "lacking": dict(lacking)}


def _channels(names: Sequence[str], files: CaseFiles, read: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    grid: tuple[Any, Any] | None = None
    for name, file in zip(names, files, strict=True):
        if file is None:
            found[name] = None
            continue
        scan = find_scans(file, workers=0).scans[0]
        spacing = scan.spacing_mm and [round(mm, 3) for mm in scan.spacing_mm]
        grid = grid or (scan.shape, spacing)
        found[name] = {"file": file.name, "modality": scan.modality, "shape_zyx": scan.shape,
                       "spacing_mm_zyx": spacing, "resampled": (scan.shape, spacing) != grid, "notes": []}  # fmt: skip
    if not read:
        return found
    case = read_case(files, 3)
    for name, volume in zip(names, case, strict=True):
        if volume is None:
            continue
        scaling_of(volume)  # says what has no contrast
        if labels := count_labels(volume.voxels):
            raise ScanError(f"{name} looks like a label map ({labels} labels), not a scan")
        moved = volume is not first(case) and any(n.startswith("resampled onto") for n in volume.notes)
        found[name] |= {"modality": volume.modality, "resampled": moved, "notes": list(volume.notes)}
    return found


def report_cases(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = []
    for case in found["cases"]:
        lacks = [name for name, scan in case["channels"].items() if scan is None]
        lines.append(f"{'lacks   ' if lacks else 'ok      '} {case['name']}{'  ' + ', '.join(lacks) if lacks else ''}")
        there = [name for name, scan in case["channels"].items() if scan is not None]
        for name in there:
            scan = case["channels"][name]
            shape = "x".join(map(str, scan["shape_zyx"]))
            mm = scan["spacing_mm_zyx"]
            spacing = "no spacing" if mm is None else " x ".join(f"{v:.4g}" for v in mm) + " mm"
            grid = f", comes onto the grid of {there[0]}" if scan["resampled"] else ""
            lines.append(f"           {name}: {scan['file']}  {scan['modality']} {shape} (zyx), {spacing}{grid}")
    lines += [f"refused  {problem}" for problem in found["problems"]]
    lacking = "; ".join(f"{count} lack {name}" for name, count in found["lacking"].items())
    lines.append(
        f"{len(found['cases'])} cases of the channels {', '.join(found['order'])}{'; ' + lacking if lacking else ''}; "
        f"{len(found['problems'])} refused"
    )
    return "\n".join(lines)
