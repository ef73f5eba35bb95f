"""What a scan of a data set says: how its tables joined its images, and what was left out, with counts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from medformer.data.datasets.layout import About, Near
from medformer.data.records import Record

__all__ = ["DataSetWarning", "Join", "Records", "reported"]

K = TypeVar("K")
V = TypeVar("V")


class DataSetWarning(UserWarning):
    """Labels, splits or images of a data set that are not here or did not join."""


class Records(list[Record]):
    """The records of one data set, and what must be known of them."""

    def __init__(self, records: Iterable[Record], notes: Sequence[str]) -> None:
        super().__init__(records)
        self.notes = tuple(notes)
        """One line each: tables not found, or found and not joined; series left out; files that are missing."""


class Join(Generic[K, V]):
    """A table by its key, which counts who asks and who is answered."""

    def __init__(
        self, what: str, unit: str, looked: Sequence[str], near: Near, files: Path | Sequence[Path] | None,
        rows: dict[K, V],
    ) -> None:  # fmt: skip
        """what: the table is of, "labels"; unit: its keys are, "persons"; looked: names it was looked for under."""
        self.what, self.unit, self.looked, self.near = what, unit, tuple(looked), near
        self.files = [files] if isinstance(files, Path) else list(files or ())
        self.rows = rows
        self.asked: dict[K, bool] = {}

    def get(self, *keys: K) -> V | None:
        """The row of the first of `keys`, spellings of one thing, that the table has."""
        found = next((key for key in keys if key in self.rows), None)
        self.asked[keys[0]] = found is not None
        return None if found is None else self.rows[found]

    def note(self) -> str | None:
        """What is to be said, if anything is."""
        answered, asked = sum(self.asked.values()), len(self.asked)
        if not self.files:
            names = ", ".join(self.looked)
            return f"no table of {self.what}: looked for {names} {self.near.where()}; {asked} {self.unit} have none"
        named = list(dict.fromkeys(path.name for path in self.files))
        names = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
        if asked and not answered:
            return (
                f"{self.what}: {names} lists {len(self.rows)} {self.unit} and none of the {asked} of the images here; "
                "is it the table of this download?"
            )
        if answered < asked:
            return f"{self.what}: {answered} of {asked} {self.unit} here are in {names}, which lists {len(self.rows)}"
        return None


def reported(about: About, records: Iterable[Record], joins: Iterable[Join], notes: Iterable[str] = ()) -> Records:
    """The records, with a warning for every line that must not stay unsaid."""
    lines = [note for join in joins if (note := join.note())]
    found = Records(records, [f"{about.name}: {line}" for line in (*lines, *notes)])
    for line in found.notes:
        warnings.warn(line, DataSetWarning, stacklevel=3)
    return found
