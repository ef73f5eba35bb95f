#!/usr/bin/env python3
"""Flatten the SIIM-FISABIO-RSNA COVID-19 folders: `train/<study>/<series>/<image>.dcm` to `train/<image>.dcm`.

Optional: medformer.data reads both trees. The label tables (every .csv next to train/ and test/) go along, so what this
makes is a whole data set; `index.csv` keeps study, series and first name of each image. Nothing happens without
--apply; nothing is ever overwritten; every step is written to a journal before it is taken, so a run may be killed
anywhere and started again, and `undo` takes it back.

    dataset_folder_cleanup.py [ROOT]                    what would be done
    dataset_folder_cleanup.py [ROOT] --apply            hard links in a new folder ROOT-flat; ROOT stays as it is
    dataset_folder_cleanup.py [ROOT] --apply --mode move    in place, without a second copy
    dataset_folder_cleanup.py undo JOURNAL              take it back

ROOT: the argument, else what MEDFORMER_DATA or the older TENSOR_RELOADED_DATADIR names. Needs Python alone.
Exit status: 0 done or nothing to do, 1 something is in the way, 2 wrong arguments or not this data set.
"""

from __future__ import annotations

import argparse
import csv
import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PARTS = ("train", "test")
FOLDERS = ("siim_covid19", "siim-covid19-detection", "SIIM-FISABIO-RSNA-COVID-19")
JOURNAL, INDEX = "cleanup-journal.jsonl", "index.csv"
TABLES = ("train_image_level.csv", "train_study_level.csv")
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}


class Refused(Exception):
    """What is in the way, in one line with the way out. `code` is the exit status."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Step:
    """One image to place, or a label table (`part`, `study` and `series` empty)."""

    src: Path
    dst: Path
    part: str
    study: str
    series: str
    size: int


def find_root(given: str | None) -> Path:
    """The folder that holds train/ or test/. Raises Refused with everything that was looked at."""
    looked = []
    variables = ("MEDFORMER_DATA", "TENSOR_RELOADED_DATADIR")
    sources = [("the argument", given)] if given else [(name, os.environ.get(name)) for name in variables]
    for name, value in sources:
        if not value:
            looked.append(f"{name} is not set")
            continue
        for folder in (Path(value), *(Path(value) / f for f in FOLDERS)):
            if any((folder / part).is_dir() and not (folder / part).is_symlink() for part in PARTS):
                return folder.resolve()
        looked.append(f"{name} is {value!r}, where neither it nor {', '.join(FOLDERS)} in it holds train/ or test/")
    raise Refused(f"no data: {'; '.join(looked)}. Give the folder that holds train/ and test/", 2)


def survey(root: Path, out: Path) -> tuple[list[Step], list[str], int]:
    """Steps, what is left alone, and how many images already lie flat. Links are never followed."""
    steps: list[Step] = []
    alone: list[str] = []
    flat = 0
    for part in PARTS:
        base = root / part
        if not base.is_dir() or base.is_symlink():
            continue
        for folder, folders, files in os.walk(base):
            here = Path(folder)
            for name in sorted(folders):
                if (here / name).is_symlink():
                    alone.append(f"{(here / name).relative_to(root)}: a link")
            folders[:] = sorted(f for f in folders if not (here / f).is_symlink())
            inside = here.relative_to(base).parts
            for name in sorted(files):
                path = here / name
                if path.is_symlink() or not path.is_file():
                    alone.append(f"{path.relative_to(root)}: a link or no plain file")
                elif not name.lower().endswith(".dcm"):
                    alone.append(f"{path.relative_to(root)}: not a .dcm")
                elif len(inside) == 0:
                    flat += 1
                elif len(inside) == 2:
                    dst = out / part / name
                    steps.append(Step(path, dst, part, inside[0], inside[1], path.stat().st_size))
                else:
                    alone.append(f"{path.relative_to(root)}: {len(inside)} folders deep, study/series/image is 2")
    if not steps and not flat:
        raise Refused(
            f"{root}: no <study>/<series>/<image>.dcm below train/ or test/; this is not the SIIM data set", 2
        )
    return steps, alone, flat


def survey_tables(root: Path, out: Path) -> tuple[list[Step], list[str]]:
    """The label tables next to the images, and those of the data set that are not there. In place nothing is to do."""
    found = sorted(
        path
        for path in root.iterdir()
        if path.suffix.lower() == ".csv" and path.name != INDEX and path.is_file() and not path.is_symlink()
    )
    lost = [name for name in TABLES if name not in {path.name for path in found}]
    steps = [Step(path, out / path.name, "", "", "", path.stat().st_size) for path in found]
    return ([] if out == root else steps), lost


def settle(steps: list[Step], policy: str) -> list[Step]:
    """Give colliding images names of their own, or refuse. Names that differ in case alone collide too."""
    steps = [replace(s, dst=s.dst.with_name(_portable(s.dst.name))) for s in steps]
    by_name: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        by_name[str(step.dst).casefold()].append(step)
    out = []
    for group in by_name.values():
        if len(group) > 1:
            if policy == "abort":
                first, second = group[0], group[1]
                raise Refused(
                    f"{len(group)} images want the name {first.part}/{first.dst.name}: {first.study}/{first.series}, "
                    f"{second.study}/{second.series}; nothing was done: use --on-collision hash-suffix or study-prefix"
                )
            for step in group:
                extra = digest(step.src)[:8] if policy == "hash-suffix" else ""
                stem = f"{step.dst.stem}-{extra}" if extra else f"{step.study}-{step.series}-{step.dst.stem}"
                out.append(replace(step, dst=step.dst.with_name(stem + step.dst.suffix)))
        else:
            out += group
    taken: dict[str, Step] = {}
    unique = []
    for step in sorted(out, key=lambda s: str(s.src)):
        other = taken.setdefault(str(step.dst).casefold(), step)
        if other is step:
            unique.append(step)
        elif digest(other.src) != digest(step.src):
            raise Refused(f"{step.part}/{step.dst.name} is still wanted twice; rename one of the two by hand")
    for step in unique:
        if len(step.dst.name.encode()) > 255 or len(str(step.dst).encode()) > 4000:
            raise Refused(f"{step.part}/{step.dst.name[:60]}...: the name is too long for common file systems")
    return unique


def _portable(name: str) -> str:
    """Names Windows cannot hold get an underscore."""
    return f"_{name}" if name.split(".")[0].lower() in RESERVED else name


def digest(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()


class Journal:
    """Lines of JSON, each on the disk before what it announces happens. A torn last line is passed over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        torn = False
        if path.exists():
            text = path.read_bytes()
            torn = bool(text) and not text.endswith(b"\n")
            for number, line in enumerate(text.split(b"\n")):
                try:
                    self.lines += [json.loads(line)] if line.strip() else []
                except ValueError as error:
                    if number < text.count(b"\n") and not torn and line.strip():
                        # Torn by an earlier kill and closed by the next run: it announced nothing that happened.
                        continue
                    if not torn:
                        raise Refused(f"{path.name}: line {number + 1} is no JSON; this is not a journal", 2) from error
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "ab")  # noqa: SIM115
        if torn:
            self.file.write(b"\n")

    def write(self, act: str, **values: Any) -> None:
        line = {"act": act, **values}
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.lines.append(line)

    def of(self, act: str, key: str) -> dict[str, dict[str, Any]]:
        """The last line of an act for each value of a key, with its number `at`."""
        return {line[key]: line | {"at": at} for at, line in enumerate(self.lines) if line.get("act") == act}

    def open_steps(self) -> dict[str, dict[str, Any]]:
        """Target to the line that began it, for all that was not taken back since."""
        undone = self.of("undone", "dst")
        return {d: b for d, b in self.of("begin", "dst").items() if d not in undone or undone[d]["at"] < b["at"]}


