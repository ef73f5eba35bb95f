"""One HTML file that shows what a checkpoint sees in scans: opens from disk, loads nothing from anywhere.

    medformer report CHECKPOINT SCAN... [--probe FILE] [--cases DIR] [--out page.html]
    medformer report CHECKPOINT --serve

Every number the page draws is computed here and packed into it: voxels as int16, attention and patch colours as bytes,
tokens as int8 of a few dimensions from which the page computes similarities itself.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

import medformer
from medformer.answers.model import About, Finetuned
from medformer.answers.predict import predict
from medformer.answers.results import shown_scores
from medformer.channels import channel_names, flagged
from medformer.data import ScanError, Volume, normalise, read_volume
from medformer.data.archives import sniff_zip, unpacked
from medformer.data.cases import Case as ScanCase
from medformer.data.cases import first, read_case
from medformer.data.names import Ids, known_modality
from medformer.data.resample import resize
from medformer.data.sequences import MISSING_WAY, files_of_case, in_folders
from medformer.errors import UserError
from medformer.evaluation import probes
from medformer.files import write_whole
from medformer.models import Encoder
from medformer.page.cases import Case, nearest

__all__ = [
    "Probe",
    "Viewer",
    "assemble",
    "described",
    "load",
    "load_scan",
    "read_probe",
    "render",
    "told",
    "training_curves",
    "write_page",
]

VOXELS = 128**3  # most voxels of a scan that are shown; more are averaged away by whole factors
TOKEN_BYTES = 2 * 2**20  # most bytes of one scan's tokens
_CASE_VOXELS = 64**3  # size at which cases, and a scan with them, are embedded
_POINTS = 400  # of a training curve
_CURVES = ("loss", "teacher_entropy", "kl", "marginal_entropy", "accuracy", "gradient_norm", "lr", "scans_per_s")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A linear probe that medformer evaluate left, with what it needs to be asked."""

    task: str
    kind: str
    names: tuple[str, ...]
    size: tuple[int, ...]
    head: probes.LinearProbe
    scores: str = ""
    """On the held-out cases of its evaluation; empty where the file is of before they were kept."""
    cases: int = 0


