"""`medformer predict MODEL INPUT... --out DIR`: every scan of the inputs a row, and of masks a file."""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import medformer
from medformer.answers.maps import write_labels, write_probabilities, write_segmentation_object
from medformer.answers.model import About, Finetuned
from medformer.answers.predict import Prediction, predict
from medformer.answers.results import as_json, case_names, shown_scores, table_of
from medformer.data import Scan, ScanError, Volume, find_scans
from medformer.data.archives import is_archive, sniff_zip
from medformer.data.cases import Case, check_axes, first, read_case
from medformer.data.labels import read_cases
from medformer.data.modality import MODALITY_FILE, guessed
from medformer.data.nifti import header_of
from medformer.data.pictures import SUFFIXES, is_picture, pages_of, split_page
from medformer.data.scans import EMPTY, JUNK, index_scans
from medformer.data.sequences import MISSING_WAY, cases_below, in_folders
from medformer.data.store.entries import taken_as
from medformer.data.walking import NOWHERE, Skipped, walk
from medformer.errors import Parser, UserError, complain, exit_code
from medformer.evaluation.setup import device_of
from medformer.files import byte_count, write_whole
from medformer.folders import hub_name, model_file, tried

__all__ = ["Inputs", "Item", "inputs_of", "load_answers", "main"]

_PASSED = "skipped.txt"
_SHOWN = 20  # lines of a kind, at most
_NAMED = (".nii", ".nii.gz", ".dcm", ".nrrd", ".nhdr", ".mha", ".mhd", ".npy", *SUFFIXES)


@dataclass(frozen=True, kw_only=True)
class Item:
    """A case that was named or found: how to read it, or why it cannot be."""

    name: str
    source: str
    read: Callable[[], Case] | None = None
    """On its own axes, not canonical ones."""
    reason: str = ""
    slices: tuple[str, ...] = ()
    """Files of a DICOM series."""


def main(argv: list[str] | None = None) -> int:
    """0: every scan has its answer. 1: some have none, or the disk. 2: usage. 130: stopped by Ctrl-C."""
    stopped = "stopped by Ctrl-C; predictions.csv holds what was done"
    return exit_code(lambda: _run(sys.argv[1:] if argv is None else argv), stopped)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="medformer predict",
        description="What a fine-tuned model says of scans: label maps on each scan's own grid, or a table.",
    )
    parser.add_argument("model", type=Path, help="model.safetensors of medformer finetune, or the folder with it")
    parser.add_argument(
        "inputs", nargs="+", type=_named, metavar="INPUT",
        help="scan, picture, DICOM folder, zip, folder of any of these, or a .csv with the column path (or the "
        "model's channels)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder for predictions.csv and label maps")
    parser.add_argument("--probabilities", action="store_true", help="also those of every voxel, as a 4D NIfTI")
    parser.add_argument(
        "--max-memory",
        "--max_memory",
        default="4 GiB",
        help="for a scan beyond model and voxels; the next scan is read and the last one written meanwhile [4 GiB]",
    )
    parser.add_argument("--modality", help="what scans are whose format does not say, e.g. CT or MR")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], help="what the network computes in [CPU fp32, GPU bf16]"
    )
    parser.add_argument("--overwrite", action="store_true", help="take a folder that holds answers already")
    parser.add_argument("--json", action="store_true", help="print the answers as JSON, all else on stderr")
    return parser


def _named(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' names no file; give a scan, a folder or a table")
    return Path(text)


def load_answers(path: Path) -> tuple[Finetuned, Path]:
    """A fine-tuned model and its file; UserError where it is none."""
    file = model_file(path)
    try:
        model = medformer.load(hub_name(file) or file)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error).removeprefix("medformer.load: "), 2) from error
    if not isinstance(model, Finetuned):
        raise UserError(
            f"{file} is a {type(model).__name__} without a head, which has no answers; "
            f"medformer finetune {path} --task cases.csv teaches it some", 2,
        )  # fmt: skip
    return model, file


