"""The command `medformer`, which `python -m medformer` is too: its subcommands, and the parsers of the short ones."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medformer.errors import Parser, UserError, complain, exit_code

__all__ = ["ABOUT", "main", "trainers"]

ABOUT = {
    "inspect": "what lies in a folder of scans, what is wrong with it and how to mend it",
    "doctor": "which of the known data sets are here, and what is missing",
    "prepare": "a training store from any mix of data sets and folders",
    "pretrain": "train a backbone on unlabelled scans or images with dino, byol or igpt",
    "evaluate": "compare a pretrained model with the same model from scratch on labelled cases",
    "finetune": "teach a model classes, numbers or masks from labelled cases, and keep it with its scores",
    "predict": "what a fine-tuned model says of scans: label maps on their own grid, or a table",
    "embed": "the tokens of a whole scan as a .npy file",
    "export": "a model as ONNX, as a torch.export program, or as a page that runs it in the browser",
    "report": "a page that shows what a model sees in a scan; --serve for one where scans are dropped",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit code, 2 where there is none of that name."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"medformer {version('medformer')}")
        return 0
    name, *rest = words
    if name not in ABOUT:
        near = difflib.get_close_matches(name, ABOUT, 1)
        complain(f"medformer {name}: no such command; {f'did you mean {near[0]}?' if near else 'medformer --help'}")
        return 2
    if name in _SHORT:
        return exit_code(lambda: _SHORT[name](rest))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py, before torch loads OpenMP
    if name == "pretrain":
        sys.path.insert(0, str(trainers()))  # what `python ssl/train.py` does
        return importlib.import_module("train").main(rest)
    rooms = {
        "prepare": "data.store.build",
        "evaluate": "evaluation.evaluate",
        "finetune": "answers.finetune",
        "predict": "answers.command",
        "report": "page.command",
    }
    return importlib.import_module(f"medformer.{rooms[name]}").main(rest)


def trainers() -> Path:
    """The folder of the training scripts: a checkout's `ssl/`, or its copy inside an installed package."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "ssl", package.parent / "ssl") if (folder / "train.py").is_file())


def _overview() -> str:
    wide = max(map(len, ABOUT))
    return "\n".join(
        [
            "usage: medformer COMMAND ...",
            "",
            "Transformers for 3D scans, pretrained on unlabelled CT and MR.",
            "",
            *(f"  {name:<{wide}}  {about}" for name, about in ABOUT.items()),
            "",
            "medformer COMMAND --help explains a command. On your own scans, begin with:",
            "  medformer inspect DIR",
            "  medformer pretrain --data.root DIR",
            "  medformer finetune RUN --task cases.csv",
            "  medformer predict MODEL SCAN --out DIR",
        ]
    )


def _inspect(argv: list[str]) -> int:
    """0: all is readable. 1: not so."""
    from medformer.data.geometry import ScanError
    from medformer.data.inspect_folder import as_json, inspect, report

    parser = Parser(prog="medformer inspect", description="Every scan and image in a folder, with what is wrong.")
    parser.add_argument("folder", help="folder (or one file) to look through, nested and mixed with anything")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--read", action="store_true", help="decode every scan too: slower, finds damaged pixels")
    parser.add_argument("--workers", type=int, default=None, help="processes that read headers; default: by file count")
    parser.add_argument("--modality", help="what the scans are whose format does not say, e.g. CT or MR")
    parser.add_argument("--least", metavar="ZxYxX", type=_size, help="crop size of the run: smaller scans are skipped")
    parser.add_argument(
        "--channels", metavar="NAME=PATTERN,...", help="each folder is a case of several files, or each row of a .csv "
        "of NAME,...: t1=*T1*.nii.gz,flair=*FLAIR*.nii.gz",
    )  # fmt: skip
    parser.add_argument("--missing", action="store_true", help="with --channels: cases may lack some of them")
    given = parser.parse_args(argv)
    if given.channels:
        return _inspect_cases(given)
    try:
        found = inspect(
            given.folder, read=given.read, workers=given.workers, modality=given.modality, least=given.least
        )
    except ScanError as error:
        raise UserError(str(error)) from error
    print(as_json(found) if given.json else report(found))
    if not given.json and any(scan["use"] != "no" for scan in found["scans"]):
        print(f"next: medformer pretrain --data.root {shlex.quote(given.folder)}")
    return 0 if found["scans"] and not found["problems"] else 1


def _inspect_cases(given: argparse.Namespace) -> int:
    from medformer.data.geometry import ScanError
    from medformer.data.inspect_cases import inspect_cases, report_cases
    from medformer.data.inspect_folder import as_json

    channels = given.channels.split(",")
    try:
        found = inspect_cases(given.folder, channels, missing=given.missing, read=given.read)
    except ScanError as error:
        raise UserError(str(error)) from error
    print(as_json(found) if given.json else report_cases(found))
    if not given.json and found["cases"]:
        words = ["medformer", "pretrain", "--data.root", given.folder, "--data.channels", given.channels]
        print(f"next: {shlex.join(words + ['--data.missing', 'true'] * bool(found['lacking']))}")
    return 0 if found["cases"] and not found["problems"] else 1


_MODEL = "weights of medformer, the folder of a run or of a fine-tuning, or hf:owner/name"


def _sizes(text: str) -> list[int]:
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} must be sizes above 0, for instance 96x96x96")
    return [int(part) for part in parts]


