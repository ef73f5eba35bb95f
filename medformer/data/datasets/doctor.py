"""`python -m medformer.data doctor`: which data sets are under the data root, and what the others would need."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from medformer.data.datasets import DATASETS, adapter
from medformer.data.geometry import ScanError
from medformer.data.records import data_root

__all__ = ["State", "States", "as_json", "examine", "report"]


@dataclass(frozen=True)
class State:
    """What is here of one data set."""

    name: str
    folder: str | None
    records: int
    patients: int
    splits: dict[str, int]
    problem: str
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


def _state(name: str, root: Path) -> State:
    module = adapter(name)
    folder = module.ABOUT.present(root, module.recognise)
    if folder is None:
        problem = f"not here (looked for {module.ABOUT.layout}); get it from {module.ABOUT.source}"
        return State(module.ABOUT.name, None, 0, 0, {}, problem)
    try:
        records = module.scan(folder)
    except ScanError as error:
        return State(module.ABOUT.name, str(folder), 0, 0, {}, str(error))
    splits = Counter(record.split or "no official split" for record in records)
    gone = sum(not Path(record.paths[0]).is_file() for record in records)
    problem = f"{gone} of {len(records)} files named in its tables are not here; copy them" if gone else ""
    problem = problem or (
        "" if records else f"its folder is here but nothing in it can be read ({module.ABOUT.layout})"
    )
    patients = len({record.patient for record in records})
    return State(module.ABOUT.name, str(folder), len(records), patients, dict(sorted(splits.items())), problem)


def report(states: States) -> str:
    """One line a data set."""
    lines = [f"data root: {states.root}"]
    for state in states.found:
        if state.records:
            splits = ", ".join(f"{count} {name}" for name, count in state.splits.items())
            lines.append(f"here     {state.name}: {state.records} records of {state.patients} patients ({splits})")
        if state.problem:
            lines.append(f"{'problem' if state.folder else 'missing'}  {state.name}: {state.problem}")
    return "\n".join(lines)


def as_json(states: States) -> str:
    return json.dumps(asdict(states), indent=1)
