"""LIDC-IDRI: chest CT of 1,010 patients, every nodule outlined and rated by up to four readers.

Get: cancerimagingarchive.net/collection/lidc-idri: DICOM (CT, and radiographs of some patients; NBIA or IDC) and the
radiologists' annotations `LIDC-XML-only.zip`.

Layout: any tree of DICOM files (`series.py`). Annotations as the zip file unpacks, `[LIDC-XML-only/]tcia-lidc-xml/157/
158.xml`, in the tree or next to it, or as older downloads of NBIA had them: `069.xml` next to the slices of its series.

Quirks: file names are padded or not, so headers group; an outline runs along the first pixels *outside* the nodule;
an outline with inclusion FALSE is a hole; findings below 3 mm and non-nodules are points; readers name nodules on
their own, so outlines have to be matched; eight patients have two scans.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image, ImageDraw

from medformer.data.datasets.joins import Join, Records, reported
from medformer.data.datasets.layout import About, Near
from medformer.data.datasets.series import is_here, series_below
from medformer.data.geometry import ScanError
from medformer.data.records import NEGATIVE, POSITIVE, UNCERTAIN, UNKNOWN, Record
from medformer.data.safe_xml import parse_xml

ABOUT = About(
    name="LIDC-IDRI",
    folders=("lidc_idri", "LIDC-IDRI"),
    source="https://www.cancerimagingarchive.net/collection/lidc-idri",
    layout="any tree of DICOM files with PatientID LIDC-IDRI-*, the unpacked LIDC-XML-only.zip in it or next to it",
    patients=r"LIDC-IDRI-\d+",
    loose=True,
)
_XML = ("*lidc*xml*", "*xml*lidc*")  # folders of annotations
_RATINGS = (
    "malignancy", "texture", "spiculation", "lobulation", "margin", "sphericity", "calcification", "internalStructure",
    "subtlety",
)  # fmt: skip


@dataclass(frozen=True)
class Outline:
    """One closed outline on one slice."""

    z_mm: float
    image: str
    """SOPInstanceUID of the slice."""
    inside: bool
    """False for a hole."""
    points: tuple[tuple[int, int], ...]
    """(x, y) of the first pixels outside."""


@dataclass(frozen=True)
class Nodule:
    """What one reader drew."""

    reader: int
    name: str
    ratings: dict[str, int] = field(default_factory=dict)
    """1 to 5 (calcification 1 to 6); empty for findings below 3 mm."""
    outlines: tuple[Outline, ...] = ()


def recognise(folder: Path) -> bool:
    return is_here(folder, ABOUT)


def scan(root: str | Path) -> Records:
    """One record a CT series. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    near = Near(folder, ABOUT)
    drawn, notes = _annotations(folder, near)
    records, others = [], 0
    tree = series_below(folder, near, ABOUT)
    for found, who in tree.found:
        if who.modality != "CT":
            others += 1
            continue
        nodules = drawn.get(who.series)
        groups = match_readers(nodules) if nodules is not None else []
        records.append(
            Record(
                dataset="lidc_idri", patient=who.patient, study=who.study, paths=found.files, modality="CT",
                labels=_labels(nodules, groups), scan=found, info={"series": who.series, "nodules": groups},
            )
        )  # fmt: skip
    notes += [f"{others} series are no CT and are left out"] if others else []
    return reported(ABOUT, records, [drawn], [*tree.notes, *notes])


def _annotations(folder: Path, near: Near) -> tuple[Join[str, list[Nodule]], list[str]]:
    """Series to what its readers drew, of every XML file in the tree and in the folders of annotations around it."""
    places = [folder, *(f for pattern in _XML for f in near.folders(pattern))]
    paths = sorted({path.absolute() for place in places for path in place.rglob("*.xml")})
    rows: dict[str, list[Nodule]] = {}
    used, damaged = [], 0
    for path in paths:
        try:
            series, nodules = read_annotations(path)
        except ScanError as error:
            # Radiographs have annotations of another kind.
            damaged += "not an annotation of a CT" not in str(error)
            continue
        used.append(path)
        rows[series] = nodules
    notes = [f"{damaged} XML files do not parse and are left out"] if damaged else []
    if not used and (packed := near.first("LIDC-XML-only*.zip")) is not None:
        notes.append(f"{packed.name} is here and not unpacked; unpack it where it lies")
    return Join("annotations", "series", ("*.xml", *_XML), near, used, rows), notes