class Viewer:
    """A backbone and everything else that a page shows."""

    def __init__(
        self, model: Encoder, file: Path, *, probe: Probe | None = None, cases: Sequence[Case] = (),
        curves: dict[str, list[list[float]]] | None = None, facts: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.model, self.file, self.probe, self.cases = model.eval(), file, probe, list(cases)
        self.curves, self.facts = curves or {}, list(facts)
        self.finetuned: Finetuned | None = None
        """Whose answers are shown."""
        self.near = "Nearest training cases"
        """What `cases` are called."""
        self.ids: Ids | None = None
        """Where set, names of files are replaced by ids."""
        self.patterns = in_folders(channel_names(model)) if model.config.in_channels > 1 else {}
        """Of a model of several channels: what the file of each is called in the folder of a case."""
        self.missing = model.config.in_channels > max(1, len(self.patterns))
        """Whether a case may lack some."""
        if self.missing and model.config.in_channels != 2 * len(self.patterns):
            raise UserError(
                f"{file} takes {model.config.in_channels} channels and does not say which; the page shows models of "
                "one, and those that medformer pretrain --data.channels or finetune --channels made", 2,
            )  # fmt: skip
        if probe is not None and len(probe.size) != model.config.dims:
            raise UserError(f"--probe: of a {len(probe.size)}D model, {file} takes {model.config.dims} axes", 2)

    @property
    def dims(self) -> int:
        return self.model.config.dims

    def called(self, name: str) -> str:
        """What the page calls a scan of this name."""
        return name if self.ids is None else self.ids.of(name)

    @torch.no_grad()
    def scan(self, given: Volume | Sequence[Volume | None], name: str) -> dict[str, Any]:
        """Everything the page needs of one scan, or of a case of several channels on one grid, JSON-ready."""
        case = (given,) if isinstance(given, Volume) else tuple(given)
        volume = first(case)
        voxels, factors = reduce(volume.voxels.astype(np.float32), VOXELS)
        x = self._input(case, VOXELS)
        features = self.model.forward_features(x)
        grid = features.grid if len(features.grid) == 3 else (1, *features.grid)
        patches = F.normalize(features.patches[0].double(), dim=1)
        codes, scale, error, share = compress(patches, TOKEN_BYTES)
        flat, seen = self.model.config.dims == 2, medformer.footprint(self.model)
        reach, stride, padding = seen.reach, seen.stride, seen.padding
        if flat:
            reach, stride, padding = (1, *reach), (1, *stride), (0, *padding)
        notes = list(dict.fromkeys(note for one in case if one is not None for note in one.notes))
        modality = volume.modality
        if self.ids is not None:
            notes = [self.ids.hide(n, name) for n in notes if not n.startswith("left out: ")]  # which names files
            modality = known_modality(modality)
        return {
            "name": self.called(name), "notes": notes, "modality": modality, "flat": flat, **shades(volume, voxels),
            "sequences": [
                {"name": called} | shades(one, reduce(one.voxels.astype(np.float32), VOXELS)[0])
                for called, one in zip(self.patterns, case, strict=False) if one is not None
            ],
            "shape": list(voxels.shape), "full": list(volume.voxels.shape),
            "spacing": [mm * f for mm, f in zip(volume.spacing_mm, factors, strict=True)],
            "measured": volume.geometry != "none",
            "grid": list(grid), "kernel": list(reach), "stride": list(stride), "padding": list(padding),
            "heads": self._attention(x), "colours": packed(colours(patches)),
            "tokens": packed(codes), "rank": codes.shape[1], "scale": scale, "error": error, "share": share,
            "nearest": nearest(self.cases, self.embed(volume)) if self.cases else [], **self._answers(given, factors),
        }  # fmt: skip

    def _input(self, case: ScanCase, limit: int) -> Tensor:
        """[1, channels, *size] of at most `limit` voxels, padded at the far ends to one patch."""
        flat = self.model.config.dims == 2
        there = [None if one is None else reduce(normalise(one), limit)[0] for one in case]
        size = next(part.shape for part in there if part is not None)
        normal = np.stack([np.full(size, np.nan, np.float32) if part is None else part for part in there])
        x = torch.from_numpy(normal[:, 0] if flat else normal).float()[None]
        x = flagged(x) if self.missing else x
        if not isinstance(self.model, medformer.ResNet):  # which takes any size
            reach = medformer.footprint(self.model).reach
            short = [max(0, r - n) for r, n in zip(reach, x.shape[2:], strict=True)]
            x = F.pad(x, [p for s in reversed(short) for p in (0, s)], mode="replicate") if any(short) else x
        return x.to(next(self.model.parameters()).device)

    def _attention(self, x: Tensor) -> list[dict[str, Any]]:
        """The class token's row of each head of the last block, as bytes of its own range; none without that token."""
        if isinstance(self.model, medformer.ResNet | medformer.SliceEncoder) or self.model.class_token is None:
            return []
        rows = self.model.attention_map(x)[0].flatten(1).float().cpu()
        rows = torch.cat([rows, rows.mean(0, keepdim=True)])
        out = []
        for number, row in enumerate(rows):
            # Those that take most would leave the others black, the half that takes least would cover the scan.
            low, high = (float(torch.quantile(row, q)) for q in (0.5, 0.998))
            byte = ((row - low) / max(high - low, 1e-12)).clamp(0, 1).mul(255).round().to(torch.uint8)
            times = [low * len(row), high * len(row)]
            title = "mean of heads" if number == len(rows) - 1 else f"head {number + 1}"
            out.append({"title": title, "values": packed(byte.numpy()), "range": times})
        return out

    @torch.no_grad()
    def embed(self, volume: Volume) -> np.ndarray:
        """The summary of a scan at the size cases are compared at, unit length."""
        vector = self.model(self._input((volume,), _CASE_VOXELS))[0].double().cpu().numpy()
        return vector / max(float(np.linalg.norm(vector)), 1e-12)

    def _answers(self, volume: Volume | Sequence[Volume | None], factors: tuple[int, int, int]) -> dict[str, Any]:
        """What the probe or the fine-tuned model says; of a segmentation a mask with its volumes."""
        if self.finetuned is None:
            return {"answer": self._answer(volume) if isinstance(volume, Volume) else None}
        about, said = self.finetuned.about, predict(self.finetuned, volume)
        answer: dict[str, Any] = {
            "task": about.task, "kind": about.kind, "scores": shown_scores(about.scores.get("test", {})),
            "cases": about.cases["test"], "warnings": list(said.warnings), "classes": [],
        }  # fmt: skip
        if said.value is not None:
            mae, r2 = (about.scores.get("test", {}).get(metric, {}).get("mean") for metric in ("mae", "r2"))
            worse = r2 is not None and r2 <= 0
            return {"answer": answer | {"name": about.names[0], "value": said.value, "error": mae, "worse": worse}}
        if said.labels is None:
            assert said.probabilities is not None
            each = about.by_class.get("test") or [None] * len(about.names)
            shares = zip(about.names, said.probabilities.tolist(), each, strict=True)
            ranked = sorted(shares, key=lambda entry: -entry[1])
            return {"answer": answer | {"classes": ranked[:12], "metric": "AUROC"}}
        # Of every block the voxel in its middle, where the page averages grey values.
        part = tuple(
            np.minimum(np.arange(-(-n // f)) * f + f // 2, n - 1)
            for n, f in zip(said.labels.shape, factors, strict=True)
        )
        dice = about.by_class.get("test") or [None] * len(about.names)
        structures = [
            {"name": name, "voxels": (said.voxels or {})[name], "ml": (said.volumes_ml or {}).get(name), "dice": score}
            for name, score in zip(about.names, dice, strict=True)
        ]
        return {"answer": answer | {"structures": structures}, "mask": packed(said.labels[np.ix_(*part)])}

    def _answer(self, volume: Volume) -> dict[str, Any] | None:
        if self.probe is None:
            return None
        normal = torch.from_numpy(normalise(volume)).float()
        image = resize(normal if self.model.config.dims == 2 else normal[None], self.probe.size)
        frozen = probes.extract(self.model, [image], 1, torch.no_grad, list)
        shares = probes.probabilities(self.probe.head(frozen), self.probe.kind)[0]
        ranked = sorted(zip(self.probe.names, shares.tolist(), strict=True), key=lambda pair: -pair[1])
        return {"task": self.probe.task, "kind": self.probe.kind, "classes": ranked[:12], "scores": self.probe.scores,
                "cases": self.probe.cases, "warnings": []}  # fmt: skip


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


def shades(volume: Volume, voxels: np.ndarray) -> dict[str, Any]:
    """Grey values as the page shows them: packed, how they are unpacked, in what units, and the first window."""
    stored, slope, middle = to_int16(voxels)
    return {"voxels": packed(stored), "slope": slope, "middle": middle, "window": window(volume, voxels),
            "units": "HU" if volume.units == "HU" else ""}  # fmt: skip


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


def training_curves(run: Path, rates: bool = False) -> dict[str, list[list[float]]]:
    """Name to [step, value] of metrics.jsonl, thinned; with `rates` a curve for each learning rate of a fine-tuning."""
    path = run / "metrics.jsonl"
    found: dict[str, list[list[float]]] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # the half-written last line of a run under way
        rate = f", lr {values.pop('lr'):g}" if rates and "lr" in values else ""
        for name, value in values.items():
            if name != "step" and isinstance(value, int | float):
                found.setdefault(name + rate, []).append([values.get("step", 0), value])
    order = sorted(found, key=lambda name: (_CURVES.index(name) if name in _CURVES else len(_CURVES), name))
    return {name: found[name][:: max(1, len(found[name]) // _POINTS)] for name in order}


def read_probe(path: Path, model: Encoder) -> Probe:
    """Read probe.safetensors; UserError where it is none or of another model."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["medformer_probe"])
            tensors = {name: file.get_tensor(name) for name in ("mean", "spread", "weight", "bias")}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"--probe {path}: not a probe.safetensors of medformer evaluate ({error})", 2) from error
    if about["width"] != model.config.width or len(about["size"]) != model.config.dims:
        raise UserError(
            f"--probe {path}: made for a {len(about['size'])}D model of width {about['width']}, this one is "
            f"{model.config.dims}D of width {model.config.width}",
            2,
        )
    head = probes.LinearProbe(last=about["last"], pool=about["pool"], lr=0.0, **tensors)
    return Probe(
        task=about["task"],
        kind=about["kind"],
        names=tuple(about["names"]),
        size=tuple(about["size"]),
        head=head,
        scores=shown_scores(about.get("scores", {})),
        cases=about.get("cases", 0),
    )


def render(viewer: Viewer, scans: Sequence[dict[str, Any]], serve: str = "", limit: int = 0) -> str:
    """The page as text; `serve` is the key that lets it upload up to `limit` bytes."""
    content = {
        "checkpoint": viewer.file.parent.name + "/" + viewer.file.name, "facts": viewer.facts, "scans": list(scans),
        "model": described(viewer.model), "near": viewer.near, "curves": viewer.curves, "serve": serve, "limit": limit,
        "flat": viewer.dims == 2, "what": "" if viewer.finetuned is None else told(viewer.finetuned.about),
    }  # fmt: skip
    title = f"medformer: {', '.join(s['name'] for s in scans) or 'drop a scan'}"
    return assemble(content, title, connect="'self'" if serve else "'none'")


def told(about: About) -> str:
    """What a model answers and how well, before it is asked."""
    names = ", ".join(about.names[:12]) + (", ..." if len(about.names) > 12 else "")
    scores, cases = shown_scores(about.scores.get("test", {})), about.cases.get("test", 0)
    return f"{about.task}: {about.kind} ({names}). On {cases} held-out cases: {scores}. Research only; no diagnosis."


def assemble(
    content: Mapping[str, Any], title: str, *, connect: str, scripts: Sequence[str] = (), allowed: str = "",
    blocks: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    """The page as text. Its policy allows its own script, by its hash, and no other.

    scripts: further files of this folder. allowed: further sources of scripts. blocks: of each id a text, found in the
    page by it.
    """
    here = resources.files("medformer.page")
    files = ("page.js", "side.js", *scripts, "table.js")
    script = "\n".join((here / name).read_text(encoding="utf-8") for name in files)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # "<" could end the script element early.
    text = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    parts = {
        "title": html.escape(title), "script": script, "connect": connect, "data": text,
        "scripts": " ".join(filter(None, (f"'sha256-{digest}'", allowed))),
        "parts": "".join(f'<script type="text/plain" id="{n}">{t}</script>\n' for n, t in (blocks or {}).items()),
    }  # fmt: skip
    page = (here / "page.html").read_text(encoding="utf-8")
    # One pass: a part that holds a mark, such as a file's name, stays as it is.
    return re.sub(rf"\{{\{{({'|'.join(parts)})\}}\}}", lambda mark: parts[mark[1]], page)


def described(model: Encoder) -> str:
    config = model.config
    if isinstance(model, medformer.ResNet):
        return f"{config.dims}D ResNet-{model.config.depth}, width {config.width}"
    if isinstance(model, medformer.SliceEncoder):
        return f"3D, slices by a 2D {type(model.encoder).__name__} of width {config.width}"
    if isinstance(model, medformer.TNT):
        levels = " in ".join(f"{level.width}" for level in model.config.levels)
        return (
            f"{config.dims}D TNT of width {levels}, {len(model.stages)} stages of {model.config.levels[-1].heads} heads"
        )
    return f"{config.dims}D, width {config.width}, {model.config.depth} blocks of {model.config.heads} heads"


def write_page(viewer: Viewer, sources: Sequence[Path], out: Path, progress: Callable[[Any], Any] = iter) -> int:
    """Read scans and write the page; returns its bytes."""
    scans = [viewer.scan(load(viewer, source), source.name) for source in progress(sources)]
    page = render(viewer, scans).encode()
    write_whole(out, lambda file: file.write(page))
    return len(page)


def load(viewer: Viewer, source: Path) -> Volume | ScanCase:
    """A scan; for a model of several channels the case in a folder, or in a zip file of one. UserError says why not."""
    if not viewer.patterns:
        return load_scan(source, viewer.dims)
    names = ", ".join(viewer.patterns)
    zipped = False
    if source.is_file():
        with open(source, "rb") as opened:
            zipped = sniff_zip(opened.read(4))
    if not (source.is_dir() or zipped):
        raise UserError(
            f"{source.name}: the model takes {names}; give the folder of a case with a file of each "
            f"({', '.join(viewer.patterns.values())}), or a .zip of it", 2,
        )  # fmt: skip
    try:
        with unpacked(str(source)) if zipped else nullcontext(source) as folder:
            return read_case(files_of_case(Path(folder), viewer.patterns, viewer.missing), viewer.dims)
    except ScanError as error:
        told = str(error).replace(MISSING_WAY, "; the model was not trained with missing ones")
        told = told.removeprefix(f"{source.name}: ")
        raise UserError(f"{source.name}: {told}") from error


def load_scan(source: Path, dims: int) -> Volume:
    """A scan, or a picture as a scan of one slice, colours as training turns them to grey; UserError says why not."""
    try:
        volume = read_volume(source, colour="grey")
    except ScanError as error:
        told = str(error)
        raise UserError(told if source.name in told else f"{source.name}: {told}") from error
    if dims == 2 and volume.voxels.shape[0] > 1:
        raise UserError(f"{source.name}: {volume.voxels.shape[0]} slices, but the checkpoint takes 2D images", 2)
    if dims == 3 and volume.voxels.shape[0] == 1:
        raise UserError(f"{source.name}: one slice, but the checkpoint takes 3D scans", 2)
    return volume
