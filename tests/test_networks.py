"""Residual networks and TNTs through the trainer: they learn, come back, go on, and say what they cannot do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import dino
import medformer
import methods
import settings
import train
from medformer.errors import UserError
from settings import NETWORKS
from sizes import METHODS, SIZES, defaults_of

LEVELS = (
    '[{"width": 12, "heads": 2, "depth": 1, "kernel": 4, "stride": 4}, '
    '{"width": 24, "heads": 2, "depth": 1, "kernel": 2, "stride": 2}]'
)
SMALL = {
    "resnet": ["--network=resnet", "--model.depth=10", "--model.base_width=32", "--model.stages=2"],
    "tnt": ["--network=tnt", f"--model.levels={LEVELS}"],
}
KINDS = {"transformer": medformer.Backbone, "resnet": medformer.ResNet, "tnt": medformer.TNT}
BYOL = ["byol", "--views.local_views=0", "--byol.hidden=32", "--byol.projection=16"]


def arguments(trainer: Any, network: str, out: Path, *flags: str) -> list[str]:
    kept = [flag for flag in trainer.flags if not flag.startswith("--model.")]
    return [*flags, *(f for f in kept if "local_views" not in f or "byol" not in flags), *SMALL[network],
            f"--data.root={trainer.scans}", f"--out={out}"]  # fmt: skip


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("network", ["resnet", "tnt"])
@pytest.mark.parametrize("method", ["dino", "byol"])
def test_every_weight_learns(method: str, network: str, dims: int) -> None:
    flags = [*(BYOL if method == "byol" else ["dino"]), *SMALL[network], f"--model.dims={dims}", "--dino.prototypes=16"]
    sizes = [f"--views.{name}={n if dims == 3 else 1}x{n}x{n}" for name, n in (("global_size", 16), ("local_size", 8))]
    config = settings.parse([*flags, *sizes])
    torch.manual_seed(0)
    made: Any = methods.make(config, "")
    assert isinstance(made.encoder, KINDS[network])
    made.train()
    views = [torch.randn(4, 1, *(16,) * dims), *([torch.randn(2, 1, *(8,) * dims)] if config.views.local_views else [])]
    made.look(views)
    made.start()
    loss, _ = made.loss(made.student, views, 0)
    loss.backward()
    assert [name for name, p in made.student.named_parameters() if p.grad is None] == []
    made.after_step(0)
    assert math.isfinite(loss.item())


@pytest.mark.parametrize(("method", "network"), [("dino", "resnet"), ("byol", "tnt")])
def test_a_run_is_saved_and_goes_on_as_if_it_had_not_stopped(
    trainer: Any, tmp_path: Path, method: str, network: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = arguments(trainer, network, run, *(BYOL if method == "byol" else ["dino"]))
    assert train.main([*flags, "--steps=4"]) == 0
    whole, model = trainer.losses(run), medformer.load(run / "backbone.safetensors")
    assert type(model) is KINDS[network]
    assert settings.parse([f"--config={run / 'config.yaml'}"]) == settings.parse([*flags[:-1], "--steps=4"])
    (run / "checkpoints" / "step-00000004.pt").unlink()
    assert train.main([f"--resume={run}"]) == 0
    assert trainer.losses(run) == whole
    again: Any = medformer.load(run / "backbone.safetensors")
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    assert train.main([f"--resume={run}", "--network=transformer"]) == 2
    assert f"another model, its --network is {network} and not transformer" in capsys.readouterr().err


def test_a_teacher_has_batch_statistics_of_its_own() -> None:
    config = settings.parse([*SMALL["resnet"], "--model.norm=batch", "--dino.prototypes=16", "--views.local_views=0"])
    made: Any = methods.make(config, "").train()
    assert isinstance(made, dino.Dino)
    mean = made.teacher.backbone.bn1.running_mean.clone()
    made.loss(made.student, [torch.randn(4, 1, 16, 16, 16) + 1], 0)
    assert not made.teacher.training
    assert not torch.equal(made.teacher.backbone.bn1.running_mean, mean)
    kept = made.teacher.backbone.bn1.running_mean.clone()
    made.after_step(0)
    assert torch.equal(made.teacher.backbone.bn1.running_mean, kept)
    made.eval()
    assert not made.teacher.backbone.bn1.training


def preset(method: str, network: str, size: str, dims: int) -> dict[str, Any]:
    """As the parser puts them together, which takes it a third of a second each."""
    values: dict[str, Any] = {"method": method, "network": network, "size": size, "model.dims": dims}
    if network == "transformer":
        values |= settings.flat({"model": settings.as_dict(settings.TrainConfig().model)}) | {"model.dims": dims}
    nested: dict[str, Any] = {}
    for name, value in (values | defaults_of(method, size, dims, network)).items():
        owner, _, field = name.rpartition(".")
        (nested.setdefault(owner, {}) if owner else nested)[field] = value
    return nested


@pytest.mark.parametrize("network", NETWORKS)
def test_no_preset_is_impossible(network: str) -> None:
    for method in METHODS if network == "transformer" else ("dino", "byol"):
        for size in SIZES:
            for dims in (2, 3):
                config = settings.from_dict(preset(method, network, size, dims))
                assert type(config.model) is NETWORKS[network]
                assert settings.from_dict(settings.as_dict(config)) == config
    assert settings.parse(["byol", f"--network={network}", "--size=tiny"]) == settings.from_dict(
        preset("byol", network, "tiny", 3)
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["igpt", "--network=resnet"], "igpt needs a causal transformer"),
        (["--network=unet"], "--network unet must be one of transformer, resnet, tnt"),
        (["--network=resnet", "--model.heads=3"], "unknown flag --model.heads"),
        (["--network=resnet", "--model.base_width=33"], "--model.base_width=33 must be a multiple of 32"),
        (["--network=resnet", "--views.cutmix=0.1"], "--views.cutmix 0.1 needs dino or byol"),
        (["--network=resnet", "--dino.masked_patches=1"], "which only --network transformer has"),
        (["--network=resnet", "--model.norm=batch", "--batch_size=1"], "BatchNorm needs 2 or more scans"),
        (["--network=tnt", '--model.levels=[{"width": 12}]'], "--model.levels has 1 entries"),
        (
            ["--network=tnt", "--views.local_views=2", "--views.local_size=2x2x2"],
            "--views.local_size 2x2x2: TNT: level 1: a window",
        ),
    ],
)
def test_what_does_not_go_is_one_line(flags: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        settings.parse(flags)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
