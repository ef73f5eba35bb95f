"""What evaluation and fine-tuning begin with: flags, device, labelled cases, what pretraining has seen."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jsonargparse
import torch

from medformer.channels import channel_names
from medformer.data.geometry import ScanError
from medformer.data.labels import names_in
from medformer.data.names import Ids, ids_of_run
from medformer.data.sequences import patterns_of
from medformer.data.store.index import is_store
from medformer.data.tables import same_name
from medformer.errors import UserError
from medformer.evaluation import tasks
from medformer.evaluation.trials import bar
from medformer.models import ImageGPT, Model
from medformer.short_help import ALL, short_help

__all__ = [
    "CaseSettings", "as_list", "check_channels", "device_of", "difference", "ids_of_cases", "labelled_cases",
    "parse_command", "sha256_of", "sources_of_pretraining",
]  # fmt: skip

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

C = TypeVar("C")


class CaseSettings(Protocol):
    """Settings that say what the labelled cases are."""

    @property
    def task(self) -> str: ...
    @property
    def labels(self) -> list[str]: ...
    @property
    def value(self) -> str | None: ...
    @property
    def channels(self) -> list[str]: ...
    @property
    def missing(self) -> bool: ...
    @property
    def outside(self) -> bool: ...
    @property
    def names(self) -> Any: ...
    @property
    def size(self) -> list[int]: ...
    @property
    def split_seed(self) -> int: ...
    @property
    def pretraining(self) -> str | None: ...


def parse_command(
    parser: jsonargparse.ArgumentParser, config: type[C], positional: str, topics: Mapping[str, Mapping[str, str]],
    lists: Collection[str], argv: Sequence[str],
) -> tuple[Path, C]:  # fmt: skip
    """The positional argument, which `parser` has already, and the settings of all flags.

    topics: what --help shows; lists: flags whose values are written 0.1,1.0 or 24x32x32.

    Raises:
        UserError: with exit code 2.
    """
    parser.add_class_arguments(config, as_group=False)
    if {"-h", "--help"} & {*argv}:
        print(short_help(parser, topics))
        raise SystemExit(0)
    flags = {f"--{name}" for name in lists}
    words, after = [], ""
    for word in ("--help" if word == ALL else word for word in argv):
        name, equals, value = word.partition("=")
        if after in flags:
            words.append(as_list(word))
        else:
            words.append(f"{name}={as_list(value)}" if name in flags and equals else word)
        after = word
    try:
        values = parser.parse_args(words).as_dict()
        return Path(values.pop(positional)), config(**values)
    except Exception as error:
        # jsonargparse raises many types for wrong flags.
        message = re.sub(r'Parser key "([^"]+)":\s*', r"--\1: ", str(error))
        raise UserError(f"{_plainly(message)}; {parser.prog} {ALL} lists all flags", 2) from error


_WANTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


def _plainly(message: str) -> str:
    """jsonargparse's words for a value of the wrong type, as: --steps x must be a whole number."""
    flag = re.match(r"(--\w+): ", message)
    value = re.search(r"Got value: (.*)", message) or re.search(r"Given value: (.*)", message)
    found = re.findall(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[([^\]]*)\])", message)
    words = [_WANTED.get(str(name), str(name)) if name else str(choices).replace("'", "").replace(", ", " or ")
             for name, choices in found if name != "NoneType"]  # fmt: skip
    if flag is None or value is None or not words:
        return message
    return f"{flag[1]} {value[1].partition(' - ')[0].strip()} must be {' or '.join(dict.fromkeys(words))}"


def as_list(word: str) -> str:
    """24x32x32 and 24,32,32 to [24,32,32]; names keep their x, and patterns their brackets."""
    inner = word[1:-1] if word.startswith("[") and word.endswith("]") else word
    if re.fullmatch(r"\d+(x\d+)+", inner):
        return f"[{inner.replace('x', ',')}]"
    parts = [part.strip() for part in inner.split(",")]
    quoted = [json.dumps(part) if {*part} & {*"*?[]{}"} and part[0] not in "\"'" else part for part in parts]
    return f"[{', '.join(quoted)}]"


