"""The command line: one frozen dataclass, its flags, its YAML file, and one-line errors."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import typing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
import yaml

from byol import ByolConfig
from dino import DinoConfig
from igpt import IgptConfig, model_config
from medformer import BackboneConfig, ResNetConfig, TNTConfig
from medformer.errors import UserError
from medformer.evaluation.setup import as_list
from medformer.short_help import ALL, short_help
from online import OnlineConfig
from optim import OptimConfig
from roots import DataConfig
from sizes import METHODS, defaults_of
from views import ViewsConfig

__all__ = ["MAY_CHANGE", "TrainConfig", "as_dict", "changes", "flat", "from_dict", "parse", "to_yaml"]

# docstring_parse_attribute_docstrings: the text under each field becomes its flag's help.
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

# What --model.* are settings of.
NETWORKS: dict[str, Any] = {"transformer": BackboneConfig, "resnet": ResNetConfig, "tnt": TNTConfig}

# A resumed run may set these anew and still be the same run.
MAY_CHANGE = (
    "checkpoint_activations", "data.cache", "data.cache_limit", "device", "dry_run", "gpus", "keep", "loader_timeout",
    "log_every", "max_hours",
    "online.every", "online.task", "out", "picture_every", "replay", "resume", "save_every", "workers",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Self-supervised pretraining of a backbone on 3D scans or 2D images."""

    method: Literal["dino", "byol", "igpt"] = "dino"
    """What to train with: DINO, BYOL or Image-GPT."""
    size: Literal["mini", "tiny", "small", "base"] = "mini"
    """Sets width, depth, patches, crops, batch, head and schedule together; every flag given wins over it. mini:
    minutes on a CPU. tiny, small (ViT-S), base (ViT-B): for GPUs; nobody has run them to their end yet."""
    network: Literal["transformer", "resnet", "tnt"] = "transformer"
    """What is trained, and what --model.* are settings of: a transformer (Backbone), a resnet (ResNet) or a tnt
    (Transformer-in-Transformer); the last two by dino and byol. --help with --network shows their flags."""
    data: DataConfig = field(default_factory=DataConfig)
    model: BackboneConfig | ResNetConfig | TNTConfig = field(
        default_factory=lambda: BackboneConfig(width=96, depth=4, heads=3, patch_stride=6, patch_padding=1)
    )
    views: ViewsConfig = field(default_factory=ViewsConfig)
    dino: DinoConfig = field(default_factory=DinoConfig)
    byol: ByolConfig = field(default_factory=ByolConfig)
    igpt: IgptConfig = field(default_factory=IgptConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 200
    """Optimiser steps of the whole run; all schedules stretch over it. 1 or more."""
    batch_size: int = 8
    """Scans in one forward pass of one process; each gives all its global and local views."""
    accumulate: int = 1
    """Forward passes per optimiser step. Scans per step: batch_size x accumulate x processes."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the backbone (autocast); the loss and the weights stay float32. fp16 needs a CUDA device."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """With several processes: ddp (each holds the whole model) or fsdp2 (each holds a share of every block's weights,
    moments and average, for models that do not fit otherwise)."""
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
    max_hours: float | None = None
    """Hours after which the run ends with a checkpoint, as after SIGTERM; a scheduler's limit less some minutes."""
    save_every: int = 100
    """Optimiser steps between checkpoints; one more is written at the end. 1 or more."""
    keep: int = 2
    """Checkpoints that are kept: the newest so many, and best.pt, the one with the highest knn_accuracy where --online
    measures it (the loss of these methods says little). 1 or more."""
    loader_timeout: int = 600
    """Seconds without a batch from the workers after which the run ends, naming the scans; 0 waits for ever."""
    log_every: int = 1
    """Optimiser steps between lines in metrics.jsonl and points in TensorBoard. 1 or more."""
    max_bad_steps: int = 5
    """Steps in a row with a NaN or Inf loss or gradient before the run gives up; each is skipped, and the first ones
    are kept in bad/ for --replay. 1 or more."""
    picture_every: int = 0
    """Optimiser steps between pictures (attention, or completions of Image-GPT) in pictures/ and TensorBoard; 0: one
    at the end."""
    dry_run: bool = False
    """Only build the model, time a few steps on random voxels here (one, where it takes over a minute), and print
    parameters, memory and seconds."""
    gpus: int = 0
    """With --dry_run: estimate a step on so many GPUs too (seconds, memory, bytes sent), from what a step here does and
    the assumptions of ssl/cost.py. 0: no."""
    replay: str | None = None
    """A file of a run's bad/ folder: run that step again and say where the first NaN or Inf comes from."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every", "keep", "log_every", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        for name in ("seed", "workers", "picture_every", "loader_timeout", "gpus"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} must be 0 or more")
        if self.max_hours is not None and not self.max_hours > 0:
            raise ValueError(f"--max_hours {self.max_hours:g} must be above 0")
        self._check_channels()
        self._check_views()

    def _check_channels(self) -> None:
        """The network's channels are those of --data.channels, and a flag for each where some may be missing."""
        data, model = self.data, self.model
        if self.resume is None and data.channels and data.root is None and not self.dry_run:
            raise ValueError("--data.channels needs --data.root: a folder of cases, a .csv or a prepared store")
        if self.resume is None and data.missing and len(data.channels) < 2:
            raise ValueError("--data.missing true needs --data.channels of two or more")
        wanted = max(1, len(data.channels)) * (2 if data.missing else 1)
        if model.in_channels not in (1, wanted):
            raise ValueError(
                f"--model.in_channels {model.in_channels}: --data.channels and --data.missing make it {wanted}; drop it"
            )
        if data.channels and model.dims == 2:
            raise ValueError("--data.channels: with --model.dims 2 images are of one channel; use 3 for scans")
        object.__setattr__(self, "model", dataclasses.replace(model, in_channels=wanted))

    def _check_views(self) -> None:
        views, method, dims = self.views, self.method, self.model.dims
        wanted = 1 if method == "igpt" else 2
        if views.global_views != wanted:
            raise ValueError(f"--views.global_views {views.global_views}: {method} takes {wanted}")
        if method != "dino" and views.local_views:
            raise ValueError(f"--views.local_views {views.local_views}: {method} has no local views; use 0")
        for name in ("global_size", "local_size") if views.local_views else ("global_size",):
            size = getattr(views, name)
            shown = "x".join(map(str, size))
            if dims == 2 and size[0] != 1:
                raise ValueError(
                    f"--views.{name} {shown}: --model.dims 2 takes views of one slice; use 1x{size[1]}x{size[2]}"
                )
            self._check_size(name, size[3 - dims :])
        tokens = getattr(self.model, "class_token", False)
        if views.cutmix and (method == "igpt" or self.batch_size < 2 or not tokens):
            raise ValueError(
                f"--views.cutmix {views.cutmix} needs dino or byol, --batch_size 2 or more and --model.class_token, "
                "which a resnet has not; use 0"
            )
        if getattr(self.model, "norm", "group") == "batch" and self.batch_size < 2:
            raise ValueError(
                f"--model.norm batch with --batch_size {self.batch_size}: BatchNorm needs 2 or more scans; use "
                "--model.norm group"
            )
        if method == "byol" and self.byol.norm == "batch" and self.batch_size < 2:
            raise ValueError(
                f"--byol.norm batch with --batch_size {self.batch_size}: BatchNorm needs 2 or more scans; use "
                "--byol.norm group"
            )
        for name, own in (("dino", self.dino), ("byol", self.byol)):
            if method == name and own.masked_patches and not getattr(self.model, "mask_token", False):
                raise ValueError(
                    f"--{name}.masked_patches {own.masked_patches} needs --model.mask_token true, which only --network "
                    "transformer has"
                )
        if method == "igpt":
            model_config(self.model, self.igpt, views.global_size, "")  # says what does not fit

    def _check_size(self, name: str, size: tuple[int, ...]) -> None:
        """That the network takes a view of `size` voxels; a residual network takes any."""
        shown = "x".join(map(str, getattr(self.views, name)))
        if isinstance(self.model, TNTConfig):
            try:
                self.model.grids(size)
            except ValueError as error:
                raise ValueError(f"--views.{name} {shown}: {error}") from error
        elif isinstance(self.model, BackboneConfig) and self.method != "igpt":
            kernel = self.model.kernel
            if any(n < k for n, k in zip(size, kernel, strict=True)):
                patch = "x".join(map(str, (1, *kernel)[-3:]))
                raise ValueError(f"--views.{name} {shown} is below --model.patch_size {patch}")


class _Parser(jsonargparse.ArgumentParser):
    """Errors of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(_one_line(message), 2)


def _one_line(message: str) -> str:
    message = re.sub(r'Parser key "([^"]+)":\s*', r"--\1: ", message)
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    return " ".join(re.sub(r"(Backbone|ResNet|TNT)Config: ", "--model.", message).split())


# What --help shows, by topic; --help-all shows every flag.
_TOPICS = {
    "What is trained": {
        "method": "dino|byol|igpt", "size": "mini|tiny|small|base", "network": "transformer|resnet|tnt",
        "model.dims": "2|3",
    },
    "On what": {
        "data.root": "DIR[:DIR]", "data.channels": "NAME=PATTERN,..", "data.cache": "DIR", "views.global_size": "ZxYxX",
    },
    "How long, and where": {
        "steps": "N", "batch_size": "N", "optim.lr": "RATE", "precision": "fp32|bf16|fp16", "device": "auto|cpu|cuda:N",
        "seed": "N",
    },
    "The run": {
        "out": "DIR", "resume": "RUN|auto", "dry_run": "", "config": "FILE", "online.task": "FILE",
    },
}  # fmt: skip


def _known_flags(argv: list[str], parser: argparse.ArgumentParser) -> None:
    # Before argparse: it would take the value of an unknown flag for the method and complain about that.
    known = [ALL, *(option for action in parser._actions for option in action.option_strings)]
    for flag in (word.split("=")[0] for word in argv if word.startswith("--")):
        if flag not in known:
            near = difflib.get_close_matches(flag.replace("-", "_").replace("__", "--", 1), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"medformer pretrain {ALL} lists all flags"
            raise UserError(f"unknown flag {flag}: {hint}", 2)


def _parser(network: str) -> _Parser:
    parser = _Parser(
        prog="medformer pretrain",
        usage="medformer pretrain [dino|byol|igpt] [--size S] [--config FILE] [--data.root DIR] [--resume RUN] ...",
        description="Pretrain a backbone on unlabelled scans or images. Without arguments: a run of a few minutes "
        "on the scans that come with the dependencies. On your own: --data.root DIR.",
        epilog="Defaults are those of the method, --size, --network and --model.dims that stand before --help. "
        "Lists are written 24x32x32, 24,32,32 or [24, 32, 32]. "
        "Several processes: torchrun --nproc-per-node 2 -m medformer pretrain ...",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings; flags after it win.")
    parser.add_argument("method", nargs="?", default="dino", choices=list(METHODS), help="What to train with.")
    parser.add_class_arguments(TrainConfig, as_group=False, skip={"method", "model"})
    parser.add_class_arguments(NETWORKS[network], "model")
    if network == "transformer":
        parser.set_defaults(flat({"model": as_dict(TrainConfig().model)}))
    return parser


def parse(argv: list[str], saved: dict[str, Any] | None = None) -> TrainConfig:
    """Flags to a config. `saved` (a resumed run's settings) replaces the defaults.

    Raises:
        UserError: with exit code 2, for anything wrong in the flags or the file.
    """
    argv = _readable(argv)
    chosen = _choices(argv)
    if saved is not None:
        asked, chosen["network"] = chosen["network"], saved.get("network", "transformer")
        if any(word.startswith("--network") for word in argv) and asked != chosen["network"]:
            raise UserError(f"--resume: another model, its --network is {chosen['network']} and not {asked}", 2)
    if chosen["network"] not in NETWORKS:
        raise UserError(f"--network {chosen['network']} must be one of {', '.join(NETWORKS)}", 2)
    parser = _parser(chosen["network"])
    _known_flags(argv, parser)
    if chosen["method"] in argv and ALL in argv:  # with a method: without the others' settings
        for action in parser._actions:
            if action.dest.split(".")[0] in {*METHODS} - {chosen["method"]}:
                action.help = argparse.SUPPRESS
    if saved is not None:
        parser.set_defaults(flat(saved))
    else:
        try:
            parser.set_defaults(defaults_of(**chosen))
        except (ValueError, KeyError):
            pass  # the parser itself says what is wrong with method, size or dims
        else:
            parser.set_defaults(method=chosen["method"], network=chosen["network"])
    if {"-h", "--help"} & {*argv}:
        print(short_help(parser, _TOPICS))
        raise SystemExit(0)
    try:
        values = parser.parse_args(["--help" if word == ALL else word for word in argv]).as_dict()
    except UserError:
        raise
    except (ValueError, TypeError, argparse.ArgumentError) as error:
        raise UserError(_one_line(str(error)), 2) from error
    try:
        return _build(TrainConfig, values)
    except (ValueError, TypeError) as error:
        raise UserError(_one_line(str(error)), 2) from error


def _choices(argv: list[str]) -> dict[str, Any]:
    """Method, network, size and dims, on which other defaults depend, from the flags or the file they name."""
    chosen: dict[str, Any] = {"method": "dino", "network": "transformer", "size": "mini", "dims": 3}
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    flags = {name: value for name, value in pairwise(words) if name.startswith("--")}
    if "--config" in flags and Path(flags["--config"]).is_file():
        try:
            content = yaml.safe_load(Path(flags["--config"]).read_text())
        except (yaml.YAMLError, UnicodeDecodeError):
            content = None  # the parser says so
        if isinstance(content, dict):
            chosen |= {name: content[name] for name in ("method", "network", "size") if name in content}
            if isinstance(model := content.get("model"), dict):
                chosen["dims"] = model.get("dims", 3)
    for name in ("network", "size"):
        chosen[name] = flags.get(f"--{name}", chosen[name])
    if "--model.dims" in flags:
        chosen["dims"] = int(flags["--model.dims"]) if flags["--model.dims"].isdigit() else 0
    for before, word in pairwise(["", *words]):
        if word in METHODS and not before.startswith("--"):
            chosen["method"] = word
    return chosen


def _readable(argv: list[str]) -> list[str]:
    """24x32x32 and 24,32,32 to lists, and a switch without a value to true."""
    switches = {f"--{f.name}" for f in dataclasses.fields(TrainConfig) if f.type == "bool"}
    for network in NETWORKS.values():
        switches |= {f"--model.{f.name}" for f in dataclasses.fields(network) if f.type == "bool"}
    result = []
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if value and "--data.channels" in (name, argv[i - 1] if i else ""):
            word = f"{name}{equals}{as_list(value)}"
        elif re.fullmatch(r"\d+(x\d+)+|[\d.eE+-]+(,[\d.eE+-]+)+", value):
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
        if cls is TrainConfig and name == "config":
            continue
        if name not in known:
            raise ValueError(f"unknown setting {name} of {cls.__name__}")
        hint = hints[name]
        if cls is TrainConfig and name == "model":
            hint = NETWORKS[values.get("network", "transformer")]
        if dataclasses.is_dataclass(hint) and isinstance(value, dict):
            value = _build(typing.cast(type, hint), value)
        elif isinstance(value, list | tuple):
            # Of dataclasses, as a TNT's levels are, jsonargparse makes namespaces.
            value = tuple(v.as_dict() if isinstance(v, jsonargparse.Namespace) else v for v in value)
        arguments[name] = value
    return cls(**arguments)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The config that `as_dict` made these values of."""
    return _build(TrainConfig, values)


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
    values = as_dict(dataclasses.replace(config, out=None, resume=None, dry_run=False, gpus=0, replay=None))
    return "# medformer pretrain --config THIS_FILE\n" + yaml.safe_dump(
        values, sort_keys=False, default_flow_style=None
    )
