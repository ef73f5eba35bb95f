"""A network with its head and all that its answers need, in one file: `medformer.load` reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from medformer.channels import name_channels
from medformer.data.labels import Kind
from medformer.data.sequences import patterns_of
from medformer.evaluation.tuning import Network
from medformer.files import write_whole
from medformer.models import CONFIGS, Model, ModelConfig, as_saved, build
from medformer.windows import OVERLAP

__all__ = ["ABOUT_KEY", "About", "Finetuned", "from_tensors", "save_finetuned"]

FORMAT = 1
KIND = "Finetuned"
ABOUT_KEY = "medformer_finetuned"
BACKBONE_KEY = "medformer_backbone"


@dataclass(frozen=True, kw_only=True)
class About:
    """What a fine-tuned network was taught, how it takes a scan, and how well it did on cases held out."""

    task: str
    kind: Kind
    names: tuple[str, ...]
    """Classes or labels, of a segmentation without the background; of a regression what the number is."""
    size: tuple[int, ...]
    """Voxels (zyx) to which an image is resized, or of a window of a segmentation."""
    overlap: float = OVERLAP
    """Of the windows of a segmentation."""
    method: str = "finetune"
    """What moved: finetune, fpt, attentive or decoder (both frozen)."""
    scratch: bool = False
    """Whether it started from weights that knew nothing."""
    channels: tuple[str, ...] = ()
    """Names of several, with their patterns where they had some (NAME=PATTERN)."""
    missing: bool = False
    """Whether a case may lack some of them."""
    number: tuple[float, float] | None = None
    """Of a regression mean and standard deviation in training."""
    spacing_mm: tuple[tuple[float, float, float], ...] = ()
    """Smallest, median and largest of the training cases, zyx; empty for images without."""
    modalities: tuple[str, ...] = ()
    """Of the training cases, as far as their files tell."""
    units: tuple[str, ...] = ()
    """HU or arbitrary."""
    cases: Mapping[str, int] = field(default_factory=dict)
    """Number of train, val and test cases."""
    scores: Mapping[str, Any] = field(default_factory=dict)
    """Of the split to its metrics, each mean, low and high of a 95% interval."""
    by_class: Mapping[str, Any] = field(default_factory=dict)
    """Of the split each class's own score."""
    version: str = ""
    """Of medformer."""

    @property
    def dense(self) -> bool:
        return self.kind == "segmentation"

    @property
    def count(self) -> int:
        """Sequences of a case."""
        return max(1, len(self.channels))

    @property
    def patterns(self) -> dict[str, str]:
        """Of each channel its pattern; empty text where it has none."""
        return patterns_of(self.channels)


class Finetuned(nn.Module):
    """A backbone with its head, and what they are about. `forward` takes what the network takes and gives logits, or
    numbers; `medformer.predict` takes a scan and gives an answer."""

    def __init__(self, network: Network, about: About) -> None:
        super().__init__()
        self.network, self.about = network, about
        name_channels(network.backbone, tuple(about.patterns))

    @property
    def backbone(self) -> Model:
        return self.network.backbone

    @property
    def config(self) -> ModelConfig:
        """The backbone's."""
        return self.network.backbone.config

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, *size] to [B, classes], [B, 1] of a number, or [B, 1 + classes, *size]; NaN for a missing channel."""
        return self.network(x)


def network_of(backbone: Model, about: About) -> Network:
    """A new head for a backbone that has the channels."""
    flags = about.count if about.missing else 0
    return Network(backbone, about.method, len(about.names), about.dense, number=about.number, flags=flags)


def save_finetuned(model: Finetuned, path: Path) -> None:
    """One safetensors file, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.network.state_dict().items()}
    metadata = {
        "format": "pt", "medformer_model": KIND, BACKBONE_KEY: type(model.backbone).__name__,
        "medformer_config": json.dumps(as_saved(model.config)),
        ABOUT_KEY: json.dumps({"format": FORMAT, **asdict(model.about)}),
    }  # fmt: skip
    data = safetensors.torch.save(tensors, metadata=metadata)
    write_whole(path, lambda file: file.write(data))


def from_tensors(tensors: dict[str, Tensor], metadata: Mapping[str, str], config: ModelConfig, path: Path) -> Finetuned:
    """What `save_finetuned` wrote. Raises ValueError, naming the file, for what is not of this version."""
    about = _about(metadata.get(ABOUT_KEY, ""), path)
    with torch.random.fork_rng(devices=[]):
        network = network_of(build(config), about)
    expected = network.state_dict()
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"{name} is unknown" for name in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & tensors.keys()) if tensors[name].shape != expected[name].shape
    ]  # fmt: skip
    if problems:
        raise ValueError(
            f"medformer.load: {path} does not fit its config ({'; '.join(problems[:5])}); it was written by another "
            f"version of medformer ({about.version or 'unknown'})"
        )
    network.load_state_dict(tensors, assign=True)
    return Finetuned(network, about).eval()


def backbone_kind(metadata: Mapping[str, str]) -> type | None:
    """The type of the backbone's configuration; None for a kind that is not known."""
    return CONFIGS.get(metadata.get(BACKBONE_KEY, ""))


def _about(text: str, path: Path) -> About:
    try:
        values = json.loads(text)
        number = values.pop("format")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"medformer.load: {path} does not say what it was fine-tuned for ({error})") from error
    unknown = sorted(values.keys() - {f.name for f in fields(About)})
    if number != FORMAT or unknown:
        raise ValueError(
            f"medformer.load: {path} is of format {number} of medformer {values.get('version')}, this version reads "
            f"{FORMAT}{f' without {unknown[0]}' if unknown else ''}; install that version, or fine-tune again"
        )
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(tuple(v) if isinstance(v, list) else v for v in value)
    return About(**values)
