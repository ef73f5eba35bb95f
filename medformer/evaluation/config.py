"""Settings of a downstream evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["DownstreamConfig"]


@dataclass(frozen=True, kw_only=True)
class DownstreamConfig:
    """Downstream evaluation of a checkpoint."""

    task: str
    """.npz in MedMNIST's layout, or a .csv with the column path and label, mask or one column a label."""
    labels: list[str] = field(default_factory=list)
    """Columns of a .csv that are labels (0, 1, empty); default: those that hold nothing else."""
    value: str | None = None
    """Column of a .csv that is a number to predict, for example age; default: a column called value."""
    channels: list[str] = field(default_factory=list)
    """Where a case is several files: the columns that hold them (t1,t2,flair), or NAME=PATTERN in the folder path."""
    missing: bool = False
    """Cases may lack some of their channels."""
    names: Literal["files", "ids"] | None = None
    """What cases are called on the screen and in results.json: files or short ids; default: as the run's config."""
    outside: bool = False
    """Absolute paths in a .csv may lead out of its folder."""
    methods: list[str] = field(default_factory=list)
    """Any of knn, linear, attentive, fpt, finetune, untrained, scratch, resnet; for masks linear, decoder, finetune,
    untrained, scratch, unet; default: all. resnet and unet are small peers from scratch."""
    fractions: list[float] = field(default_factory=lambda: [0.01, 0.1, 1.0])
    """Shares of the training labels, each above 0 and at most 1."""
    shots: list[int] = field(default_factory=list)
    """Labelled cases a class, instead of --fractions."""
    scale: Literal["auto", "quick", "full"] = "auto"
    """quick: minutes on a CPU. full: for a GPU. auto: by the device. Sets what is not given of the next five."""
    steps: int | None = None
    """Optimiser steps of each trained method [quick 150, full 2000]."""
    batch_size: int | None = None
    """Cases a step [quick 32, full 64]."""
    lrs: list[float] | None = None
    """Learning rates tried for each trained method [quick 1e-4 4e-4 1.6e-3, full 3e-5 1e-4 3e-4 1e-3 3e-3]."""
    seeds: int | None = None
    """Repeats: other labelled cases, other weights of heads and of scratch [quick 3, full 5]."""
    probe_steps: int | None = None
    """Optimiser steps of the linear sweep [quick 300, full 3000]."""
    size: list[int] = field(default_factory=list)
    """Voxels (zyx) to which every image is resized, or of a crop for masks; default: as the checkpoint was trained."""
    split_seed: int = 0
    """Of the splits that the task does not name."""
    pretraining: str | None = None
    """Folder or .npz that the checkpoint was trained on, for the leak check; default: as its config.yaml says."""
    leaks: Literal["drop", "keep"] = "drop"
    """What becomes of held-out cases that training has seen: out of the test, or only reported."""
    scratch_of: str | None = None
    """Folder of another checkpoint's evaluation, of the same architecture, task and settings, whose results of scratch
    and untrained are taken, not computed again."""
    resamples: int = 2000
    """Bootstrap resamples of an interval."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16"] | None = None
    """What networks compute in; heads of frozen features always in fp32 [a CPU fp32, a GPU bf16]."""
    out: str | None = None
    """Folder of the results; a stopped evaluation goes on in its own. Default: runs/eval-<checkpoint>-<task>."""

    def __post_init__(self) -> None:
        for value in self.fractions:
            if not 0 < value <= 1:
                raise ValueError(f"--fractions {value:g} must be above 0 and at most 1")
        for name in ("steps", "batch_size", "seeds", "probe_steps", "resamples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} {value} must be at least 1")
        for name in ("shots", "size"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"--{name} {getattr(self, name)} must be whole numbers of at least 1")
        if self.lrs is not None and (not self.lrs or min(self.lrs) <= 0):
            raise ValueError(f"--lrs {self.lrs} must be one or more rates above 0")
        if not self.fractions and not self.shots:
            raise ValueError("--fractions is empty; give at least one, or --shots")
