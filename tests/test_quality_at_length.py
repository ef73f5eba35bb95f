"""The bed of recall at length: what it paints, what it teaches, what its table says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import quality_at_length as bed


def test_every_query_can_be_answered_from_the_volume() -> None:
    volumes = bed.Volumes(4, 3, distance=0.5)
    volume, queries, values = volumes.draw(2, torch.Generator().manual_seed(0))
    assert volume.shape == (2, 1, 16, 16, 16)
    patches = volume.unfold(2, 4, 4).unfold(3, 4, 4).unfold(4, 4, 4).reshape(2, 64, 64)  # tokens as a backbone has them
    pairs = (patches[..., None, 32:] == volumes.values).all(-1).any(-1)
    assert pairs.sum(1).tolist() == [3, 3]
    for patch, held, asked, value in zip(patches, pairs, queries, values, strict=True):
        where = torch.nonzero(held).flatten()
        for token, answer in zip(asked.tolist(), value.tolist(), strict=True):
            assert torch.equal(patch[token, 32:], volumes.ask)
            match = where[torch.cdist(patch[token, :32][None], patch[where, :32])[0].argmin()]
            assert torch.equal(patch[match, :32], patch[token, :32])
            assert torch.equal(patch[match, 32:], volumes.values[answer])
            places = [torch.tensor([at // 16, at // 4 % 4, at % 4]) for at in (token, int(match))]
            assert (places[0] - places[1]).abs().max() >= 2


@pytest.mark.parametrize("kind", ["softmax", "performer", "performer alike gate", "relu alike gate"])
def test_one_empty_token_counted_answers_as_the_whole_volume(kind: str) -> None:
    whole, distinct = bed.Volumes(4, 3, 0.0), bed.Volumes(4, 3, 0.0, distinct=True)
    torch.manual_seed(0)
    model = bed.network(kind, 4, width=16, depth=2, heads=2).double()
    seen = []
    for volumes in (whole, distinct):
        volume, queries, values = volumes.draw(2, torch.Generator().manual_seed(0))
        if volumes.distinct:
            assert volumes.counts.tolist() == [49] + [1] * 15
            assert volume.shape == (2, 1, 4, 4, 64)
            bed.count_keys(model, volumes.counts)
        logits = bed.answered(model, volume.double(), queries)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), values.flatten())
        seen.append((logits, values, *torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)))
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_more_than_the_volume_holds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--load 20: 20 pairs and 4 queries of each need more than 4\^3 tokens"):
        bed.Volumes(4, 20, 0.0)


def arguments(monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", ["quality_at_length.py", *argv])
    bed.main()


def test_attention_learns_to_recall_and_a_run_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "recall.jsonl"
    given = ["--out", str(out), "--sides", "4", "--seeds", "1", "--rates", "3e-3", "--load", "2",
             "--step_tokens", "1024", "--queries", "512"]  # fmt: skip
    arguments(monkeypatch, *given, "--kinds", "softmax,none", "--steps", "250")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["softmax", "none"]
    assert rows[0]["test"] > 0.9
    assert rows[1]["test"] < 0.15  # chance is 1 in 16
    arguments(monkeypatch, *given, "--kinds", "softmax,none", "--steps", "250")
    assert len(out.read_text().splitlines()) == 2
    capsys.readouterr()
    arguments(monkeypatch, "--table", str(out), "--plot", str(tmp_path / "recall.svg"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| softmax | 64 | 2 | ")
    assert (tmp_path / "recall.svg").stat().st_size > 1000


@pytest.mark.parametrize("kind", bed.KINDS)
def test_every_kind_answers_and_learns(kind: str) -> None:
    model = bed.network(kind, 4, width=16, depth=1, heads=2)
    volume, queries, values = bed.Volumes(4, 2, 0.0).draw(1, torch.Generator().manual_seed(0))
    logits = bed.answered(model, volume, queries)
    assert logits.shape == (1, 8, 16)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), values.flatten()).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "qkv" in name and kind != "none")


def test_the_rate_is_the_best_on_validation_volumes_of_the_first_seed() -> None:
    bed_of = {"load": 2, "distance": 0.0, "steps": 9, "step_tokens": 512, "width": 64, "depth": 2, "heads": 2}
    row = {"kind": "softmax", "tokens": 64, "step_seconds": 0.1, **bed_of}
    runs = [(0, 1e-3, 0.8, 0.1), (0, 3e-3, 0.7, 0.9), (1, 1e-3, 0.2, 0.3), (1, 3e-3, 0.9, 0.9)]
    rows = [{**row, "seed": s, "rate": r, "validation": v, "test": t} for s, r, v, t in runs]
    rows = [{**row, "distinct": False, "read": "all"} for row in rows]
    rows.append({**rows[0], "steps": 99, "test": 1.0})  # another bed
    assert (
        bed.table(rows).splitlines()[-2]
        == "| softmax | 64 | 2 | 2 | 9 | all | 0.200 (0.100 to 0.300 of 2) |  | 0.10 | 0.001 |"
    )


def test_an_unknown_kind_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        arguments(monkeypatch, "--out", "x.jsonl", "--kinds", "linear")
    assert "--kinds linear: not one of softmax" in capsys.readouterr().err


def test_kinds_that_look_at_places_are_refused_with_distinct(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        arguments(monkeypatch, "--out", "x.jsonl", "--distinct", "--kinds", "softmax,blocks,nystrom 64,hopfield")
    assert "--distinct: blocks, nystrom 64, hopfield look at places" in capsys.readouterr().err


def test_keys_are_hidden_and_exact_attention_is_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [bed.Volumes(4, 3, 0.0, distinct=True, read=read).counts.tolist() for read in ("all", "painted", "pairs")]
    assert counts == [[49] + [1] * 15, [0] + [1] * 15, [0] + [1] * 3 + [0] * 12]
    out = tmp_path / "recall.jsonl"
    arguments(monkeypatch, "--out", str(out), "--sides", "4", "--seeds", "1", "--rates", "3e-3", "--load", "3",
              "--steps", "2", "--queries", "24", "--step_tokens", "32", "--distinct", "--read", "painted",
              "--swap", "8,16", "--kinds", "softmax,performer")  # fmt: skip
    softmax, performer = (json.loads(line) for line in out.read_text().splitlines())
    assert set(softmax["swapped"]) == {"query", "key", "sum", "8", "16"}
    assert softmax["read"] == "painted"
    assert (performer["swapped"], performer["elsewhere"]) == ({}, {})


def test_networks_are_asked_at_lengths_they_have_not_seen() -> None:
    args = bed.argparse.Namespace(distinct=True, read="all", load=3, distance=0.0, queries=24)
    model = bed.network("performer", 4, width=16, depth=1, heads=2)
    assert set(bed.elsewhere(model, 16, 2, args)) == {"512", "32768"}
