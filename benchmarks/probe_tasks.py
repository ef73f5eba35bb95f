"""Segmentation tasks out of two labelled scans each, for `ssl/evaluate.py`, and unlabelled scans to pretrain on.

    python benchmarks/probe_tasks.py ../shared/data OUT
    python ssl/train.py --data.root OUT/ct_unlabelled --out RUN
    python ssl/evaluate.py RUN --task OUT/ct_small_to_chest.csv --fractions 1.0

Two CTs (spleen, liver, stomach, aorta, back muscles) and two FLAIR MRs (lesions of multiple sclerosis), resampled to
2 mm, each pair both ways: the lower 60% of one scan trains, the rest of it chooses the rates, the other scan is the
test. One test scan is no population: this compares a pretrained model with the same one from scratch on these scans,
and no more.
"""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.processing import resample_to_output

from medformer.data import Volume, read_volume

SPACING_MM = (2.0, 2.0, 2.0)
ORGANS = {1: 1, 5: 2, 6: 3, 52: 4, 86: 5, 87: 5}  # TotalSegmentator's numbers to those of the task
PAIRS = {
    "ct": {
        "small": ("ct/ct_small.nii.gz", "ct/ct_small_organs.nii.gz"),
        "chest": ("dicom/ct_chest_j2k", "ct/ct_chest_j2k_organs.nii.gz"),
    },
    "mr": {name: (f"mr/ms_patient{name}_FLAIR.nii.gz", f"mr/ms_patient{name}_GOLD_STANDARD.nii.gz")
           for name in ("07", "19")},
}  # fmt: skip
UNLABELLED = {
    "ct": ["ct/ct_torso_3mm.nii.gz", "ct/ct_aorta_1p5mm.nii.gz", "ct/ct_chest_1p5mm.nii.gz"],
    "mr": [f"mr/ms_patient07_{contrast}.nii.gz" for contrast in ("T1", "T1POST", "T2")] + ["mr/mr_small.nii.gz"],
}


def resampled(path: Path, order: int) -> nib.Nifti1Image:
    """The scan on a 2 mm grid along R, A and S; order 1 for grey values, 0 for labels."""
    volume: Volume = read_volume(path).canonical()
    image = nib.Nifti1Image(volume.voxels.T.astype(np.float32), volume.affine)
    return resample_to_output(image, SPACING_MM, order=order, cval=float(volume.voxels.min()))


def cases(source: Path, out: Path, kind: str) -> None:
    """Each labelled scan whole, and its lower 60% and the rest."""
    for name, (scan, mask) in PAIRS[kind].items():
        image, labels = resampled(source / scan, 1), resampled(source / mask, 0)
        found = np.asarray(labels.dataobj)
        mapped = np.zeros(found.shape, np.uint8)
        for label, number in ORGANS.items() if kind == "ct" else [(1, 1)]:
            mapped[np.rint(found) == label] = number
        cut = round(0.6 * image.shape[2])
        grey = np.rint(np.asarray(image.dataobj)).astype(np.int16)
        for part, where in {"whole": slice(None), "lower": slice(cut), "upper": slice(cut, None)}.items():
            affine = np.array(image.affine)
            affine[:3, 3] += affine[:3, 2] * (where.start or 0)
            for suffix, voxels in (("", grey), ("_mask", mapped)):
                nib.save(
                    nib.Nifti1Image(voxels[..., where], affine), out / "cases" / f"{kind}_{name}_{part}{suffix}.nii.gz"
                )


def tables(out: Path, kind: str) -> None:
    names = list(PAIRS[kind])
    for first, other in (names, names[::-1]):
        with (out / f"{kind}_{first}_to_{other}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["path", "mask", "split"])
            for name, part, split in ((first, "lower", "train"), (first, "upper", "val"), (other, "whole", "test")):
                scan = f"cases/{kind}_{name}_{part}"
                table.writerow([f"{scan}.nii.gz", f"{scan}_mask.nii.gz", split])


def main() -> int:
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_dir():
        print(__doc__, file=sys.stderr)
        return 2
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    (out / "cases").mkdir(parents=True, exist_ok=True)
    for kind in PAIRS:
        cases(source, out, kind)
        tables(out, kind)
        (out / f"{kind}_unlabelled").mkdir(exist_ok=True)
        for scan in UNLABELLED[kind]:
            shutil.copy(source / scan, out / f"{kind}_unlabelled")
    print(f"tasks in {out}: {', '.join(sorted(path.name for path in out.glob('*.csv')))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
