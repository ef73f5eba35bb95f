"""Settings of a fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from medformer.files import byte_count

__all__ = ["SCALES", "FinetuneConfig"]

SCALES = {
    "quick": {"steps": 300, "batch_size": 16, "lrs": [4e-4, 1.6e-3]},
    "full": {"steps": 4000, "batch_size": 32, "lrs": [1e-4, 3e-4, 1e-3]},
}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tuning of a checkpoint on labelled cases."""

    task: str
    """.csv with the column path and label, mask, value or one column a label; or .npz in MedMNIST's layout."""
    labels: list[str] = field(default_factory=list)
    """Columns of a .csv that are labels (0, 1, empty); default: those that hold nothing else."""
    value: str | None = None
    """Column of a .csv that is a number to predict, for example age; default: a column called value."""
    channels: list[str] = field(default_factory=list)
    """Where a case is several files: the columns that hold them (t1,t2,flair), or NAME=PATTERN in the folder path."""
    missing: bool = False
    """Cases may lack some of their channels."""
    class_names: list[str] = field(default_factory=list)
    """Names of the structures 1, 2, ... of label maps."""
    names: Literal["files", "ids"] | None = None
    """What cases are called in every file: files or short ids; default: as the run's config."""
    outside: bool = False
    """Absolute paths in a .csv may lead out of its folder."""
    train: Literal["whole", "fpt", "frozen"] = "whole"
    """What learns besides the head: all, norms and input (FPT), or nothing."""
    from_scratch: bool = False
    """Start from new weights of the same architecture: the fair baseline."""
    layout: str | None = None
    """Of public weights: what `medformer.load_pretrained` calls it; default: recognised."""
    dims: Literal[2, 3] | None = None
    """Of public weights: 3 inflates those of images."""
    scale: Literal["auto", "quick", "full"] = "auto"
    """quick: minutes on a CPU. full: for a GPU. auto: by the device. Sets what is not given of the next three."""
    steps: int | None = None
    """Optimiser steps for each learning rate, at most [quick 300, full 4000]."""
    batch_size: int | None = None
    """Cases or crops a step, over all processes [quick 16, full 32]."""
    lrs: list[float] | None = None
    """Learning rates tried; the best on the validation cases is kept [quick 4e-4 1.6e-3, full 1e-4 3e-4 1e-3]."""
    checks: int = 10
    """Times the validation cases are scored in a training."""
    patience: int = 4
    """Checks without a better score after which a training ends."""
    size: list[int] = field(default_factory=list)
    """Voxels (zyx) to which every image is resized, or of a crop for masks; default: as the checkpoint was trained."""
    overlap: float = 0.375
    """Of the windows with which scans are segmented, at least, 0 to below 1."""
    split_seed: int = 0
    """Of the splits that the task does not name."""
    seed: int = 0
    """Of the head, of the batches, and of new weights."""
    pretraining: str | None = None
    """Folder or .npz that the checkpoint was trained on, to report overlap; default: as its config.yaml says."""
    maps: bool = True
    """Write the label maps of validation and test cases."""
    max_memory: str = "4 GiB"
    """For the prediction of a scan."""
    resamples: int = 2000
    """Bootstrap resamples of an interval."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16"] | None = None
    """What networks compute in [a CPU fp32, a GPU bf16]."""
    out: str | None = None
    """Folder of the results; a stopped fine-tuning goes on in its own. Default: runs/finetune-<checkpoint>-<task>."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checks", "patience", "resamples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} {value} must be at least 1")
        if any(value < 1 for value in self.size):
            raise ValueError(f"--size {self.size} must be whole numbers of at least 1")
        if self.seed < 0 or self.split_seed < 0:
            name = "seed" if self.seed < 0 else "split_seed"
            raise ValueError(f"--{name} {getattr(self, name)} must be at least 0")
        for name in ("class_names", "labels"):
            given = getattr(self, name)
            if twice := [one for i, one in enumerate(given) if one in given[:i]]:
                raise ValueError(f"--{name} {','.join(given)}: {twice[0]} is there twice; name each once")
        if self.missing and len(self.channels) < 2:
            raise ValueError("--missing true: a case of one file lacks none; name several with --channels")
        try:
            byte_count(self.max_memory)
        except ValueError as error:
            raise ValueError(f"--max_memory {error}") from error
        if self.lrs is not None and (not self.lrs or min(self.lrs) <= 0):
            raise ValueError(f"--lrs {self.lrs} must be one or more rates above 0")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"--overlap {self.overlap} must be at least 0 and below 1")
