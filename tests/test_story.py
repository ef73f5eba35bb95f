"""The ending table of the benchmarks."""

from __future__ import annotations

import json

import pytest

import measuring
import story
from story import Measured


def measured(implementation: str, ms: float, *, direction: str = "forward", shape: str = "N1", **rest) -> Measured:
    return Measured(
        family="performer", direction=direction, implementation=implementation, shape=shape, ms=ms, **rest
    )  # fmt: skip


RUN = [
    measured("medformer", 2.0, share_of_floor=0.25),
    measured("sdpa_exact", 1.0),  # another function
    measured("performer_pytorch", 7.0),
    measured("flash_bla", 6.0),
    measured("medformer", 9.0, direction="step"),
    measured("medformer_causal", 4.0),
    measured("performer_pytorch_causal", 8.0),
    measured("performer_pytorch", 3.0, shape="N2"),  # nothing of ours beside it
    measured("medformer", 9.5, direction="memory step", peak_mib=30.0),
]


def test_each_pass_stands_beside_the_fastest_peer_that_computes_the_same():
    plain, step, causal = story.rows(RUN)
    assert (plain.ms, plain.peer, plain.peer_ms, plain.share_of_floor) == (2.0, "flash_bla", 6.0, 0.25)
    assert (step.direction, step.ms, step.peer, step.peak_mib) == ("step", 9.0, None, 30.0)
    assert (causal.family, causal.ms, causal.peer_ms) == ("performer causal", 4.0, 8.0)


def test_forms_of_one_function_are_compared_among_themselves():
    found = story.rows(
        [
            measured("buckets_medformer", 3.0), measured("grid_medformer", 4.0), measured("grid_medformer_wide", 2.0),
            measured("buckets_transformers", 9.0), measured("grid_sdpa_dense_bias", 5.0), measured("without_bias", 1.0),
        ]
    )  # fmt: skip
    assert [(row.family, row.ms, row.peer) for row in found] == [
        ("performer buckets", 3.0, "buckets_transformers"), ("performer grid", 2.0, "grid_sdpa_dense_bias"),
    ]  # fmt: skip


def test_table_and_files_say_ratio_share_and_memory(tmp_path):
    found = story.rows(RUN)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in story.table(found).splitlines()]
    assert lines[2] == ["performer", "forward", "N1", "2.00", "flash_bla", "6.00", "3.00x", "25%", "", ""]
    assert lines[3] == ["performer", "step", "N1", "9.00", "", "", "", "", "30", ""]
    story.write(tmp_path, found, "a machine")
    assert json.loads((tmp_path / "story.json").read_text())["rows"][0]["peer"] == "flash_bla"
    assert "3.00x" in (tmp_path / "story.md").read_text()
    assert "a machine" in (tmp_path / "story.svg").read_text() or (tmp_path / "story.svg").stat().st_size > 1000


def test_floor_is_the_larger_of_work_and_bytes_at_this_machines_ceilings(monkeypatch):
    import torch

    if measuring.DEVICE.type == "cuda":
        pytest.skip("a GPU has ceilings of its own")
    monkeypatch.setattr(measuring, "ceilings", lambda dtype: (1e12, 1e10))
    assert measuring.floor_ms(torch.float32, flop=2e9, moved=1e7, exponentials=1e12) == pytest.approx(2.0)
    assert measuring.floor_ms(torch.float32, flop=2e9, moved=5e7) == pytest.approx(5.0)