def _labels(nodules: list[Nodule] | None, groups: list[list[Nodule]]) -> dict[str, str]:
    if nodules is None:
        return {"nodule": UNKNOWN, "malignancy": UNKNOWN}
    if not groups:
        return {"nodule": NEGATIVE, "malignancy": NEGATIVE}
    worst = max(median(n.ratings["malignancy"] for n in group) for group in groups)
    state = POSITIVE if worst > 3 else NEGATIVE if worst < 3 else UNCERTAIN
    return {"nodule": POSITIVE, "malignancy": state}


def read_annotations(path: Path) -> tuple[str, list[Nodule]]:
    """SeriesInstanceUID and every finding of one file. Raises ScanError for another kind of XML."""
    root = parse_xml(path.read_bytes(), path.name)
    series = (root.findtext("ResponseHeader/SeriesInstanceUid") or "").strip()
    if not series:
        raise ScanError(f"{path.name}: no SeriesInstanceUid in it; not an annotation of a CT")
    nodules = []
    try:
        for reader, session in enumerate(root.findall("readingSession")):
            for item in session.findall("unblindedReadNodule"):
                rated = item.find("characteristics")
                values = {k: (rated.findtext(k) or "").strip() for k in _RATINGS} if rated is not None else {}
                nodules.append(
                    Nodule(
                        reader,
                        (item.findtext("noduleID") or "").strip(),
                        {k: int(v) for k, v in values.items() if v},
                        tuple(_outline(roi) for roi in item.findall("roi")),
                    )
                )
    except ValueError as error:
        raise ScanError(f"{path.name}: a rating or a point is no number; copy the file again") from error
    return series, nodules


def _outline(roi) -> Outline:
    points = tuple((int(e.findtext("xCoord") or ""), int(e.findtext("yCoord") or "")) for e in roi.findall("edgeMap"))
    if any(abs(v) > 65535 for point in points for v in point):
        raise ValueError("a point far outside any image")
    z, image = float(roi.findtext("imageZposition") or ""), (roi.findtext("imageSOP_UID") or "").strip()
    return Outline(z, image, (roi.findtext("inclusion") or "").strip().upper() != "FALSE", points)


def match_readers(nodules: list[Nodule]) -> list[list[Nodule]]:
    """Outlined nodules (3 mm and more) of all readers that overlap, as one group each."""
    groups: list[list[Nodule]] = []
    for nodule in (n for n in nodules if n.ratings.get("malignancy") and any(len(o.points) > 1 for o in n.outlines)):
        joined = [g for g in groups if any(_overlap(nodule, other) for other in g)]
        groups = [g for g in groups if g not in joined] + [[nodule, *(n for g in joined for n in g)]]
    return groups


def _overlap(a: Nodule, b: Nodule) -> bool:
    """Whether the boxes of two nodules meet on a slice that both readers drew on."""
    there: dict[float, list[Outline]] = defaultdict(list)
    for outline in b.outlines:
        there[outline.z_mm].append(outline)
    for one in a.outlines:
        for other in there.get(one.z_mm, ()):
            if not (one.points and other.points):
                continue
            low, high = np.min(one.points, axis=0), np.max(one.points, axis=0)
            if (low <= np.max(other.points, axis=0)).all() and (high >= np.min(other.points, axis=0)).all():
                return True
    return False


def mask_of(outlines: tuple[Outline, ...], rows: int, columns: int) -> dict[float, np.ndarray]:
    """Slice position (mm) to a (rows, columns) mask: inside the outlines, without the outline itself and the holes."""
    out: dict[float, np.ndarray] = {}
    for outline in sorted(outlines, key=lambda o: not o.inside):  # holes last
        mask = out.setdefault(outline.z_mm, np.zeros((rows, columns), bool))
        canvas = Image.new("L", (columns, rows))
        draw = ImageDraw.Draw(canvas)
        if len(outline.points) > 2:
            draw.polygon(list(outline.points), fill=1, outline=0)
        edge = np.array([p for p in outline.points if 0 <= p[0] < columns and 0 <= p[1] < rows], int).reshape(-1, 2)
        inner = np.asarray(canvas).astype(bool).copy()
        inner[edge[:, 1], edge[:, 0]] = False
        if outline.inside:
            mask |= inner
        else:
            mask &= ~inner
            mask[edge[:, 1], edge[:, 0]] = False
    return out