def _run(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    tried(options.out)
    if (options.out / "predictions.csv").exists() and not options.overwrite:
        raise UserError(f"--out {options.out} holds answers; give another --out, or --overwrite", 2)
    try:
        byte_count(options.max_memory)
    except ValueError as error:
        raise UserError(f"--max-memory {error}", 2) from error
    model, file = load_answers(options.model)
    device = device_of(options.device)
    model.to(device).eval()
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if options.json else partial_print
    inputs = inputs_of(options.inputs, model, options.modality)
    items, passed = inputs.items, inputs.passed
    refused = [item for item in items if item.read is None]
    scores, held_out = shown_scores(model.about.scores.get("test", {})), model.about.cases["test"]
    say(f"{len(items)} scan{'s' * (len(items) != 1)}; {model.about.task}: test {scores} ({held_out} cases)")
    for line in _listed([f"{item.source}: {_said(item.source, item.reason)}" for item in refused]):
        say(f"  cannot be read: {line}")
    if passed:
        named = ", ".join(Path(one.path).name for one in passed[:5]) + (", ..." if len(passed) > 5 else "")
        say(f"  passed over: {named} ({len(passed)} in all, with reasons in {_PASSED})")
    listed = "".join(f"{one.path}: {_said(one.path, one.reason)}\n" for one in passed)
    write_whole(options.out / _PASSED, lambda opened: opened.write(listed.encode()))
    about = {**as_json(model.about), "model": str(file), "scores_are_of": "validation and test cases of fine-tuning"}
    text = json.dumps(about, indent=1)
    write_whole(options.out / "model.json", lambda opened: opened.write(text.encode()))
    work = _Work(model, options, device)
    try:
        work.through(items)
    finally:
        rows = [work.rows[item.name] for item in items if item.name in work.rows]
        write_whole(options.out / "predictions.csv", lambda opened: opened.write(table_of(rows)))
    failed = [row for row in rows if row["status"] != "ok"]
    if options.json:
        over = [{"source": one.path, "reason": one.reason} for one in passed]
        print(json.dumps({"model": about, "rows": rows, "passed_over": over}, indent=1))
    else:
        _show(model, rows, options.out)
    for line in _listed([f"{row['source']}: {_said(row['source'], row['reason'])}" for row in failed]):
        complain(line)
    return 1 if failed else 0


def _listed(lines: Sequence[str]) -> list[str]:
    """The first of them, and how many there are more."""
    more = [f"and {len(lines) - _SHOWN} more, in predictions.csv"] if len(lines) > _SHOWN else []
    return [*lines[:_SHOWN], *more]


def _said(source: str, reason: str) -> str:
    """A reason without the name that its source ends with."""
    return reason.removeprefix(f"{Path(source).name}: ")


def partial_print(text: str) -> None:
    print(text, flush=True)


def _show(model: Finetuned, rows: Sequence[dict[str, Any]], out: Path) -> None:
    about, good = model.about, [row for row in rows if row["status"] == "ok"]
    for row in good[:20]:
        if about.kind == "regression":
            mae = about.scores.get("test", {}).get("mae", {}).get("mean")
            error = "" if mae is None else f", off by {mae:.3g} on average"
            text = f"{about.names[0]} {row[about.names[0]]}{error}"
        elif about.kind == "classes":
            text = f"{row['prediction']} {row['p_' + row['prediction']]:.3f}"
        elif about.kind == "labels":
            text = ", ".join(f"{n} {row['p_' + n]:.3f}" for n in about.names[:6])
        else:
            each = ((n, row.get(f"ml_{n}"), row[f"voxels_{n}"]) for n in about.names[:6])
            text = ", ".join(f"{n} {f'{ml:.4g} ml' if ml is not None else f'{v} voxels'}" for n, ml, v in each)
        print(f"  {row['name']}: {text}{'; WARNING ' + row['warnings'] if row['warnings'] else ''}")
    if len(good) > 20:
        print(f"  and {len(good) - 20} more")
    seconds = sum(row["seconds"] for row in good)
    print(
        f"{out}/  predictions.csv  model.json  {_PASSED}; {len(good)} of {len(rows)} scans, "
        f"{seconds / max(1, len(good)):.2f} s each"
    )
    shown = next((row["source"] for row in good if Path(split_page(row["source"])[0]).exists()), None)
    if shown is not None and about.count == 1:
        words = ["medformer", "report", model_path(out), shown, "--out", f"{out}/page.html"]
        print(f"next: {shlex.join(words)}")


def model_path(out: Path) -> str:
    return json.loads((out / "model.json").read_text())["model"]


class _Work:
    """Reading, the network and writing side by side: one thread reads ahead, one writes behind."""

    def __init__(self, model: Finetuned, options: argparse.Namespace, device: torch.device) -> None:
        self.model, self.options = model, options
        self.precision: Any = options.precision or ("bf16" if device.type == "cuda" else "fp32")
        self.rows: dict[str, dict[str, Any]] = {}

    def through(self, items: Sequence[Item]) -> None:
        bar = tqdm(total=len(items), desc="scans", leave=False, disable=not sys.stderr.isatty(), file=sys.stderr)
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer, bar:
            readable = iter([item for item in items if item.read is not None])
            ahead: list[tuple[Item, Future[Any]]] = []  # at most one, as behind: each holds its scan
            behind: list[tuple[Item, Future[dict[str, Any]]]] = []
            for item in items:
                if item.read is None:
                    self.rows[item.name] = _failed(item, item.reason)
                    bar.update()

            def fill() -> None:
                for item in itertools.islice(readable, 1):
                    assert item.read is not None
                    ahead.append((item, reader.submit(_timed, item.read)))

            def settle() -> None:
                while behind:
                    self._settle(*behind.pop(0))

            try:
                fill()
                while ahead:
                    item, future = ahead.pop(0)
                    try:
                        case, reading = future.result()
                        del future  # which holds the scan too
                        fill()
                        began = time.perf_counter()
                        said = predict(
                            self.model, case, max_memory=self.options.max_memory,
                            probabilities=self.options.probabilities, precision=self.precision,
                        )  # fmt: skip
                    except (ScanError, ValueError, OSError) as error:
                        if not ahead:
                            fill()
                        self.rows[item.name] = _failed(item, str(error))
                        bar.update()
                        continue
                    seconds = {"seconds_reading": reading, "seconds": time.perf_counter() - began}
                    settle()
                    behind.append((item, writer.submit(self._written, item, case, said, seconds)))
                    del case, said
                    bar.update()
                settle()
            except BaseException:
                reader.shutdown(wait=False, cancel_futures=True)
                settle()
                raise

    def _settle(self, item: Item, future: Future[dict[str, Any]]) -> None:
        try:
            self.rows[item.name] = future.result()
        except ScanError as error:
            self.rows[item.name] = _failed(item, str(error))

    def _written(self, item: Item, case: Case, said: Prediction, seconds: dict[str, float]) -> dict[str, Any]:
        """The row of a case; writes its maps."""
        about, grid = self.model.about, first(case)
        notes = dict.fromkeys(note for volume in case if volume is not None for note in volume.notes)
        row: dict[str, Any] = {
            "name": item.name, "source": item.source, "status": "ok", "reason": "",
            "warnings": "; ".join(said.warnings), "notes": "; ".join(notes),
        }  # fmt: skip
        if said.value is not None:
            row[about.names[0]] = float(f"{said.value:.6g}")
            mae = about.scores.get("test", {}).get("mae", {}).get("mean")
            row["expected_error"] = "" if mae is None else float(f"{mae:.4g}")
        elif said.labels is None:
            assert said.probabilities is not None
            if said.answer is not None:
                row["prediction"] = said.answer
            row |= {f"p_{n}": round(float(p), 5) for n, p in zip(about.names, said.probabilities, strict=True)}
        else:
            assert said.voxels is not None
            row |= {f"voxels_{n}": count for n, count in said.voxels.items()}
            row |= {f"ml_{n}": float(f"{ml:.6g}") for n, ml in (said.volumes_ml or {}).items()}
            place = self.options.out / item.name
            row["map"] = write_labels(said.labels, grid, place).name
            if said.probabilities is not None:
                row["probabilities"] = write_probabilities(said.probabilities, grid, place).name
            if item.slices:
                try:
                    row["dicom_seg"] = write_segmentation_object(
                        said.labels, grid, item.slices, about.names, place
                    ).name
                except ScanError as error:
                    row["warnings"] = "; ".join(filter(None, [row["warnings"], str(error)]))
        return row | {name: round(value, 3) for name, value in seconds.items()}


def _timed(read: Callable[[], Case]) -> Any:
    began = time.perf_counter()
    case = read()
    return case, time.perf_counter() - began


def _failed(item: Item, reason: str) -> dict[str, Any]:
    return {"name": item.name, "source": item.source, "status": "failed", "reason": " ".join(reason.split()),
            "warnings": "", "notes": ""}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that was found in files, folders, zips and tables."""

    items: list[Item]
    """Scans and pictures, each with a name of its own, those that cannot be read among them."""
    passed: list[Skipped]
    """Files that are neither, and why."""


def inputs_of(inputs: Sequence[Path], model: Finetuned, modality: str | None = None) -> Inputs:
    """Every case of the inputs; what cannot be read is one too.

    Raises UserError for what is not there.
    """
    missing = [path for path in inputs if not Path(split_page(path)[0]).exists()]
    if missing:
        raise UserError(f"{missing[0]}: no such file or folder", 2)
    passed: list[Skipped] = []
    found = [item for path in inputs for item in _items(path, model, modality, passed)]
    names = case_names([item.name for item in found])
    items = [
        Item(name=name, source=item.source, read=item.read, reason=item.reason, slices=item.slices)
        for name, item in zip(names, found, strict=True)
    ]
    return Inputs(items=items, passed=passed)


def _items(path: Path, model: Finetuned, modality: str | None, passed: list[Skipped]) -> Iterator[Item]:
    """The cases of one input; `passed` gets what is none."""
    about, dims = model.about, model.config.dims
    if path.suffix.lower() in (".csv", ".tsv"):
        try:
            rows = read_cases(path, about.channels, about.missing)
        except ScanError as error:
            raise UserError(f"{path}: {str(error).removeprefix(f'{path.name}: ')}") from error
        for name, files in rows:
            if isinstance(files, ScanError):
                yield Item(name=name, source=name, reason=str(files))
            else:
                yield _of_files(name, files, dims, about)
    elif about.count > 1:
        yield from _of_channels(path, about, dims, passed)
    elif path.is_dir() or (path.is_file() and _zipped(path)):
        yield from _inside(path, path.name, model, modality, passed)
    else:
        yield _of_files(path.name, (path,), dims, about)


def _inside(
    path: Path, called: str, model: Finetuned, modality: str | None, passed: list[Skipped]
) -> Iterator[Item]:  # fmt: skip
    """The scans and pictures of a folder or zip, and of the zips in a folder."""
    about, dims, zipped = model.about, model.config.dims, path.is_file()
    try:
        index = index_scans(path, images=True)
    except ScanError as error:
        yield Item(name=called, source=str(path), reason=str(error))
        return
    within, count = f"{called.removesuffix('.zip')}/" if zipped else "", 0
    # A zip's folders are numbered, and a series that lies in the folder itself is called as the folder.
    whole = len(index.scans) == 1 and (zipped or index.scans[0].name == path.resolve().name)

    def picture(page: Path, alone: bool = False) -> Item:
        name = within + page.name if zipped else str(page.relative_to(path))
        return _of_files(called if alone else name, (page,), dims, about, f"{path}/{page.name}" if zipped else None)

    for scan in index.scans:
        count += 1
        if scan.kind == "image" and is_picture(scan.files[0]):
            yield picture(Path(scan.files[0]), whole and zipped)
            continue

        def read(scan: Scan = scan) -> Case:
            volume = scan.read(canonical=False, modality=modality)
            if (word := _as_trained(volume, about)) is not None:
                volume = taken_as(scan.read(canonical=False, modality=word), word)
            check_axes(volume, dims)
            return (volume,)

        place = f"{path}/{scan.name}" if zipped else _place(path, scan)
        yield Item(
            name=called if whole else within + scan.name, source=str(path) if whole else place, read=read,
            slices=scan.files if scan.kind == "dicom" else (),
        )  # fmt: skip
    for skipped in index.skipped:
        file = Path(skipped.path)
        source, reason = f"{path}/{file.name}" if zipped else skipped.path, skipped.reason
        again = is_archive(skipped.path) and _zipped(file)  # .docx and .npz are zips too
        pages = pages_of(file) if dims == 2 and file.is_file() and is_picture(file) else []
        count += 1
        if again and not zipped:
            yield from _inside(file, str(file.relative_to(path)), model, modality, passed)
        elif len(pages) > 1:
            yield from map(picture, pages)
        elif again:
            yield Item(name=within + file.name, source=source, reason="a zip inside a zip; unpack the outer one")
        elif _meant(skipped):
            named = f"{file.name}: named like a scan or picture, but its content is none"
            yield Item(name=within + file.name, source=source, reason=named if reason == JUNK else reason)
        else:
            count -= 1
            if not _part(file):
                passed.append(replace(skipped, path=source))
    if not count:
        what = f"no scan or picture among its {index.seen} files" if index.seen else "nothing in it"
        yield Item(name=called, source=str(path), reason=f"{path.name}: {what}")


def _meant(skipped: Skipped) -> bool:
    """Whether what is left out was meant to be a scan: by what is in it, or by its name where nothing is."""
    name, reason = Path(skipped.path).name.lower(), skipped.reason
    nothing = reason == JUNK or reason.endswith(EMPTY) or NOWHERE in reason
    named = name.endswith(_NAMED) and not name.startswith(".")
    return skipped.refused or is_archive(skipped.path) or (nothing and named)


def _part(file: Path) -> bool:
    """Whether it is the voxels of a header next to it, or what says the modality."""
    raw = file.suffix.lower() in (".raw", ".zraw") and any(file.with_suffix(e).is_file() for e in (".mhd", ".nhdr"))
    return raw or file.name == MODALITY_FILE or header_of(str(file)) is not None


def _place(root: Path, scan: Scan) -> str:
    """Where a scan of a folder lies: its file, or the folders of its slices if no other series is there."""
    files = [Path(file) for file in scan.files]
    if len(files) == 1 and files[0].is_file():
        return str(files[0])
    folders = sorted({file.parent for file in files})
    if len(folders) > 1:
        return " + ".join(map(str, folders))
    return str(folders[0]) if folders[0].name == Path(scan.name).name else f"{root}/{scan.name}"


def _zipped(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return sniff_zip(file.read(4))
    except OSError:  # reading it says why
        return False


def _of_files(name: str, files: tuple[Path | None, ...], dims: int, about: About, shown: str | None = None) -> Item:
    """shown: what its source is called, where that is not the first file."""
    one = next(path for path in files if path is not None)
    source = shown or str(one)
    slices: tuple[str, ...] = ()
    if len(files) == 1 and one.is_dir():
        try:
            scans = find_scans(one).scans
        except ScanError as error:
            return Item(name=name, source=source, reason=str(error))
        slices = scans[0].files if len(scans) == 1 and scans[0].kind == "dicom" else ()
    elif not is_picture(one) and not one.exists():
        return Item(name=name, source=source, reason=f"{one.name}: no such file")

    def read() -> Case:
        case = read_case(files, dims, canonical=False)
        words = [None if volume is None else _as_trained(volume, about) for volume in case]
        return read_case(files, dims, canonical=False, modalities=words) if any(words) else case

    return Item(name=name, source=source, read=read, slices=slices)


def _as_trained(volume: Volume, about: About) -> str | None:
    """What a scan is taken as whose values alone say what it is: as those of training, where they were all alike."""
    if len(about.modalities) != 1 or not guessed(volume) or volume.geometry == "none":
        return None
    word = about.modalities[0]
    return None if (volume.modality, volume.units) == (word, *about.units[:1]) else word


def _of_channels(path: Path, about: About, dims: int, passed: list[Skipped]) -> Iterator[Item]:
    """The folder of a case, or of several; files by the channels' patterns, or by their names as part of a file's."""
    if not path.is_dir():
        yield Item(
            name=path.name, source=str(path),
            reason=f"the model takes {', '.join(about.patterns)}; give the folder of a case, or a .csv with these "
            "columns",
        )  # fmt: skip
        return
    used: set[Path] = set()
    for name, files in cases_below(path, in_folders(about.channels), about.missing):
        if isinstance(files, ScanError):
            place = path if name == path.resolve().name and not (path / name).exists() else path / name
            used.add(place)
            reason = str(files).replace(MISSING_WAY, "; the model was not trained with missing ones")
            yield Item(name=name, source=str(place), reason=reason)
        else:
            used |= {file for file in files if file is not None}
            yield _of_files(name, files, dims, about)
    paths, left = walk(str(path))
    passed += left
    for file in map(Path, paths):
        if not {file, *file.parents} & used:
            passed.append(Skipped(str(file), f"{file.name}: fits no channel of a case"))