def apply(root: Path, out: Path, steps: list[Step], mode: str) -> str:
    """Take the steps. Raises Refused before the first one if any is impossible."""
    journal = Journal(out / JOURNAL)
    head = next((line for line in journal.lines if line["act"] == "plan"), None)
    if head is not None and (head["root"], head["mode"]) != (str(root), mode):
        raise Refused(f"{JOURNAL} in {out} is of {head['root']} with --mode {head['mode']}; finish or undo that first")
    begun = journal.open_steps()
    done = {dst for dst, line in journal.of("done", "dst").items() if dst in begun and line["at"] > begun[dst]["at"]}
    # A move that had begun no longer shows its source in the survey once the source is gone.
    waiting = [line for dst, line in begun.items() if dst not in done]
    planned = {str(s.dst) for s in steps}
    todo: list[tuple[Step, str]] = []
    blocked = []
    for step in steps:
        if step.dst.exists() or step.dst.is_symlink():
            if str(step.dst) in begun and str(step.dst) not in done:
                todo.append((step, begun[str(step.dst)]["sha256"]))
            elif not _same(step, mode):
                blocked.append(step)
            elif mode == "move" and str(step.dst) not in done:
                blocked.append(step)  # somebody else's copy: not ours to delete the source for
        else:
            todo.append((step, digest(step.src)))
    if blocked:
        first = blocked[0]
        raise Refused(
            f"{len(blocked)} targets exist already, the first {first.dst.relative_to(out)}; nothing was done: move "
            "them away, or choose another --out"
        )
    if head is None and (todo or steps):
        journal.write("plan", root=str(root), out=str(out), mode=mode, version=1)
    count = 0
    for line in waiting:
        if line["dst"] not in planned:  # its source is gone: the move was made, only its last line is missing
            if not Path(line["dst"]).is_file() or digest(Path(line["dst"])) != line["sha256"]:
                raise Refused(f"{line['dst']} was begun and is neither here nor where it came from; look for it")
            journal.write("done", dst=line["dst"])
            _prune(Path(line["src"]).parent, root, journal) if mode == "move" else None
    for step, sha in todo:
        _make_folders(step.dst.parent, out, journal)
        temporary = begun.get(str(step.dst), {}).get("temporary") or f".{secrets.token_hex(8)}.partial"
        if str(step.dst) not in begun:
            journal.write(
                "begin", src=str(step.src), dst=str(step.dst), size=step.size, sha256=sha, temporary=temporary
            )
        _place(step, mode, sha, step.dst.with_name(temporary))
        journal.write("done", dst=str(step.dst))
        count += 1
        if mode == "move":
            _prune(step.src.parent, root, journal)
    _write_index(journal, out, steps)
    if not steps:
        return "nothing to do"
    images = sum(bool(step.part) for step in steps)
    placed = sum(bool(step.part) for step, _ in todo)
    tables = f", {count - placed} label tables" if count > placed else ""
    return f"{placed} images placed{tables}, {images - placed} were there"


