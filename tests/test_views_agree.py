"""Agreement of two views: all of it where nothing is changed, little where the side is random."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import views_agree


def test_views_that_are_turned_over_at_random_agree_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root := tmp_path / "scans").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        voxels = np.kron(rng.normal(0, 300, (2, 2, 2)), np.ones((8, 8, 8))) + rng.normal(0, 20, (16, 16, 16))
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.eye(4)), root / f"{i}.nii.gz")
    same = ["dino", f"--data.root={root}", f"--data.cache={tmp_path / 'cache'}", "--views.global_size=16x16x16",
            "--views.global_scale=1,1", "--views.through_plane_scale=1,1", "--views.contrast=0", "--views.gamma=0",
            "--model.width=24", "--model.depth=1"]  # fmt: skip
    shares = []
    for flip in ("0,0,0", "0.5,0.5,0.5"):
        views_agree.main([*same, f"--views.flip={flip}"])
        words = capsys.readouterr().out.split()
        shares.append(float(words[words.index("cells") + 1]))
        assert words[-1] == "0.40"
    assert shares[0] > 0.99
    assert shares[1] < 0.8
    with pytest.raises(SystemExit, match="one view"):
        views_agree.main(["igpt"])
