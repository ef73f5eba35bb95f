"""Settings of what a run is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medformer.data.geometry import ScanError
from medformer.data.sequences import patterns_of
from medformer.files import byte_count

__all__ = ["DataConfig"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which scans to train on."""

    root: str | None = None
    """Folder of scans (NIfTI, DICOM and more), nested and mixed with anything, one file, a zip file, or a store that
    medformer prepare made, here or on a server (http://HOST/STORE, s3://BUCKET/STORE); with --model.dims 2 of PNG,
    JPEG, TIFF and BMP images, or an .npz file with train_images; with --data.channels a folder or .csv of cases;
    several, parted by a colon (a colon in the name of a folder that exists is part of it); default: the scans that come
    with the dependencies."""
    modality: str | None = None
    """What the scans are whose files do not say, CT or MR for instance; default: one decision a folder, by its
    modality.txt, else by most of its scans' values."""
    weights: tuple[float, ...] | None = None
    """How often each of several roots is shown, relative to the others, for instance 1,2; default: by its scans."""
    cache: str | None = None
    """Folder for the stored copies (at most 2 bytes a voxel; half of it with blosc2), shared by all runs; default:
    runs/cache."""
    cache_limit: str | None = None
    """Size of the cache, 200 GB for instance; what was used longest ago is removed, except what runs use now.
    Default: none, but 100 GB (or 80% of what is free) of what is read from a server."""
    small: Literal["auto", "skip", "pad"] = "auto"
    """A scan below --views.global_size: skip it, or pad it by repeating its edge. auto: skip, but pad the built-in
    scans, unless all of them are."""
    labels: Literal["skip", "keep"] = "skip"
    """What looks like a label map lying among the scans (few whole numbers in large areas): skip it, or train on it
    too."""
    names: Literal["files", "ids"] = "files"
    """What scans are called on the screen, in skipped.txt, metrics, checkpoints and pictures: by file and folder, or by
    short ids (hashes salted by the file `salt` in --data.cache, the same in every run that shares it)."""
    channels: tuple[str, ...] = ()
    """Where a case is several files, as medformer finetune takes them: the columns that hold them (t1,t2,flair) of a
    .csv as --data.root, or NAME=PATTERN in the folder of each case below it (t1=*T1*.nii.gz,flair=*FLAIR*.nii.gz). They
    are the network's channels, in this order, on the grid of the first."""
    missing: bool = False
    """Cases may lack some of their channels: zeros, and a flag for each channel that the network sees."""
    held_out: int = 1
    """Scans kept out of training for the pictures; 0 or more. One scan alone is never held out."""

    def __post_init__(self) -> None:
        if self.held_out < 0:
            raise ValueError(f"--data.held_out {self.held_out} must be 0 or more")
        try:
            patterns_of(self.channels)
        except ScanError as error:
            raise ValueError(str(error).replace("--channels", "--data.channels", 1)) from None
        if self.cache_limit is not None:
            try:
                byte_count(self.cache_limit)
            except ValueError as error:
                raise ValueError(f"--data.cache_limit {error}") from None
        if self.modality is not None and not (self.modality.isalnum() and self.modality.isupper()):
            raise ValueError(f"--data.modality {self.modality!r} must be a word of capitals as DICOM has it, like CT")
        if self.weights is not None and not all(w > 0 for w in self.weights):
            raise ValueError(f"--data.weights {self.weights} must all be above 0")