def _same(step: Step, mode: str) -> bool:
    """Whether the target already is what the step would make it."""
    if step.dst.is_symlink():
        return mode == "sym" and os.readlink(step.dst) == str(step.src)
    return step.dst.is_file() and step.dst.stat().st_size == step.size and digest(step.dst) == digest(step.src)


def _place(step: Step, mode: str, sha: str, temporary: Path) -> None:
    """Make the target without ever replacing a file that is not ours."""
    temporary.unlink(missing_ok=True)
    if mode == "sym":
        if not step.dst.is_symlink():
            os.symlink(step.src, step.dst)
        return
    if step.dst.exists():  # of a run that was killed, unless a stranger was quicker
        if digest(step.dst) != sha:
            raise Refused(f"{step.part}/{step.dst.name} exists with other content and stays; move it away")
    else:
        try:
            if mode == "copy":
                _copy(step, sha, temporary)
            else:
                os.link(step.src, step.dst, follow_symlinks=False)
        except OSError as error:
            if error.errno == errno.EXDEV or (mode == "move" and error.errno in NO_LINKS):
                if mode == "hard":
                    raise Refused(
                        "--out is on another disk, where hard links cannot go; use --mode copy or sym"
                    ) from error
                _copy(step, sha, temporary)
            elif error.errno in NO_LINKS:
                raise Refused("this file system has no hard links; use --mode copy, move or sym") from error
            else:
                raise
    if mode == "move":
        os.unlink(step.src)


def _copy(step: Step, sha: str, temporary: Path) -> None:
    with open(step.src, "rb") as source, open(temporary, "xb") as sink:
        shutil.copyfileobj(source, sink, 2**20)
        sink.flush()
        os.fsync(sink.fileno())
    if digest(temporary) != sha:
        temporary.unlink()
        raise Refused(f"{step.part}/{step.dst.name}: the copy differs from its source; check the disk")
    try:
        os.link(temporary, step.dst)  # fails where the target exists, which a rename would not
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with open(step.dst, "xb"):
            pass  # the name is ours now
        os.replace(temporary, step.dst)
        return
    os.unlink(temporary)


def _make_folders(folder: Path, out: Path, journal: Journal) -> None:
    missing = []
    while not folder.is_dir() and folder != out.parent:
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        journal.write("mkdir", folder=str(path))
        path.mkdir(exist_ok=True)


def _prune(folder: Path, root: Path, journal: Journal) -> None:
    """Remove the series and study folders that moving emptied."""
    for _ in range(2):
        if folder == root or folder.parent == root or not folder.is_dir() or any(folder.iterdir()):
            return
        journal.write("rmdir", folder=str(folder))
        folder.rmdir()
        folder = folder.parent


def _write_index(journal: Journal, out: Path, steps: list[Step]) -> None:
    """Which study and series each image came from: a flat test folder cannot tell."""
    rows = {line["dst"]: line["src"] for line in journal.open_steps().values()} | {
        str(s.dst): str(s.src) for s in steps
    }
    if not rows:
        return
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["part", "image", "study", "series", "original"])
    for dst, src in sorted(rows.items()):
        if Path(dst).parent == out:
            continue  # a label table
        part, study, series, name = Path(src).parts[-4:]
        table.writerow([part, Path(dst).name, study, series, name])
    data = text.getvalue().encode()
    target, temporary = out / INDEX, out / f".{INDEX}.partial"
    temporary.unlink(missing_ok=True)  # of a run that was killed
    if target.exists() and target.read_bytes() == data:
        return
    sha = hashlib.sha256(data).hexdigest()
    if target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() not in journal.of("index", "sha256"):
        raise Refused(f"{INDEX} in {out} is not ours; images are placed, move it away and run again for the index")
    journal.write("index", sha256=sha)
    temporary.write_bytes(data)
    os.replace(temporary, target)


