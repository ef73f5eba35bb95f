"""nnU-Net's trainer on weights of medformer, where nnunetv2 is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import medformer

pytest.importorskip("nnunetv2", reason="nnunetv2 is a peer where it is installed: its dependencies are many")


def trainer() -> Any:
    path = Path(__file__).parents[1] / "misc" / "nnunet_trainer.py"
    spec = importlib.util.spec_from_file_location("nnunet_trainer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.nnUNetTrainerMedformer


def test_a_network_of_the_weights_learns_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = trainer()
    cube = {"width": 24, "depth": 2, "heads": 2, "patch_size": 4, "patch_stride": 4, "patch_padding": 0}
    saved = medformer.Backbone(medformer.BackboneConfig(**cube, attention="softmax", position_grid=4))
    medformer.save(saved, tmp_path / "model.safetensors")
    monkeypatch.delenv("MEDFORMER_WEIGHTS", raising=False)
    with pytest.raises(ValueError, match="set MEDFORMER_WEIGHTS"):
        kind.build_network_architecture("", {}, [], 1, 3, False)
    monkeypatch.setenv("MEDFORMER_WEIGHTS", str(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match="1 channels of the weights must be 2"):
        kind.build_network_architecture("", {}, [], 2, 3, False)
    network = kind.build_network_architecture("", {}, [], 1, 3, False)
    assert saved.position is not None
    assert torch.equal(network.backbone.position.patches, saved.position.patches)
    made = kind.__new__(kind)
    made.network, made.initial_lr, made.weight_decay, made.num_epochs = network, 1e-3, 0.0, 10
    optimiser, schedule = made.configure_optimizers()
    made.set_deep_supervision_enabled(True)
    logits = network(torch.randn(1, 1, 16, 16, 16))
    assert logits.shape == (1, 3, 16, 16, 16)
    before = network.backbone.norm.weight.clone()
    torch.nn.functional.cross_entropy(logits, torch.zeros(1, 16, 16, 16, dtype=torch.long)).backward()
    optimiser.step()
    schedule.step(1)
    assert not torch.equal(network.backbone.norm.weight, before)
