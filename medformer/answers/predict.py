"""What a fine-tuned network says of one case: `medformer.predict`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from medformer.answers.model import About, Finetuned
from medformer.data import ScanError, Volume
from medformer.data.cases import Case, check_axes, first, network_input
from medformer.data.intensity import scaling_of
from medformer.data.resample import onto, resize
from medformer.evaluation.probes import probabilities as shares
from medformer.files import byte_count
from medformer.windows import AIR, blended, blended_bytes, live_bytes

__all__ = ["Prediction", "far_from_training", "least_memory", "predict"]

_FAR = 1.5  # times beyond the spacings of training
_BATCH = 16  # windows at a time, at most
_MIB = 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """One case's answer, on the grid and axes of the scan that was given."""

    kind: str
    names: tuple[str, ...]
    """Classes, labels, or what the number is."""
    probabilities: np.ndarray | None = None
    """(C,) of classes or labels; (1 + C, Z, Y, X) float32 with the background first, where asked for."""
    labels: np.ndarray | None = None
    """(Z, Y, X) uint8 of a segmentation: 0 background, i the i-th of `names`."""
    value: float | None = None
    """Of a regression."""
    volumes_ml: dict[str, float] | None = None
    """Of each structure; None where the scan has no millimetres."""
    voxels: dict[str, int] | None = None
    """Of each structure."""
    warnings: tuple[str, ...] = ()
    """In what the scan is far from those of training."""

    @property
    def answer(self) -> str | None:
        """The class with the highest probability."""
        if self.kind != "classes" or self.probabilities is None:
            return None
        return self.names[int(np.argmax(self.probabilities))]


