"""One HTML file that shows what a checkpoint sees in scans: opens from disk, loads nothing from anywhere.

    python ssl/report.py CHECKPOINT SCAN... [--probe FILE] [--cases DIR] [--out page.html]
    python ssl/report.py CHECKPOINT --serve

Every number the page draws is computed here and packed into it: voxels as int16, attention and patch colours as bytes,
tokens as int8 of a few dimensions from which the page computes similarities itself.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import html
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

import medformer
import probes
import runs
from medformer.data import ScanError, Volume, find_scans, normalise, read_volume
from medformer.data.intensity import count_labels
from medformer.models import Encoder
from runs import UserError
from tasks import resize

__all__ = ["Probe", "Viewer", "load_scan", "main", "read_cases", "read_probe", "render", "write_page"]

VOXELS = 128**3  # most voxels of a scan that are shown; more are averaged away by whole factors
TOKEN_BYTES = 2 * 2**20  # most bytes of one scan's tokens
CASES = 200  # most training cases compared with
NEAREST = 6
_CASE_VOXELS = 64**3  # size at which cases, and a scan beside them, are embedded
_THUMB = 72  # pixels
_POINTS = 400  # of a training curve
_CURVES = ("loss", "teacher_entropy", "kl", "marginal_entropy", "accuracy", "gradient_norm", "lr", "scans_per_s")
_PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A linear probe that ssl/evaluate.py left, with what it needs to be asked."""

    task: str
    kind: str
    names: tuple[str, ...]
    size: tuple[int, ...]
    head: probes.LinearProbe


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training case: its embedding and a small picture."""

    name: str
    vector: np.ndarray
    picture: str


class Viewer:
    """A backbone and everything beside it that a page shows."""

    def __init__(
        self, model: Encoder, file: Path, *, probe: Probe | None = None, cases: Sequence[Case] = (),
        curves: dict[str, list[list[float]]] | None = None, facts: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.model, self.file, self.probe, self.cases = model.eval(), file, probe, list(cases)
        self.curves, self.facts = curves or {}, list(facts)
        if probe is not None and len(probe.size) != model.config.dims:
            raise UserError(f"--probe: of a {len(probe.size)}D model, {file} takes {model.config.dims} axes", 2)

    @torch.no_grad()
    def scan(self, volume: Volume, name: str) -> dict[str, Any]:
        """Everything the page needs of one scan, JSON-ready."""
        voxels, factors = reduce(volume.voxels.astype(np.float32), VOXELS)
        normal, _ = reduce(normalise(volume), VOXELS)
        x = self._input(normal)
        features = self.model.forward_features(x)
        grid = features.grid if len(features.grid) == 3 else (1, *features.grid)
        patches = F.normalize(features.patches[0].double(), dim=1)
        codes, scale, error, share = compress(patches, TOKEN_BYTES)
        flat, seen = self.model.config.dims == 2, medformer.footprint(self.model)
        reach, stride, padding = seen.reach, seen.stride, seen.padding
        if flat:
            reach, stride, padding = (1, *reach), (1, *stride), (0, *padding)
        stored, slope, middle = to_int16(voxels)
        return {
            "name": name, "notes": list(volume.notes), "modality": volume.modality,
            "units": "HU" if volume.units == "HU" else "", "flat": flat,
            "shape": list(voxels.shape), "full": list(volume.voxels.shape),
            "spacing": [mm * f for mm, f in zip(volume.spacing_mm, factors, strict=True)],
            "voxels": packed(stored), "slope": slope, "middle": middle, "window": window(volume, voxels),
            "grid": list(grid), "kernel": list(reach), "stride": list(stride), "padding": list(padding),
            "heads": self._attention(x), "colours": packed(colours(patches)),
            "tokens": packed(codes), "rank": codes.shape[1], "scale": scale, "error": error, "share": share,
            "nearest": self._nearest(volume), "answer": self._answer(volume),
        }  # fmt: skip

    def _input(self, normal: np.ndarray) -> Tensor:
        """[1, 1, *size], padded at the far ends to one patch."""
        flat = self.model.config.dims == 2
        x = torch.from_numpy(np.ascontiguousarray(normal[0] if flat else normal)).float()[None, None]
        if not isinstance(self.model, medformer.ResNet):  # which takes any size
            reach = medformer.footprint(self.model).reach
            short = [max(0, r - n) for r, n in zip(reach, x.shape[2:], strict=True)]
            x = F.pad(x, [p for s in reversed(short) for p in (0, s)], mode="replicate") if any(short) else x
        return x.to(next(self.model.parameters()).device)

    def _attention(self, x: Tensor) -> list[dict[str, Any]]:
        """The class token's row of each head of the last block, as bytes of its own range; none without that token."""
        if isinstance(self.model, medformer.ResNet) or self.model.class_token is None:
            return []
        rows = self.model.attention_map(x)[0].flatten(1).float().cpu()
        rows = torch.cat([rows, rows.mean(0, keepdim=True)])
        out = []
        for number, row in enumerate(rows):
            # The few tokens that take most would leave all others black.
            low, high = float(row.min()), float(torch.quantile(row, 0.998))
            byte = ((row - low) / max(high - low, 1e-12)).clamp(0, 1).mul(255).round().to(torch.uint8)
            times = [low * len(row), high * len(row)]
            title = "mean of heads" if number == len(rows) - 1 else f"head {number + 1}"
            out.append({"title": title, "values": packed(byte.numpy()), "range": times})
        return out

    @torch.no_grad()
    def embed(self, volume: Volume) -> np.ndarray:
        """The summary of a scan at the size cases are compared at, unit length."""
        normal, _ = reduce(normalise(volume), _CASE_VOXELS)
        vector = self.model(self._input(normal))[0].double().cpu().numpy()
        return vector / max(float(np.linalg.norm(vector)), 1e-12)

    def _nearest(self, volume: Volume) -> list[dict[str, Any]]:
        if not self.cases:
            return []
        similar = np.stack([case.vector for case in self.cases]) @ self.embed(volume)
        best = np.argsort(-similar)[:NEAREST]
        cases = ((self.cases[i], float(similar[i])) for i in best)
        return [{"name": c.name, "similarity": s, "picture": c.picture} for c, s in cases]

    def _answer(self, volume: Volume) -> dict[str, Any] | None:
        if self.probe is None:
            return None
        normal = torch.from_numpy(normalise(volume)).float()
        image = resize(normal if self.model.config.dims == 2 else normal[None], self.probe.size)
        frozen = probes.extract(self.model, [image], 1, torch.no_grad, list)
        shares = probes.probabilities(self.probe.head(frozen), self.probe.kind)[0]
        ranked = sorted(zip(self.probe.names, shares.tolist(), strict=True), key=lambda pair: -pair[1])
        return {"task": self.probe.task, "kind": self.probe.kind, "classes": ranked[:12]}


