"""What a run shows on the screen and in its picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pictures
from medformer import Backbone, BackboneConfig
from medformer.data.store.entries import Stored
from roots import Prepared
from screen import Meter, describe, duration


def stored(folder: Path, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> Stored:
    path = folder / f"{'x'.join(map(str, shape))}.npy"
    np.save(path, np.random.default_rng(0).normal(size=shape).astype(np.float16))
    scan = Stored(
        name="case", path=str(path), shape=shape, spacing_mm=spacing_mm, modality="MR", threshold=0.0, notes=()
    )
    np.save(scan.points_path, np.argwhere(np.load(path) > 1)[:50].astype(np.int32))
    return scan


@pytest.mark.parametrize("shape", [(10, 30, 20), (1, 40, 40), (50, 9, 9)])
def test_any_shape_of_scan_can_be_drawn(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(width=24, depth=1, heads=2)).eval()
    scan = stored(tmp_path, shape, (3.0, 1.0, 1.0))
    pictures.attention_picture(backbone, scan, tmp_path / "a.png", caption="Scan", limit=(32, 32, 32))
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    assert max(picture.shape) > 800
    assert picture.std() > 5


def test_without_a_terminal_the_meter_speaks_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    meter = Meter(3, 1, 8, tty=False)
    meter(6.5, 5.0)
    meter(6.0, 5.0)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1
    for words in ("step 3/3", "loss 6.450", "teacher entropy 5.00", "scans/s", "left"):
        assert words in out[0]


def test_in_a_terminal_the_meter_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("sys.stdout", screen)
    meter = Meter(2, 0, 8, tty=True)
    meter(6.5, 5.0)
    meter.say("a warning")
    meter(6.0, 5.0)
    meter.close()
    assert "2/2, loss 6.450, teacher entropy 5.00" in screen.getvalue()
    assert "\na warning\n" in screen.getvalue().replace("\r", "\n")


def test_durations_read_like_a_clock() -> None:
    assert [duration(s) for s in (5.4, 75, 3723)] == ["0:05", "1:15", "1:02:03"]


def test_synthetic_scans_are_said_to_be_synthetic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = stored(tmp_path, (8, 8, 8), (1.0, 1.0, 1.0))
    made = Stored(**{**vars(scan), "name": "synthetic/phantom-0"})
    describe(Prepared(train=[scan, made], held_out=[scan], skipped=[("x", "y")], ignored=3), True, print)
    out = capsys.readouterr().out
    assert "2 real" in out
    assert "1 synthetic CT" in out
    assert "held out" in out
    assert "3 other files ignored" in out
