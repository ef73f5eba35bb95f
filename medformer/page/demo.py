"""A page that runs a fine-tuned network in the browser, on files dropped on it: `medformer export --format web`.

One file, index.html, holds the viewer, the network as ONNX and ONNX Runtime's WebAssembly. It opens from disk or from
any web server, and its policy forbids every request: what is dropped cannot leave the machine.
"""

from __future__ import annotations

import base64
import gzip
import math
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medformer.answers.model import About, Finetuned
from medformer.answers.results import shown_scores
from medformer.errors import UserError
from medformer.export import export
from medformer.files import write_whole
from medformer.folders import tried
from medformer.page.page import assemble, described, told

__all__ = ["RUNTIME", "runtime_of", "write_demo"]

RUNTIME = "onnxruntime-web@1.30.0"  # of the npm registry, MIT
_SCRIPT, _WASM = "dist/ort.wasm.bundle.min.mjs", "dist/ort-wasm-simd-threaded.wasm"
_WAIT = 600  # seconds for a download of 33 MB


def write_demo(
    model: Finetuned, file: Path, out: Path, *, runtime: Path | None = None, say: Callable[[str], Any] = print
) -> Path:
    """index.html and model.onnx in the folder `out`; returns the page.

    runtime: a copy of the package `RUNTIME`, its .tgz or its folder; None asks npm for it.

    Raises UserError, in one line, for a model that the page cannot ask and for a package that cannot be had.
    """
    about = model.about
    if about.count > 1 or model.config.in_channels != 1:
        raise UserError(
            f"{file} takes {about.count} channels a case; the web page asks models of one; medformer predict and "
            "report --serve ask it here, export --format onnx writes the network alone", 2,
        )  # fmt: skip
    tried(out)
    script, wasm = runtime_of(runtime)
    network = out / "model.onnx"
    found = export(model, network, shape=(1, 1, *about.size), dynamic="nothing")
    worst = max(found.values())
    say(f"{network}: {'x'.join(map(str, about.size))} differs from PyTorch by {worst:.1e}")
    facts = [
        f"{sum(p.numel() for p in model.parameters()):,} parameters; learned from {about.cases['train']} cases",
        f"made by medformer {about.version}; runs in this page with {RUNTIME.replace('@', ' ')}",
        "Research only. Not a medical device: no answer may decide about a patient.",
    ]
    content = {
        "checkpoint": file.parent.name, "model": described(model.backbone), "scans": [], "near": "", "curves": {},  # type: ignore[arg-type]
        "serve": "", "limit": 0, "what": told(about), "flat": model.config.dims == 2, "facts": facts,
        "demo": {**_told(about), "dims": model.config.dims, "facts": facts},
    }  # fmt: skip
    blocks = {"runtime": script, "wasm": wasm, "network": network.read_bytes()}
    page = assemble(
        content, f"medformer: {about.task}", connect="'none'", scripts=("demo.js",), allowed="blob: 'wasm-unsafe-eval'",
        blocks={name: base64.b64encode(gzip.compress(data, 9, mtime=0)).decode() for name, data in blocks.items()},
    ).encode()  # fmt: skip
    write_whole(out / "index.html", lambda opened: opened.write(page))
    import onnxruntime  # which has written model.onnx

    for name in ("LICENSE", "ThirdPartyNotices.txt"):  # of what index.html holds
        shutil.copyfile(Path(onnxruntime.__file__).parent / name, out / f"onnxruntime-{name}")
    return out / "index.html"


def _told(about: About) -> dict[str, Any]:
    """What the page must know of the model, JSON-ready."""
    test = about.scores.get("test", {})
    mae, r2 = (test.get(metric, {}).get("mean") for metric in ("mae", "r2"))
    each = [None if v is None or math.isnan(v) else v for v in about.by_class.get("test") or []]
    return {
        "task": about.task, "kind": about.kind, "names": list(about.names), "size": list(about.size),
        "overlap": about.overlap, "spacing_mm": [list(s) for s in about.spacing_mm], "units": list(about.units),
        "modalities": list(about.modalities), "shown": shown_scores(test), "held_out": about.cases.get("test", 0),
        "each": each, "mae": mae, "worse": r2 is not None and r2 <= 0,
    }  # fmt: skip


def runtime_of(given: Path | None) -> tuple[bytes, bytes]:
    """The package's script and its WebAssembly. Raises UserError."""
    if given is None:
        with tempfile.TemporaryDirectory() as folder:
            return _members(_packed(Path(folder)))
    if not given.exists():
        raise UserError(f"--runtime {given}: no such file or folder", 2)
    return _members(given)


def _packed(folder: Path) -> Path:
    """The package as npm packs it."""
    way = f"`npm pack {RUNTIME}` on a machine with npm makes a .tgz, which --runtime takes"
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"--format web: npm, which fetches {RUNTIME}, is not installed; {way}")
    command = [npm, "pack", RUNTIME, "--silent", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_WAIT, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"--format web: npm pack {RUNTIME} took more than {_WAIT} s; {way}") from None
    found = next(folder.glob("*.tgz"), None)
    if done.returncode or found is None:
        reason = " ".join((done.stderr or done.stdout).split())[-200:] or f"exit code {done.returncode}"
        raise UserError(f"--format web: npm pack {RUNTIME} failed ({reason}); {way}")
    return found


def _members(package: Path) -> tuple[bytes, bytes]:
    try:
        if package.is_dir():
            root = package / "package" if (package / "package").is_dir() else package
            script, wasm = ((root / name).read_bytes() for name in (_SCRIPT, _WASM))
        else:
            with tarfile.open(package) as archive:
                opened = [archive.extractfile(f"package/{name}") for name in (_SCRIPT, _WASM)]
                script, wasm = (b"" if one is None else one.read() for one in opened)
    except (OSError, KeyError, tarfile.TarError) as error:
        raise UserError(
            f"--runtime {package}: no package {RUNTIME} ({error}); npm pack {RUNTIME} makes its .tgz", 2
        ) from error
    if not script or wasm[:4] != b"\0asm":
        raise UserError(f"--runtime {package}: its {_WASM} is no WebAssembly; npm pack {RUNTIME} makes its .tgz", 2)
    return script, wasm