def predict(
    model: Finetuned,
    volume: Volume | Sequence[Volume | None],
    *,
    max_memory: int | str = "4 GiB",
    probabilities: bool = False,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Prediction:
    """The answer of a fine-tuned network for one scan.

    >>> answer = medformer.predict(medformer.load("out/model.safetensors"), read_volume("ct.nii.gz"))  # doctest: +SKIP

    Args:
        model: of `medformer.finetune`, or `medformer.load` of its file; on any device.
        volume: a scan of `medformer.data.read_volume`; of a model of several channels one for each, None for a missing
            one. Others are brought onto the grid of the first.
        max_memory: of a segmentation, bytes or text such as "2 GiB": all that is allocated beyond model and volume. It
            decides how many windows are computed at a time, never where they lie.
        probabilities: also those of each voxel of a segmentation.
        precision: what the network computes in.

    Raises:
        TypeError: `model` has no head.
        ValueError: `max_memory` below the least that would do, which is named; or another number of channels.
        ScanError: a scan that the network cannot take.
    """
    if not isinstance(model, Finetuned):
        raise TypeError(
            f"predict: a {type(model).__name__} gives features and no answers; medformer.finetune makes one"
        )
    given: Case = (volume,) if isinstance(volume, Volume) else tuple(volume)
    about, dims = model.about, model.config.dims
    _check(about, given)
    for one in given:
        if one is not None:
            check_axes(one, dims)
    whole = first(given)
    placed: Case = tuple(None if one is None else onto(one, whole) for one in given)
    case: Case = tuple(None if one is None else one.canonical(copy=False) for one in placed)
    run = partial(torch.autocast, model.network.device.type, torch.bfloat16, enabled=precision == "bf16")
    warnings = far_from_training(about, first(case))  # on the axes of training
    model.eval()
    if not about.dense:
        with torch.inference_mode(), run():
            image = resize(torch.from_numpy(network_input(case, dims)).half(), about.size)
            out = model(image[None].float().to(model.network.device))
        found = shares(out.double().cpu(), about.kind)[0]
        if about.kind == "regression":
            return Prediction(kind=about.kind, names=about.names, value=float(found[0]), warnings=warnings)
        return Prediction(kind=about.kind, names=about.names, probabilities=found, warnings=warnings)
    moved = sum(_held(one) for one, was in zip(placed, given, strict=True) if one is not was)
    labels, each = _segment(model, case, whole, moved, _bytes(max_memory), probabilities, run)
    # A plane at a time: counting makes each label a whole number of 8 bytes.
    count = np.sum([np.bincount(plane.ravel(), minlength=len(about.names) + 1) for plane in labels], axis=0)[1:]
    voxels = dict(zip(about.names, count.tolist(), strict=True))
    ml = None
    if whole.geometry == "patient":
        ml = {name: n * abs(float(np.linalg.det(whole.affine[:3, :3]))) / 1000 for name, n in voxels.items()}
    return Prediction(
        kind=about.kind, names=about.names, labels=labels, volumes_ml=ml, voxels=voxels, warnings=warnings,
        probabilities=each,
    )  # fmt: skip


def _check(about: About, case: Case) -> None:
    if len(case) != about.count:
        wanted = f"the {about.count} channels {', '.join(about.patterns)}" if about.channels else "one scan"
        raise ValueError(f"predict: {len(case)} volumes for a model of {wanted}; give one volume a channel")
    lost = [name for name, one in zip(about.patterns, case, strict=False) if one is None]
    if lost and (not about.missing or len(lost) == about.count):
        way = "the model was not trained with missing ones (--missing)" if not about.missing else "one is the least"
        raise ScanError(f"channel {lost[0]} is missing; {way}")


def far_from_training(about: About, volume: Volume) -> tuple[str, ...]:
    """In what a scan is unlike those of training, each with both figures."""
    found = []
    if about.spacing_mm and volume.geometry != "none":
        low, middle, high = about.spacing_mm
        axes = zip(volume.spacing_mm, low, high, strict=True)
        if any(s < a / _FAR or s > b * _FAR for s, a, b in axes):
            found.append(
                f"spacing {_mm(volume.spacing_mm)} mm, in training {_mm(middle)} ({_mm(low)} to {_mm(high)}); resample "
                "the scan"
            )
    known = [m for m in about.modalities if m != "unknown"]
    if known and volume.modality not in ("unknown", *known):
        found.append(f"modality {volume.modality}, in training {', '.join(known)}")
    elif about.units and volume.units not in about.units:
        found.append(f"values in {volume.units} units, in training {', '.join(about.units)}")
    return tuple(found)


def _bytes(limit: int | str) -> int:
    try:
        return byte_count(limit)
    except ValueError as error:
        raise ValueError(f"predict: max_memory={error}") from None


def _mm(spacing: Sequence[float]) -> str:
    return "x".join(f"{mm:.3g}" for mm in spacing)


def _held(volume: Volume | None) -> int:
    """Bytes of its voxels and padding mask."""
    if volume is None:
        return 0
    return volume.voxels.nbytes + (0 if volume.valid is None else volume.valid.nbytes)


def _segment(
    model: Finetuned, case: Case, whole: Volume, moved: int, budget: int, keep: bool, run: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """Label map of a case on the axes of `whole`, and where asked each voxel's probabilities.

    case: on canonical axes. moved: bytes of sequences that were brought onto the grid.
    """
    about, dims, device = model.about, model.config.dims, model.network.device
    grid = first(case)
    size, outputs = grid.shape[3 - dims :], 1 + len(about.names)
    scalings = [None if one is None else scaling_of(one) for one in case]

    def cut(start: Sequence[int], window: Sequence[int]) -> Tensor:
        part = tuple(slice(a, a + n) for a, n in zip(start, window, strict=True))
        part = part if dims == 3 else (0, *part)
        out = torch.full((len(case), *window), AIR)
        for into, one, scaling in zip(out, case, scalings, strict=True):
            if one is None or scaling is None:
                into.fill_(torch.nan)
                continue
            found = scaling.apply(one.voxels[part], None if one.valid is None else one.valid[part])
            into[tuple(slice(0, n) for n in found.shape)] = torch.from_numpy(found)
        return out

    unit = _unit(model, len(case), run)
    fixed = _fixed(about, grid.shape, dims, keep) + moved
    if budget < fixed + unit:
        raise ValueError(
            f"predict: max_memory={-(-budget // _MIB)} MiB must be at least {-(-(fixed + unit) // _MIB)} MiB for a "
            f"scan of {'x'.join(map(str, size))} voxels and {outputs - 1} classes"
        )
    batch = int(min(_BATCH, (budget - fixed) // unit))
    labels = np.empty(whole.shape, np.uint8)
    each = np.empty((outputs, *whole.shape), np.float32) if keep else None
    into, shares_into = whole.turned(labels), None if each is None else whole.turned(each)
    planes = blended(
        model, cut, size, about.size, batch=batch, overlap=about.overlap, device=device, run=run
    )  # fmt: skip
    for z, plane in enumerate(planes):
        into[z] = plane.argmax(0).byte().cpu().numpy()
        if shares_into is not None:
            shares_into[:, z] = plane.softmax(0).cpu().numpy()
    return labels, each


def _fixed(about: About, shape: Sequence[int], dims: int, keep: bool) -> int:
    """Bytes that a scan of `shape` (Z, Y, X) takes besides its windows."""
    outputs, size = 1 + len(about.names), shape[3 - dims :]
    return 48 * _MIB + blended_bytes(size, about.size, outputs) + math.prod(shape) * (1 + 4 * outputs * keep)


def least_memory(model: Finetuned, shape: Sequence[int], *, run: Any, probabilities: bool = False) -> int:
    """The smallest `max_memory` of `predict`, in bytes, for a scan of `shape` (Z, Y, X) on one grid. run: the context
    of the network."""
    return _fixed(model.about, shape, model.config.dims, probabilities) + _unit(model, model.about.count, run)


def _unit(model: Finetuned, channels: int, run: Any) -> int:
    """Bytes of one window, measured once."""
    device, size = model.network.device, model.about.size
    key = (str(device), size, run.keywords["enabled"])
    known = model.__dict__.setdefault("window_bytes", {})
    if key not in known:
        known[key] = live_bytes(model, torch.zeros(1, channels, *size, device=device), run)
    return known[key] + 4 * channels * int(np.prod(size))
