"""The cost model counts what happens, and its figures follow from what it counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import cost
from cost import Counted, Machine, counting, estimate

MACHINE = Machine(name="test", peak=1e12, memory=1e9, inside=1e9, between=1e8, gpus=2, reached=0.5, latency=1e-5)
WORK = Counted(operations=1e11, kept=3 * 10**8, trained=4 * 10**8, average=4 * 10**8, largest=10**7, exchanges=3)


class Method(nn.Module):
    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student


def test_operations_and_kept_bytes_of_two_linear_layers() -> None:
    method = Method(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)))
    x = torch.randn(5, 8)
    with counting(method) as found:
        method.student(x).sum().backward()
    # Forward; backward by the weights of both, and by the input of the second alone.
    assert found.operations == 2 * 5 * (8 * 16 + 16 * 4) * 2 + 2 * 5 * 16 * 4
    assert found.kept == 4 * 5 * (8 + 16)
    assert found.trained == 4 * (8 * 16 + 16 + 16 * 4 + 4)


def test_operations_of_a_backbone_follow_from_its_shape() -> None:
    import medformer

    width, hidden, depth, features, tokens = 48, 192, 2, 64, 8 + 5
    model = medformer.Backbone(
        medformer.BackboneConfig(
            width=width, depth=depth, heads=3, patch_stride=8, patch_padding=0, num_features=64, position_grid=2
        )
    )
    with counting(Method(model)) as found:
        model.forward_features(torch.zeros(2, 1, 16, 16, 16))
    block = 2 * tokens * (4 * width**2 + 2 * width * hidden) + 8 * tokens * features * width
    assert found.operations == pytest.approx(2 * (depth * block + 2 * 8 * 512 * width), rel=0.02)
    assert found.largest == 4 * sum(p.numel() for p in model.blocks[0].parameters())


def test_batch_norms_over_processes_exchange_twice_a_pass() -> None:
    from peers import SyncBatchNorm

    method = Method(nn.Sequential(nn.Linear(8, 4), SyncBatchNorm(4)))
    with counting(method) as found:
        method.student(torch.randn(5, 8)).sum().backward()
        with torch.no_grad():
            method.student(torch.randn(5, 8))
    assert found.exchanges == 3 + 4 + 2


def test_one_gpu_sends_nothing() -> None:
    for parallel in ("ddp", "fsdp2"):
        found = estimate(WORK, MACHINE, 1, parallel=parallel)
        assert found.sent == found.exposed == 0
        assert found.seconds == pytest.approx(1e11 / 5e11)


def test_gradients_travel_behind_backward_until_the_link_is_too_slow() -> None:
    inside = estimate(WORK, MACHINE, 2)
    assert inside.sent == 4e8  # 2 (N - 1) / N of 400 MB
    # 0.4 s on the link, of which two thirds of 0.2 s are hidden.
    assert inside.exposed == pytest.approx(0.4 - 0.2 * 2 / 3 + 3e-5)
    between = estimate(WORK, MACHINE, 64)
    assert between.exposed == pytest.approx(2 * 63 / 64 * 4e8 / 1e8 - 0.2 * 2 / 3 + 3 * 1e-5 * 6)
    assert estimate(WORK, MACHINE, 64, accumulate=4).exposed == pytest.approx(between.exposed)


def test_sharding_divides_states_and_sends_twice_as_much() -> None:
    ddp, sharded = (estimate(WORK, MACHINE, 8, parallel=p) for p in ("ddp", "fsdp2"))
    assert ddp.parts["states"] == 8 * sharded.parts["states"] == 4 * 4e8 + 4e8
    assert sharded.sent == 2 * ddp.sent
    assert sharded.memory < ddp.memory / 2


def test_the_table_marks_what_does_not_fit() -> None:
    text = cost.table(WORK, 64, accumulate=1, scans=8)
    assert text.count("A100-80G") == text.count("H100-80G") == 3
    assert "does not fit" not in text
    big: Any = Counted(operations=1e15, kept=10**11, trained=10**9)
    assert cost.table(big, 64, accumulate=1, scans=8).count("does not fit") == 6
