"""`medformer doctor`: which data sets are under the data root, and what the others would need."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from medformer.data.datasets import DATASETS, adapter
from medformer.data.geometry import ScanError
from medformer.data.records import UNKNOWN, Record, data_root

__all__ = ["State", "States", "as_json", "described", "examine", "report", "sets_in"]

_SHOWN = 20  # findings of a data set


@dataclass(frozen=True)
class State:
    """What is here of one data set."""

    name: str
    folder: str | None
    records: int = 0
    patients: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    labelled: int = 0
    """Records of which a label or box is known."""
    labels: dict[str, dict[str, int]] = field(default_factory=dict)
    """Finding to how many records have which state, UNKNOWN among them."""
    notes: tuple[str, ...] = ()
    """What did not join or was left out."""
    problem: str = ""
    """Why nothing, or less than all, can be read; with the way out."""


@dataclass(frozen=True)
class States:
    """Everything below one root."""

    root: str
    found: list[State]


def examine(given: str | None = None) -> States:
    """Look for every known data set. Raises ScanError where there is no data root."""
    root = data_root(given)
    return States(str(root), [_state(name, root) for name in DATASETS if name != "folder"])


def sets_in(root: str | Path) -> list[State]:
    """The known data sets at or below a folder, each scanned."""
    if not Path(root).is_dir():
        return []
    states = (_state(name, Path(root)) for name in DATASETS if name != "folder")
    return [state for state in states if state.folder is not None]


def _state(name: str, root: Path) -> State:
    module = adapter(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the notes say the same
        try:
            folder = module.ABOUT.folder(root, module.recognise)
        except ScanError as error:
            return State(module.ABOUT.name, None, problem=str(error).removeprefix(f"{module.ABOUT.name}: "))
        try:
            records = module.scan(folder)
        except ScanError as error:
            return State(module.ABOUT.name, str(folder), problem=str(error))
    notes = [note.removeprefix(f"{module.ABOUT.name}: ") for note in records.notes]
    gone = [note for note in notes if "files named in its tables are not here" in note]
    problem = "; ".join(gone)
    if not records:
        problem = f"its folder is here but nothing in it can be read ({module.ABOUT.layout})"
    return State(
        module.ABOUT.name, str(folder), records=len(records), patients=len({record.patient for record in records}),
        splits=dict(sorted(Counter(record.split or "no official split" for record in records).items())),
        labelled=sum(map(_labelled, records)), labels=_labels(records),
        notes=tuple(note for note in notes if note not in gone), problem=problem,
    )  # fmt: skip


def _labelled(record: Record) -> bool:
    return record.boxes is not None or any(state != UNKNOWN for state in record.labels.values())


def _labels(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    out: dict[str, Counter[str]] = {}
    for record in records:
        for finding, state in record.labels.items():
            out.setdefault(finding, Counter())[state] += 1
    return {finding: dict(sorted(states.items())) for finding, states in sorted(out.items())}


def described(state: State) -> list[str]:
    """Lines of one data set that is here: records, patients, splits, labels, and what did not join."""
    lines = []
    if state.records:
        splits = ", ".join(f"{count} {name}" for name, count in state.splits.items())
        lines.append(f"here     {state.name}: {state.records} records of {state.patients} patients ({splits})")
        lines.append(f"           labels: {state.labelled} records have some, {state.records - state.labelled} none")
        for finding, counts in list(state.labels.items())[:_SHOWN]:
            lines.append(f"           {finding}: {', '.join(f'{count} {name}' for name, count in counts.items())}")
        if (more := len(state.labels) - _SHOWN) > 0:
            lines.append(f"           and {more} findings more (--json has all)")
    lines += [f"           note: {note}" for note in state.notes]
    return lines


def report(states: States) -> str:
    """A few lines a data set."""
    lines = [f"data root: {states.root}"]
    for state in states.found:
        lines += described(state)
        if state.problem:
            lines.append(f"{'problem' if state.folder else 'missing'}  {state.name}: {state.problem}")
    return "\n".join(lines)


def as_json(states: States) -> str:
    return json.dumps(asdict(states), indent=1)