def reduce(voxels: np.ndarray, limit: int) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Average blocks of whole voxels, on the longest axes first, until at most `limit` are left; and the factors."""
    factors = [1, 1, 1]
    while math.prod(-(-n // f) for n, f in zip(voxels.shape, factors, strict=True)) > limit:
        longest = max(range(3), key=lambda axis: voxels.shape[axis] / factors[axis])
        factors[longest] += 1
    if factors == [1, 1, 1]:
        return np.asarray(voxels, np.float32), (1, 1, 1)
    x = torch.from_numpy(np.ascontiguousarray(voxels, np.float32))[None, None]
    x = F.avg_pool3d(x, factors, factors, ceil_mode=True, count_include_pad=False)
    return x[0, 0].numpy(), (factors[0], factors[1], factors[2])


def to_int16(voxels: np.ndarray) -> tuple[np.ndarray, float, float]:
    """int16, slope and middle: voxels = stored * slope + middle, to half a slope."""
    low, high = float(voxels.min()), float(voxels.max())
    slope = max(high - low, 1e-12) / 65_000
    middle = (high + low) / 2
    if high - low <= 65_000 and np.array_equal(voxels, np.round(voxels)):
        slope, middle = 1.0, float(np.round(middle))
    return np.round((voxels - middle) / slope).astype("<i2"), slope, middle


def window(volume: Volume, voxels: np.ndarray) -> list[float]:
    """Centre and width to start with: soft tissue for CT, else the middle 99% of the values."""
    if volume.units == "HU":
        return [40.0, 400.0]
    low, high = np.percentile(voxels, (0.5, 99.5)).tolist()
    return [(low + high) / 2, max(high - low, 1e-6)]


def compress(tokens: Tensor, budget: int) -> tuple[np.ndarray, float, float, float]:
    """Unit tokens [N, C] to int8 [N, R] whose scaled products stand for their cosines.

    Returns codes, scale (cosine = codes . codes * scale), the largest error over 2000 sampled pairs and the share of
    the tokens' squared length that R dimensions hold.
    """
    rank = max(1, min(tokens.shape[1], 64, budget // len(tokens)))
    _, vectors = torch.linalg.eigh(tokens.T @ tokens)
    low = tokens @ vectors[:, -rank:]
    share = float((low**2).sum() / (tokens**2).sum())
    step = float(low.abs().max()) / 127
    codes = (low / step).round().clamp(-127, 127).to(torch.int8)
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.integers(len(tokens), size=2000)) for _ in range(2))
    kept = (codes[a].double() * codes[b].double()).sum(1) * step**2
    error = float((kept - (tokens[a] * tokens[b]).sum(1)).abs().max())
    return codes.numpy(), step**2, error, share


def colours(tokens: Tensor) -> np.ndarray:
    """uint8 [N, 3]: the first three principal components, each stretched over its middle 98%."""
    centred = tokens - tokens.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    parts = (centred @ vectors[:, -3:].flip(1)).numpy()
    low, high = np.percentile(parts, (1, 99), axis=0)
    return np.clip(255 * (parts - low) / np.maximum(high - low, 1e-12), 0, 255).round().astype(np.uint8)


def packed(array: np.ndarray) -> str:
    """gzip and base64 of the bytes, as the page unpacks them."""
    return base64.b64encode(gzip.compress(np.ascontiguousarray(array).tobytes(), 6, mtime=0)).decode()


def thumbnail(voxels: np.ndarray) -> str:
    """A PNG data address of the middle axial slice, the patient's right on the left."""
    import io

    from PIL import Image

    plane = voxels[len(voxels) // 2].astype(np.float32)
    if len(voxels) > 1:
        plane = plane[::-1, ::-1]
    low, high = np.percentile(plane, (1, 99.5))
    picture = Image.fromarray(np.clip(255 * (plane - low) / max(high - low, 1e-6), 0, 255).astype(np.uint8))
    picture.thumbnail((_THUMB, _THUMB))
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def training_curves(run: Path) -> dict[str, list[list[float]]]:
    """Name to [step, value] of metrics.jsonl, thinned."""
    path = run / "metrics.jsonl"
    found: dict[str, list[list[float]]] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # the half-written last line of a run under way
        for name, value in values.items():
            if name != "step" and isinstance(value, int | float):
                found.setdefault(name, []).append([values.get("step", 0), value])
    order = sorted(found, key=lambda name: (_CURVES.index(name) if name in _CURVES else len(_CURVES), name))
    return {name: found[name][:: max(1, len(found[name]) // _POINTS)] for name in order}


def read_probe(path: Path, model: Encoder) -> Probe:
    """Read probe.safetensors; UserError where it is none or of another model."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["medformer_probe"])
            tensors = {name: file.get_tensor(name) for name in ("mean", "spread", "weight", "bias")}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"--probe {path}: not a probe.safetensors of ssl/evaluate.py ({error})", 2) from error
    if about["width"] != model.config.width or len(about["size"]) != model.config.dims:
        raise UserError(
            f"--probe {path}: made for a {len(about['size'])}D model of width {about['width']}, this one is "
            f"{model.config.dims}D of width {model.config.width}", 2,
        )  # fmt: skip
    head = probes.LinearProbe(last=about["last"], pool=about["pool"], lr=0.0, **tensors)
    return Probe(
        task=about["task"], kind=about["kind"], names=tuple(about["names"]), size=tuple(about["size"]), head=head
    )


def read_cases(viewer: Viewer, root: Path, limit: int, progress: Callable[[Any], Any]) -> list[Case]:
    """Embed up to `limit` cases below a folder, or of the train_images of an .npz, without what the trainer skips."""
    volumes: list[tuple[str, Callable[[], Volume]]] = []
    if root.suffix == ".npz":
        with np.load(root, allow_pickle=False) as file:
            images = file["train_images"]
        chosen = np.random.default_rng(0).permutation(len(images))[:limit]
        volumes = [(f"{root.stem} {i}", lambda image=images[i]: _picture(image)) for i in chosen]
    else:
        pictures = sorted(p for p in root.rglob("*") if p.suffix.lower() in _PICTURES)
        volumes = [(p.stem, lambda path=p: read_volume(path)) for p in pictures]
        if viewer.model.config.dims == 3:
            volumes = [(scan.name, scan.read) for scan in find_scans(root).scans]
        order = np.random.default_rng(0).permutation(len(volumes))[:limit]
        volumes = [volumes[i] for i in order]
    cases = []
    for name, read in progress(volumes):
        try:
            volume = read()
            if viewer.model.config.dims == 3 and count_labels(volume.voxels):
                continue
            cases.append(Case(name=name, vector=viewer.embed(volume), picture=thumbnail(volume.voxels)))
        except ScanError:
            continue
    return cases


def _picture(image: np.ndarray) -> Volume:
    grey = image.mean(-1) if image.ndim == 3 else image
    return Volume(
        voxels=np.ascontiguousarray(grey, np.float32)[None], affine=np.eye(4), modality="unknown", units="arbitrary",
        notes=(), source="picture",
    )  # fmt: skip


def render(viewer: Viewer, scans: Sequence[dict[str, Any]], serve: str = "", limit: int = 0) -> str:
    """The page as text; `serve` is the key that lets it upload up to `limit` bytes."""
    here = Path(__file__).parent
    content = {
        "checkpoint": viewer.file.parent.name + "/" + viewer.file.name, "facts": viewer.facts, "scans": list(scans),
        "model": _named(viewer.model),
        "curves": viewer.curves, "serve": serve, "limit": limit,
    }  # fmt: skip
    # "<" could end the script element early.
    text = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    page = (here / "page.html").read_text(encoding="utf-8")
    title = html.escape(f"medformer: {', '.join(s['name'] for s in scans) or 'drop a scan'}")
    script = (here / "page.js").read_text(encoding="utf-8")
    parts = {"title": title, "script": script, "connect": "'self'" if serve else "'none'", "data": text}
    # One pass: a part that holds a mark, such as a file's name, stays as it is.
    return re.sub(r"\{\{(title|script|connect|data)\}\}", lambda mark: parts[mark[1]], page)


def _named(model: Encoder) -> str:
    config = model.config
    if isinstance(model, medformer.ResNet):
        return f"{config.dims}D ResNet-{model.config.depth}, width {config.width}"
    if isinstance(model, medformer.TNT):
        levels = " in ".join(f"{level.width}" for level in model.config.levels)
        return (
            f"{config.dims}D TNT of width {levels}, {len(model.stages)} stages of {model.config.levels[-1].heads} heads"
        )
    return f"{config.dims}D, width {config.width}, {model.config.depth} blocks of {model.config.heads} heads"


def write_page(viewer: Viewer, sources: Sequence[Path], out: Path, progress: Callable[[Any], Any] = iter) -> int:
    """Read scans and write the page; returns its bytes."""
    scans = [viewer.scan(load_scan(source, viewer.model.config.dims), source.name) for source in progress(sources)]
    page = render(viewer, scans).encode()
    runs.write_whole(out, lambda file: file.write(page))
    return len(page)


def load_scan(source: Path, dims: int) -> Volume:
    """A scan, or a picture as a scan of one slice; UserError says why not."""
    try:
        volume = read_volume(source)
    except ScanError as error:
        told = str(error)
        raise UserError(told if source.name in told else f"{source.name}: {told}") from error
    if dims == 2 and volume.voxels.shape[0] > 1:
        raise UserError(f"{source.name}: {volume.voxels.shape[0]} slices, but the checkpoint takes 2D images", 2)
    if dims == 3 and volume.voxels.shape[0] == 1:
        raise UserError(f"{source.name}: one slice, but the checkpoint takes 3D scans", 2)
    return volume


def main(argv: list[str] | None = None) -> int:
    """`python ssl/report.py`: 0 done, 1 data or disk, 2 usage, 130 stopped by Ctrl-C."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        runs.complain(str(error))
        return error.code
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; python ssl/report.py --help lists all flags", 2)


def _run(argv: list[str]) -> int:
    parser = _Parser(
        prog="python ssl/report.py", description="A page that shows what a checkpoint sees in scans: one HTML file."
    )
    parser.add_argument("checkpoint", type=Path, help="backbone.safetensors, or the folder of its run")
    parser.add_argument("scans", type=Path, nargs="*", help=".nii, .nii.gz, DICOM folder or zip; .png for a 2D model")
    parser.add_argument("--probe", type=Path, help="probe.safetensors of ssl/evaluate.py: shows its answers")
    parser.add_argument("--cases", type=Path, help="folder or .npz of training cases; default: the run's own")
    parser.add_argument("--cases_limit", type=int, default=CASES, help=f"most cases embedded [{CASES}]; 0 for none")
    parser.add_argument("--out", type=Path, default=Path("page.html"), help="file to write [page.html]")
    parser.add_argument("--serve", action="store_true", help="a page on this machine where scans are dropped")
    parser.add_argument("--port", type=int, default=8765, help="of --serve [8765]")
    options = parser.parse_args(argv)
    if not options.scans and not options.serve:
        raise UserError("give at least one scan, or --serve", 2)
    model, file, run = probes.load_model(options.checkpoint)
    if not isinstance(model, Encoder):
        raise UserError(
            f"{file} is an {type(model).__name__}, whose features are of whole images; the page shows patches", 2
        )
    if model.config.in_channels != 1:
        raise UserError(f"{file} takes {model.config.in_channels} channels; the page shows models of one", 2)
    missing = [s for s in options.scans if not s.exists()]
    if missing:
        raise UserError(f"{missing[0]}: no such file or folder", 2)
    viewer = Viewer(
        model, file, probe=read_probe(options.probe, model) if options.probe else None,
        curves=training_curves(file.parent),
    )  # fmt: skip
    root = options.cases or _trained_on(run)
    if root is not None and options.cases_limit > 0:
        try:
            viewer.cases = read_cases(viewer, root, options.cases_limit, _bar("training cases"))
        except (ScanError, OSError, KeyError) as error:
            raise UserError(f"--cases {root}: {error}") from error
        viewer.facts.append(f"{len(viewer.cases)} training cases compared")
    if options.serve:
        from drop import serve

        return serve(viewer, options.scans, options.port)
    size = write_page(viewer, options.scans, options.out, _bar("scans"))
    print(f"{options.out} ({size / 2**20:.1f} MB), open it in any browser")
    return 0


def _bar(what: str) -> Callable[[Any], Any]:
    return lambda things: tqdm(things, desc=what, leave=False, disable=not sys.stderr.isatty(), file=sys.stderr)


def _trained_on(run: dict[str, Any]) -> Path | None:
    """Where the scans of the run lie, if it says and they are here; the first of several, no prepared store."""
    root = (run.get("data") or {}).get("root") or ""
    here = [Path(part) for part in root.split(os.pathsep) if part and Path(part).exists()]
    return next((part for part in here if not (part / "index.sqlite").is_file()), None)
