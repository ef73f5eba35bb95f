"""The command line: one frozen dataclass, its flags, its YAML file, and one-line errors."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
import yaml

from dino import DinoConfig
from medformer import BackboneConfig
from prepare import DataConfig
from runs import UserError
from schedules import OptimConfig
from views import ViewsConfig

__all__ = ["MAY_CHANGE", "TrainConfig", "as_dict", "changes", "flat", "parse", "to_yaml"]

# docstring_parse_attribute_docstrings: the text under each field becomes its flag's help.
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

# A resumed run may set these anew and still be the same run.
MAY_CHANGE = ("checkpoint_activations", "data.cache", "device", "log_every", "out", "resume", "save_every", "workers")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Self-supervised pretraining of a 3D backbone."""

    data: DataConfig = field(default_factory=DataConfig)
    model: BackboneConfig = field(
        default_factory=lambda: BackboneConfig(width=96, depth=4, heads=3, patch_stride=6, patch_padding=1)
    )
    views: ViewsConfig = field(default_factory=ViewsConfig)
    dino: DinoConfig = field(default_factory=DinoConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 200
    """Optimiser steps of the whole run; all schedules stretch over it. 1 or more."""
    batch_size: int = 8
    """Scans in one forward pass of one process; each gives 2 global and --views.local_views local views."""
    accumulate: int = 1
    """Forward passes per optimiser step. Scans per step: batch_size x accumulate x processes."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the backbone (autocast); the loss and the weights stay float32. fp16 needs a CUDA device."""
    checkpoint_activations: bool = False
    """Compute each block again in the backward pass: less memory, about a third more time."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    workers: int | None = None
    """Processes that cut crops, per training process. 0: none; default: 0 on a CPU, up to 4 with a GPU."""
    seed: int = 0
    """Of the weights, the order of the scans and every crop. 0 or more."""
    out: str | None = None
    """Folder of this run, made anew; default: runs/<date>-<time>."""
    resume: str | None = None
    """Go on with a run: its folder, one checkpoint file, or auto for the newest folder in runs/."""
    save_every: int = 100
    """Optimiser steps between checkpoints (the last two are kept); one more is written at the end. 1 or more."""
    log_every: int = 1
    """Optimiser steps between lines in metrics.jsonl and points in TensorBoard. 1 or more."""
    max_bad_steps: int = 5
    """Steps in a row with a NaN or Inf loss or gradient before the run gives up; each is skipped. 1 or more."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every", "log_every", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        for name in ("seed", "workers"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} must be 0 or more")
        if self.model.dims != 3 or self.model.in_channels != 1:
            raise ValueError(
                f"--model.dims {self.model.dims} --model.in_channels {self.model.in_channels}: "
                "this trainer takes 3D scans of one channel; use 3 and 1"
            )


class _Parser(jsonargparse.ArgumentParser):
    """Errors of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(_one_line(message), 2)


def _one_line(message: str) -> str:
    message = re.sub(r'Parser key "([^"]+)":\s*', r"--\1: ", message)
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    return " ".join(message.replace("BackboneConfig: ", "--model.").split())


def _known_flags(argv: list[str], parser: argparse.ArgumentParser) -> None:
    # Before argparse: it would take the value of an unknown flag for the method and complain about that.
    known = [option for action in parser._actions for option in action.option_strings]
    for flag in (word.split("=")[0] for word in argv if word.startswith("--")):
        if flag not in known:
            near = difflib.get_close_matches(flag.replace("-", "_").replace("__", "--", 1), known, 1)
            hint = f"did you mean {near[0]}?" if near else "python ssl/train.py --help lists all flags"
            raise UserError(f"unknown flag {flag}: {hint}", 2)


def _parser() -> _Parser:
    parser = _Parser(
        prog="python ssl/train.py",
        usage="python ssl/train.py [dino] [--config FILE] [--data.root DIR] [--resume RUN] [--steps N] ...",
        description="Pretrain a 3D backbone on unlabelled scans. Without arguments: a run of about two minutes on "
        "the scans that come with the dependencies. On your own: --data.root DIR.",
        epilog="Lists are written 24x32x32, 24,32,32 or [24, 32, 32]. "
        "Several processes: torchrun --nproc-per-node 2 ssl/train.py ...",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings; flags after it win.")
    parser.add_argument("method", nargs="?", default="dino", choices=["dino"], help="What to train with.")
    parser.add_class_arguments(TrainConfig, as_group=False)
    return parser


def parse(argv: list[str], saved: dict[str, Any] | None = None) -> TrainConfig:
    """Flags to a config. `saved` (a resumed run's settings) replaces the defaults.

    Raises:
        UserError: with exit code 2, for anything wrong in the flags or the file.
    """
    parser = _parser()
    if saved is not None:
        parser.set_defaults(flat(saved))
    argv = _readable(argv)
    _known_flags(argv, parser)
    try:
        values = parser.parse_args(argv).as_dict()
    except UserError:
        raise
    except (ValueError, TypeError, argparse.ArgumentError) as error:
        raise UserError(_one_line(str(error)), 2) from error
    try:
        return _build(TrainConfig, values)
    except (ValueError, TypeError) as error:
        raise UserError(_one_line(str(error)), 2) from error


def _readable(argv: list[str]) -> list[str]:
    """24x32x32 and 24,32,32 to lists, and a switch without a value to true."""
    switches = {f"--{f.name}" for f in dataclasses.fields(TrainConfig) if f.type == "bool"}
    switches |= {f"--model.{f.name}" for f in dataclasses.fields(BackboneConfig) if f.type == "bool"}
    result = []
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if re.fullmatch(r"\d+(x\d+)+|[\d.eE+-]+(,[\d.eE+-]+)+", value):
            word = f"{name}{equals}[{value.replace('x', ',')}]"
        result.append(word)
        if word in switches and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            result.append("true")
    return result


def _build(cls: type, values: dict[str, Any]) -> Any:
    """A nested dataclass from plain values; lists become tuples where the field is one. Unknown keys raise."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    arguments = {}
    for name, value in values.items():
        if cls is TrainConfig and name in ("config", "method"):
            continue
        if name not in known:
            raise ValueError(f"unknown setting {name} of {cls.__name__}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(value, dict):
            value = _build(typing.cast(type, hint), value)
        elif isinstance(value, list):
            value = tuple(value)
        arguments[name] = value
    return cls(**arguments)


def as_dict(config: Any) -> dict[str, Any]:
    """Plain nested values: numbers, strings, lists; safe for YAML, JSON and torch.load(weights_only=True)."""
    return {name: _plain(value) for name, value in dataclasses.asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {}
    for name, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ: dotted name to (old, new), without those a resumed run may change."""
    a, b = flat(old), flat(new)
    names = sorted(a.keys() | b.keys())
    return {n: (a.get(n), b.get(n)) for n in names if a.get(n) != b.get(n) and n not in MAY_CHANGE}


def to_yaml(config: TrainConfig) -> str:
    """The resolved config as a file for --config; the run's own folder is left out, so that it can be used again."""
    values = as_dict(dataclasses.replace(config, out=None, resume=None))
    return "# python ssl/train.py --config THIS_FILE\n" + yaml.safe_dump(
        values, sort_keys=False, default_flow_style=None
    )


def write_config(config: TrainConfig, run: Path) -> None:
    (run / "config.yaml").write_text(to_yaml(config))
