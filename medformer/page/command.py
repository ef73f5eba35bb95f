"""`medformer report`: the page of a checkpoint as a file, or on this machine alone."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

import medformer
from medformer.answers.model import Finetuned
from medformer.channels import flags_of
from medformer.data import ScanError
from medformer.data.names import Ids, ids_of_run
from medformer.data.pictures import split_page
from medformer.data.sequences import in_folders
from medformer.errors import Parser, UserError, exit_code
from medformer.evaluation import probes
from medformer.folders import tried
from medformer.models import Encoder
from medformer.page.cases import CASES, read_cases
from medformer.page.page import Viewer, read_probe, training_curves, write_page
from medformer.page.serve import serve

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """`medformer report`: 0 done, 1 data or disk, 2 usage, 130 stopped by Ctrl-C."""
    return exit_code(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    parser = Parser(
        prog="medformer report", description="A page that shows what a checkpoint sees in scans: one HTML file."
    )
    parser.add_argument(
        "checkpoint", type=Path, help="model of medformer finetune, backbone.safetensors, or the folder of a run"
    )
    parser.add_argument("scans", type=Path, nargs="*", help=".nii, .nii.gz, DICOM folder or zip; .png for a 2D model")
    parser.add_argument("--probe", type=Path, help="probe.safetensors of medformer evaluate: shows its answers")
    parser.add_argument("--cases", type=Path, help="folder or .npz of training cases; default: the run's own")
    parser.add_argument("--cases_limit", type=int, default=CASES, help=f"most cases embedded [{CASES}]; 0 for none")
    parser.add_argument("--out", type=Path, default=Path("page.html"), help="file to write [page.html]")
    parser.add_argument("--serve", action="store_true", help="a page on this machine where scans are dropped")
    parser.add_argument("--port", type=int, default=8765, help="of --serve [8765]")
    parser.add_argument("--names", choices=["files", "ids"], help="what scans are called; default: as the run's config")
    options = parser.parse_args(argv)
    if not options.scans and not options.serve:
        raise UserError("give at least one scan, or --serve", 2)
    if not options.serve:
        tried(options.out.parent)
        if options.out.is_dir():
            raise UserError(
                f"--out {options.out} is a folder; give the name of a file, such as {options.out}/page.html", 2
            )
    folder = options.checkpoint
    if folder.is_dir() and (folder / "model.safetensors").is_file():
        options.checkpoint = folder / "model.safetensors"  # of medformer finetune
    model, file, run = probes.load_model(options.checkpoint)
    finetuned = medformer.load(file)
    finetuned = finetuned if isinstance(finetuned, Finetuned) else None
    if not isinstance(model, Encoder):
        raise UserError(
            f"{file} is an {type(model).__name__}, whose features are of whole images; the page shows patches", 2
        )
    inside = (p.name for s in options.scans if s.is_dir() for p in s.rglob("*"))
    ids = ids_of_run(run, options.names, (*map(str, options.scans), *inside))
    try:
        return _show(options, model, file, run, ids, finetuned)
    except UserError as error:
        raise UserError(str(error) if ids is None else ids.hide(str(error)), error.code) from error


def _show(options: argparse.Namespace, model: Encoder, file: Path, run: dict[str, Any], ids: Ids | None,
          finetuned: Finetuned | None) -> int:  # fmt: skip
    missing = [s for s in options.scans if not Path(split_page(s)[0]).exists()]
    if missing:
        raise UserError(f"{missing[0]}: no such file or folder", 2)
    viewer = Viewer(
        model, file, probe=read_probe(options.probe, model) if options.probe else None,
        curves=training_curves(file.parent, finetuned is not None),
    )  # fmt: skip
    viewer.ids, viewer.finetuned = ids, finetuned
    if viewer.patterns:  # as they were called in training, where that is known
        said = finetuned.about.channels if finetuned is not None else (run.get("data") or {}).get("channels") or ()
        viewer.patterns = in_folders(said) if len(said) == len(viewer.patterns) else viewer.patterns
        for flag, given in (("--probe", options.probe), ("--cases", options.cases)):
            if given is not None:
                raise UserError(f"{flag} {given}: {file} takes several channels, which it is not for; drop it", 2)
        viewer.facts.append("no training cases compared: the model takes several channels")
        options.cases_limit = 0
    listed = file.parent / "training.csv"
    root = options.cases or (listed if finetuned is not None and listed.is_file() else _trained_on(run))
    if options.cases is not None:
        viewer.near = f"Nearest cases of {viewer.called(options.cases.name)}"
    if root is not None and options.cases_limit > 0:
        try:
            viewer.cases = read_cases(
                viewer, root, options.cases_limit, _bar("training cases"), skipped=_skipped(file.parent)
            )
        except (ScanError, OSError, KeyError) as error:
            raise UserError(f"--cases {root}: {error}") from error
        viewer.facts.append(f"{len(viewer.cases)} {'' if options.cases else 'training '}cases compared")
    if options.serve:
        return serve(viewer, options.scans, options.port)
    size = write_page(viewer, options.scans, options.out, _bar("scans"))
    print(f"{options.out} ({size / 2**20:.1f} MB), open it in any browser")
    if finetuned is None:
        data = run.get("data") or {}
        words = ["finetune", str(options.checkpoint), "--task", "cases.csv"]
        words += shlex.split(flags_of(data.get("channels") or (), data.get("missing") or False))
    else:
        words = ["predict", str(file), str(options.scans[0]), "--out", "answers"]
    print(f"next: {shlex.join(['medformer', *words])}")
    return 0


def _skipped(run: Path) -> frozenset[str]:
    """Names of the scans that a run left out, which it was never trained on."""
    path = run / "skipped.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    return frozenset(line.partition(": ")[0] for line in lines)


def _bar(what: str) -> Callable[[Any], Any]:
    return lambda things: tqdm(things, desc=what, leave=False, disable=not sys.stderr.isatty(), file=sys.stderr)


def _trained_on(run: dict[str, Any]) -> Path | None:
    """The folder of the run's scans, if it is recorded and here; the first of several, no prepared store."""
    root = (run.get("data") or {}).get("root") or ""
    here = [Path(part) for part in root.split(os.pathsep) if part and Path(part).exists()]
    return next((part for part in here if not (part / "index.sqlite").is_file()), None)