def _size(text: str) -> tuple[int, int, int]:
    parts = _sizes(text)
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} must be three sizes above 0, for instance 96x96x96")
    return parts[0], parts[1], parts[2]


def _doctor(argv: list[str]) -> int:
    """0: some data set is ready. 1: none."""
    from medformer.data.datasets.doctor import as_json, examine, report
    from medformer.data.geometry import ScanError

    parser = Parser(prog="medformer doctor", description="Which of the known data sets are here, and what is missing.")
    parser.add_argument("--root", help="data root; default: MEDFORMER_DATA, then TENSOR_RELOADED_DATADIR")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(argv)
    try:
        states = examine(given.root)
    except ScanError as error:
        raise UserError(str(error)) from error
    print(as_json(states) if given.json else report(states))
    return 0 if any(state.records for state in states.found) else 1


def _embed(argv: list[str]) -> int:
    """0: done. 2: an argument or a file that does not fit."""
    import medformer
    from medformer.data import read_volume
    from medformer.folders import hub_name, model_file, tried

    parser = Parser(prog="medformer embed", description=medformer.embed.__doc__,
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("model", help=_MODEL)
    parser.add_argument("scan", help="NIfTI file, DICOM folder, ...: whatever read_volume reads")
    parser.add_argument("out", type=Path, help=".npy file for the tokens; grid, affine and class token go to .json")
    parser.add_argument("--window", metavar="ZxYxX", type=_size, help="voxels, as in training: 64x64x64")
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--method", choices=["windows", "one_pass"], default="windows")
    parser.add_argument("--max-memory", default="4 GiB")
    given = parser.parse_args(argv)
    file = model_file(Path(given.model))
    tried(given.out.parent, "OUT in")
    try:
        model: Any = medformer.load(hub_name(file) or file)
        model, volume = getattr(model, "backbone", model), read_volume(given.scan)  # of a fine-tuned one
        for note in volume.notes:
            print(f"note: {note}")
        found = medformer.embed(
            model, volume, max_memory=given.max_memory, method=given.method,
            window=given.window, overlap=given.overlap, out=given.out,
        )  # fmt: skip
        about = {"grid": found.grid, "affine": found.affine.tolist(), "cls": found.cls.tolist(), "model": given.model}
        given.out.with_suffix(".json").write_text(json.dumps(about))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(str(error), 2) from error
    shape = "x".join(map(str, found.tokens.shape))
    print(f"{given.out}: tokens {shape}; {given.out.with_suffix('.json')}: where they lie")
    return 0


def _export(argv: list[str]) -> int:
    """0: done. 2: an argument, a file or a package that does not fit."""
    import medformer
    from medformer.export import TokensOf, export
    from medformer.folders import hub_name, model_file, tried

    parser = Parser(prog="medformer export", description="A model as a file that runs without medformer.")
    parser.add_argument("model", help=_MODEL)
    parser.add_argument(
        "--format", choices=["onnx", "pt2", "web"], default="onnx",
        help="web: a page that runs a fine-tuned model in the browser on files dropped there, nothing uploaded",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="default: the model's name with the format's ending; web: a folder")
    parser.add_argument("--runtime", type=Path, help="web: a copy of onnxruntime-web, .tgz or folder [npm fetches it]")
    parser.add_argument(
        "--size", type=_sizes,
        help="voxels of the example, zyx: 96x96x96; default: as trained, or what the positions are for",
    )  # fmt: skip
    parser.add_argument("--dynamic", choices=["size", "batch", "nothing"], default="size",
                        help="what the file leaves open: batch and size, the batch alone, or nothing")  # fmt: skip
    parser.add_argument("--tokens", action="store_true", help="give the class vector and the patch tokens")
    given = parser.parse_args(argv)
    if given.format == "web":
        return _export_web(given)
    file = model_file(Path(given.model))
    out = given.out or file.with_suffix(f".{given.format}")
    tried(out.parent)
    try:
        size = given.size
        model: Any = medformer.load(hub_name(file) or file)
        if size is None and hasattr(model, "about"):  # fine-tuned
            size = list(model.about.size)
        if given.tokens and not hasattr(model, "forward_features"):
            raise ValueError(f"medformer export: --tokens: {type(model).__name__} has no tokens")
        found = export(
            TokensOf(model) if given.tokens else model, out, size=size, dynamic=given.dynamic, format=given.format
        )
    except (OSError, TypeError, ValueError, ModuleNotFoundError) as error:
        raise UserError(str(error), 2) from error
    for shape, difference in found.items():
        print(f"{out}: {'x'.join(map(str, shape))} differs from PyTorch by {difference:.1e}")
    return 0


def _export_web(given: argparse.Namespace) -> int:
    from medformer.answers.command import load_answers
    from medformer.page.demo import write_demo

    model, file = load_answers(Path(given.model))
    out = given.out or file.with_name("web")
    try:
        page = write_demo(model, file, out, runtime=given.runtime)
    except (ValueError, ModuleNotFoundError) as error:
        raise UserError(str(error), 2) from error
    print(f"{page} ({page.stat().st_size / 2**20:.1f} MB): opens in any browser, from disk or from a web server")
    return 0


_SHORT = {"inspect": _inspect, "doctor": _doctor, "embed": _embed, "export": _export}