def undo(path: Path) -> str:
    """Take back what a journal says was done, as far as files are still what they were. Raises Refused for the rest."""
    journal = Journal(path)
    head = next((line for line in journal.lines if line["act"] == "plan"), None)
    if head is None:
        raise Refused(f"{path}: no plan in it; give the {JOURNAL} that --apply wrote", 2)
    out, mode = Path(head["out"]), head["mode"]
    changed, count = [], 0
    for line in reversed(list(journal.open_steps().values())):
        src, dst = Path(line["src"]), Path(line["dst"])
        dst.with_name(line["temporary"]).unlink(missing_ok=True)
        if dst.is_symlink():
            fits = mode == "sym" and os.readlink(dst) == str(src)
        else:
            fits = dst.is_file() and digest(dst) == line["sha256"]
        if not fits:
            if dst.exists() or (mode == "move" and not src.exists()):
                changed.append(dst)
                continue
        elif mode == "move" and not src.exists():
            src.parent.mkdir(parents=True, exist_ok=True)
            _place(Step(dst, src, src.parent.name, "", "", line["size"]), "move", line["sha256"],
                   src.with_name(line["temporary"]))  # fmt: skip
        else:
            os.unlink(dst)
        journal.write("undone", dst=str(dst))
        count += 1
    target = out / INDEX
    target.with_name(f".{INDEX}.partial").unlink(missing_ok=True)
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() in journal.of("index", "sha256"):
        target.unlink()
    for folder in reversed(list(journal.of("mkdir", "folder"))):
        if Path(folder).is_dir() and Path(folder) != out and not any(Path(folder).iterdir()):
            Path(folder).rmdir()
    if changed:
        raise Refused(
            f"{count} taken back; {len(changed)} are not what they were and stay, the first {changed[0].name}"
        )
    return f"{count} taken back; the journal stays as a record"


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    description = (__doc__ or "").split("\n\n")[0]
    try:
        if arguments[:1] == ["undo"]:
            parser = argparse.ArgumentParser(prog="dataset_folder_cleanup.py undo", description="Take a run back.")
            parser.add_argument("journal", type=Path)
            path = parser.parse_args(arguments[1:]).journal
            if not path.is_file():
                raise Refused(f"{path}: no such journal", 2)
            print(undo(path))
            return 0
        parser = argparse.ArgumentParser(description=description, epilog="`undo JOURNAL` takes a run back.")
        parser.add_argument("root", nargs="?", help="folder with train/ and test/; default: MEDFORMER_DATA")
        parser.add_argument(
            "--out", type=Path, help="where the flat folders go; default: ROOT-flat, for move ROOT itself"
        )
        parser.add_argument(
            "--mode", choices=["hard", "sym", "copy", "move"], default="hard", help="default: hard links"
        )
        parser.add_argument("--apply", action="store_true", help="do it; without this the plan is only shown")
        parser.add_argument(
            "--on-collision", choices=["abort", "hash-suffix", "study-prefix"], default="abort", dest="policy",
            help="when two images have one name; default: do nothing at all",
        )  # fmt: skip
        args = parser.parse_args(arguments)
        root = find_root(args.root)
        out = (args.out or (root if args.mode == "move" else root.with_name(f"{root.name}-flat"))).resolve()
        if args.mode != "move" and (out == root or root in out.parents):
            raise Refused(f"--out {out} must not lie in the data it copies; choose a folder next to {root.name}", 2)
        steps, alone, flat = survey(root, out)
        steps = settle(steps, args.policy)
        tables, lost = survey_tables(root, out) if steps else ([], [])
        size = sum(s.size for s in steps)
        print(
            f"{root}: {len(steps)} images to place, {flat} already flat, {len(alone)} files left alone, {size:,} bytes"
        )
        for line in alone[:5]:
            print(f"  left alone: {line}")
        print(f"{len(tables)} label tables go along" + (f"; {', '.join(lost)} not next to train/" if lost else ""))
        if not args.apply:
            for step in [*steps[:5], *tables[:5]]:
                print(f"  {args.mode}: {step.src.relative_to(root)} -> {step.dst}")
            print("nothing was done; add --apply to do it")
            return 0
        print(apply(root, out, [*steps, *tables], args.mode))
        return 0
    except Refused as error:
        print(error, file=sys.stderr)
        return error.code
    except OSError as error:
        print(
            f"{error.filename or 'disk'}: {error.strerror}; what is done is in the journal, run again", file=sys.stderr
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