def device_of(name: str) -> torch.device:
    """Raises UserError."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such device; use auto, cpu, cuda or cuda:N", 2) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this PyTorch sees no GPU; use --device cpu", 2)
    return device


def labelled_cases(
    config: CaseSettings, model: Model, file: Path, run: Mapping[str, Any]
) -> tuple[tasks.Task, tuple[int, ...]]:
    """The task, and the size of its images or of a crop of its scans. `run`: the settings of the checkpoint's run.

    With ids for names no case, note or error holds a name of the table's.
    """
    ids = ids_of_cases(config, run)
    try:
        return _cases(config, model, file, run, ids)
    except UserError as error:
        raise UserError(str(error) if ids is None else ids.hide(str(error)), error.code) from error


def ids_of_cases(config: CaseSettings, run: Mapping[str, Any]) -> Ids | None:
    """Ids for the names in the table, where `config` or the run asks for them."""
    if (config.names or (run.get("data") or {}).get("names")) != "ids":
        return None
    return ids_of_run(run, config.names, names_in(Path(config.task)))


def _cases(
    config: CaseSettings, model: Model, file: Path, run: Mapping[str, Any], ids: Ids | None
) -> tuple[tasks.Task, tuple[int, ...]]:
    check_channels(model, file, config.channels, config.missing)
    if isinstance(model, ImageGPT):
        grid, patch = model.config.grid, model.config.patch
        dims, trained = len(grid), tuple(n * p for n, p in zip(grid, patch, strict=True))
    else:
        dims = model.config.dims
        # An image was a scan of one slice there: 1 x Y x X.
        trained = tuple((run.get("views") or {}).get("global_size") or ())[-dims:]
    size = tuple(config.size) or trained
    task = tasks.read_task(
        Path(config.task), dims, size or None, config.split_seed, partial(bar, what="reading"), labels=config.labels,
        outside=config.outside, value=config.value, channels=config.channels, missing=config.missing,
    )  # fmt: skip
    if task.kind != "segmentation":
        size = tuple(task.images[0].shape[1:])
    elif len(size) != dims:
        if config.size:
            given = "x".join(map(str, size))
            raise UserError(
                f"--size {given} must be the {dims} voxels (zyx) of a crop, as in {'x'.join(['32'] * dims)}", 2
            )
        raise UserError(f"{file} has no config.yaml next to it; give --size, the {dims} voxels (zyx) of a crop", 2)
    try:
        model.grid_of(size)
    except ValueError as error:
        raise UserError(f"--size {'x'.join(map(str, size))}: {error}", 2) from error
    if ids is not None:
        notes = tuple(ids.hide(note) for note in task.notes)
        task = replace(task, sources=tuple(map(ids.of, task.sources)), notes=notes)
    return task, size


def check_channels(model: Any, file: Any, channels: Sequence[str], missing: bool) -> None:
    """Raises UserError, in one line, where a model that knows its channels by name gets others, or another order.

    A model of one channel may start any number.

    Args:
        file: where the model comes from.
        channels: of the cases, as --channels; empty for one scan a case.
        missing: whether cases may lack some.
    """
    known, config = channel_names(model), model.config
    try:
        given = tuple(patterns_of(channels))
    except ScanError as error:
        raise UserError(str(error), 2) from error
    same = tuple(map(same_name, known)) == tuple(map(same_name, given))
    if known and config.in_channels > 1 and not same:
        said = f"--channels {','.join(given)}" if given else "no --channels"
        raise UserError(
            f"{said}: {file} was trained on {len(known)} channels, {','.join(known)} in this order; give the same "
            "names in the same order (the columns of the table, or NAME=PATTERN), or take another checkpoint", 2,
        )  # fmt: skip
    if isinstance(model, ImageGPT):
        wanted = max(1, len(given)) * (2 if missing else 1)
        if wanted != config.in_channels:
            flags = " with flags for missing ones" if missing else ""
            raise UserError(
                f"{file} is an Image-GPT whose codebook is of {config.in_channels} channel(s), the cases have {wanted}"
                f"{flags}; its tokens mean nothing for others: pretrain it with the same --data.channels and "
                "--data.missing, or take another checkpoint", 2,
            )  # fmt: skip


def sources_of_pretraining(config: CaseSettings, run: Mapping[str, Any]) -> set[str]:
    """Source hashes of what the checkpoint was trained on (--pretraining, else as its run says); says so where they
    cannot be had."""
    where, ids = config.pretraining, ids_of_cases(config, run)
    folders = where or (run.get("data") or {}).get("root")
    channels = tuple((run.get("data") or {}).get("channels") or ())
    roots = [Path(part) for part in (folders or "").split(os.pathsep) if part]  # a run may have several
    found: set[str] = set()
    for root in roots:
        shown = root if ids is None else ids.of(str(root))
        if is_store(root):
            print(f"note: {shown} is a prepared store, which keeps no source files; --pretraining DIR checks for leaks")
        elif where is None and not root.exists():
            print(f"note: the checkpoint was trained on {shown}, which is not here; --pretraining DIR checks for leaks")
        else:
            try:
                found |= tasks.hashes_of(root, partial(bar, what="leak check"), channels)
            except UserError as error:
                raise UserError(str(error) if ids is None else _without(root, ids, str(error)), error.code) from error
    if not roots:
        print("note: what the checkpoint was trained on is not known here; --pretraining DIR checks for leaks")
    return found


def _without(root: Path, ids: Ids, text: str) -> str:
    """A message about a folder without its name and those of what lies in it."""
    return ids.hide(text, " ".join([str(root), *(p.name for p in root.rglob("*"))]))


def sha256_of(file: str | Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def difference(mine: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first thing that differs, in words."""
    for name, value in mine.items():
        other = theirs.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            if inner := difference(value, other, f"{name}."):
                return inner
        elif value != other:
            return f"{prefix}{name} is {other} there, {value} here"
    return None
