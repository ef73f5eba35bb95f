"""What every data set adapter returns, and the few things they share: the data root, tables, patient splits."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from medformer.data.geometry import ScanError
from medformer.data.scans import Scan, read_volume
from medformer.data.volumes import Volume

__all__ = [
    "NEGATIVE",
    "POSITIVE",
    "UNCERTAIN",
    "UNKNOWN",
    "Box",
    "Record",
    "data_root",
    "hash_patient",
    "new_salt",
    "patient_split",
    "state_of",
]

# The four states of a finding. "Not mentioned" is UNKNOWN, never NEGATIVE.
POSITIVE, NEGATIVE, UNCERTAIN, UNKNOWN = "positive", "negative", "uncertain", "unknown"
Split = Literal["train", "valid", "test"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """A rectangle on one image, in its original pixels from the upper left corner."""

    x: float
    y: float
    width: float
    height: float
    label: str
    slice: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One image, or one series, of a data set."""

    dataset: str
    patient: str
    """As the data set names them; splits never part one patient's records. Hash it before it goes into a cache."""
    study: str
    paths: tuple[str, ...]
    """The file, or all files of a series."""
    modality: str
    labels: Mapping[str, str] = field(default_factory=dict)
    """Finding to POSITIVE, NEGATIVE, UNCERTAIN or UNKNOWN, or to one of a data set's own named classes."""
    split: Split | None = None
    """The official one; None where the data set has none."""
    boxes: tuple[Box, ...] | None = None
    """None: nobody looked. Empty: looked at, and nothing there."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """What else the data set tells: view, side, time point, measurements."""
    scan: Scan | None = None
    """How to read it where that takes more than one file."""

    def read(self, **options: Any) -> Volume:
        """The volume, with the repairs the data set is known to need. Options as in `read_volume`."""
        from medformer.data.datasets import adapter

        module = adapter(self.dataset)
        if hasattr(module, "read"):
            return module.read(self)
        if self.paths[0].endswith((".nii.gz", ".nii")):
            options = {"modality": self.modality} | options
        volume = self.scan.read(**options) if self.scan is not None else read_volume(self.paths[0], **options)
        return module.repair(volume) if hasattr(module, "repair") else volume


def data_root(given: str | os.PathLike[str] | None = None, environment: Mapping[str, str] = os.environ) -> Path:
    """Where data sets lie: the argument, then MEDFORMER_DATA, then TENSOR_RELOADED_DATADIR (the older name).

    Raises ScanError with everything that was looked at.
    """
    looked = []
    for name, value in (
        ("--root", given), *((key, environment.get(key)) for key in ("MEDFORMER_DATA", "TENSOR_RELOADED_DATADIR"))
    ):  # fmt: skip
        if value:
            if os.path.isdir(value):
                return Path(value)
            raise ScanError(
                f"data root: {name} is {os.fspath(value)!r}, which is no folder; create it or change {name}"
            )
        looked.append(f"{name} is not given")
    raise ScanError(f"data root: {', '.join(looked)}; pass --root DIR or set MEDFORMER_DATA")


def state_of(value: str) -> str:
    """1, 0, -1 or blank, as CheXpert writes them. Raises ScanError for anything else."""
    states = {"": UNKNOWN, "1": POSITIVE, "0": NEGATIVE, "-1": UNCERTAIN, "nan": UNKNOWN}
    try:
        return states[value.strip().lower().removesuffix(".0")]
    except KeyError as error:
        raise ScanError(f"label {value[:40]!r} must be 1, 0, -1 or blank") from error


def patient_split(
    records: Iterable[Record], *, valid: float = 0.1, test: float = 0.1, seed: int = 0
) -> dict[str, list[Record]]:
    """train, valid and test lists. All records of a patient land in one, whatever else is in the data set.

    An official valid or test part is kept. Where a data set has none, its patients are drawn by a hash of name and
    seed, so adding patients moves nobody. Raises ScanError where the official split itself parts a patient.
    """
    if min(valid, test) < 0 or valid + test >= 1:
        raise ScanError(f"patient_split: valid={valid} and test={test} must be shares of 0 or more that sum below 1")
    records = list(records)
    official: dict[tuple[str, str], str | None] = {}
    for record in records:
        known = official.setdefault((record.dataset, record.patient), record.split)
        if known != record.split:
            raise ScanError(
                f"patient_split: {record.dataset} puts one patient into {known} and {record.split}; drop one of them"
            )
    has = {(dataset, split) for (dataset, _), split in official.items()}
    out: dict[str, list[Record]] = {"train": [], "valid": [], "test": []}
    for record in records:
        split = official[record.dataset, record.patient]
        if split in {None, "train"}:
            digest = hashlib.sha256(f"{seed}|{record.dataset}|{record.patient}".encode()).digest()
            share = int.from_bytes(digest[:8], "big") / 2**64
            if share < test and (record.dataset, "test") not in has:
                split = "test"
            elif share >= 1 - valid and (record.dataset, "valid") not in has:
                split = "valid"
        out[split or "train"].append(record)
    return out


def hash_patient(patient: str, salt: bytes) -> str:
    """A name for caches and logs that does not lead back without the salt. Raises ValueError for an empty salt."""
    if not salt:
        raise ValueError("hash_patient: salt is empty, which hides nothing; make one with new_salt()")
    return hashlib.blake2b(patient.encode(), key=salt[:64], digest_size=8).hexdigest()


def new_salt() -> bytes:
    return secrets.token_bytes(32)
