"""The trainer from its command line: what it leaves, what it refuses, and that gradient accumulation is exact."""

from __future__ import annotations

import math
import re
import resource
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from torch.utils._pytree import tree_leaves

import dino
import loop
import medformer
import methods
import replay
import runs
import settings
import train
from medformer.errors import UserError
from medformer.schedules import cosine
from settings import TrainConfig


def test_a_run_leaves_everything_it_promises(trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (trainer.scans / "broken.nii").write_bytes(b"broken" * 100)
    try:
        assert trainer(run, "--steps=3", picture=True) == 0
    finally:
        (trainer.scans / "broken.nii").unlink()
    said = capsys.readouterr().out
    backbone = medformer.load(run / "backbone.safetensors")
    assert backbone(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 24)
    assert (run / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").iterdir())
    assert [line["step"] for line in trainer.lines(run)] == [0, 1, 2]
    assert {"loss", "teacher_entropy", "kl", "lr", "momentum", "teacher_temp"} <= trainer.lines(run)[0].keys()
    waits = [(line["data_wait_s"], line["save_wait_s"]) for line in trainer.lines(run)]
    assert all(data > 0 for data, _ in waits)
    assert [save > 0 for _, save in waits] == [False, False, True]  # of the save after the second step
    assert [path.name for path in runs.checkpoints(run)] == ["step-00000002.pt", "step-00000003.pt"]
    for words in ("held out", "1 skipped", "broken.nii", "ln K", f"--resume {run}", "medformer.load", "tensorboard"):
        assert words in said
    assert "broken.nii" in (run / "skipped.txt").read_text()
    state = torch.load(runs.checkpoints(run)[-1], weights_only=True)
    weights = {k.removeprefix("teacher.backbone."): v for k, v in state["method"].items() if "teacher.backbone" in k}
    assert all(torch.equal(weights[name], value) for name, value in backbone.state_dict().items())


def test_saved_config_is_a_config_file_for_the_same_run(trainer: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert trainer(run, "--steps=1", "--optim.lr=0.002") == 0
    config = settings.parse([f"--config={run / 'config.yaml'}"])
    assert config.optim.lr == 0.002
    assert config.views.global_size == (16, 16, 16)
    assert settings.parse([*trainer.flags, f"--data.root={trainer.scans}", "--steps=1", "--optim.lr=0.002"]) == config
    assert settings.parse([f"--config={run / 'config.yaml'}", "--steps=9"]).steps == 9


def test_help_explains_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help-all"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    flat = settings.flat(settings.as_dict(TrainConfig()))
    assert "[dino|byol|igpt]" in text
    for name in sorted(flat.keys() - {"method"}):
        entry = " ".join(text.split(f"  --{name} ", 1)[1].split("\n  --", 1)[0].split())
        assert "default: " in entry, name
        assert len(entry.split("(type")[0].split()) > 4, name


def test_help_of_a_method_leaves_out_the_others_and_follows_the_size(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["byol", "--size=small", "--help-all"])
    text = capsys.readouterr().out
    assert "--byol.hidden" in text
    assert "default: 4096)" in text
    assert "--dino." not in text
    assert "--igpt." not in text


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--optm.lr=1"], 2, "unknown flag --optm.lr: did you mean --optim.lr?"),
        (["--batch-size", "3"], 2, "unknown flag --batch-size: did you mean --batch_size?"),
        (["--steps=many"], 2, "--steps"),
        (["--steps=0"], 2, "--steps 0 must be at least 1"),
        (["--views.global_size=16x16"], 2, "--views.global_size"),
        (["--views.global_size=4x16x16"], 2, "--views.global_size 4x16x16 is below --model.patch_size 8x8x8"),
        (["--model.heads=5"], 2, "--model.heads=5 must divide width=24"),
        (["--model.dims=2"], 2, "--views.global_size 16x16x16: --model.dims 2 takes views of one slice; use 1x16x16"),
        (["--size=huge"], 2, "--size"),
        (["byol"], 2, "--views.local_views 1: byol has no local views; use 0"),
        (["byol", "--views.local_views=0", "--byol.norm=batch", "--batch_size=1"], 2, "BatchNorm needs 2 or more"),
        (["byol", "--views.local_views=0", "--byol.norm=sync", "--batch_size=1"], 2, "--byol.norm sync with 1 scan"),
        (["--dino.norm=batch", "--batch_size=1"], 2, "--dino.norm batch with 1 scan a step: BatchNorm needs 2 or more"),
        (["--dino.masked_patches=1"], 2, "needs --model.mask_token true"),
        (["--views.cutmix=0.1", "--batch_size=1"], 2, "--views.cutmix 0.1 needs"),
        (["--data.weights=1,2"], 2, "2 numbers for 1 roots"),
        (["--replay=nowhere.pt"], 1, "--replay nowhere.pt"),
        (["--precision=fp16"], 2, "--precision fp16 needs a GPU"),
        (["--device=gpu"], 2, "--device gpu"),
        (["--config=nowhere.yaml"], 2, "nowhere.yaml"),
        (["--resume=nowhere"], 2, "--resume nowhere: no such run"),
        (["simclr"], 2, "simclr"),
        (["--data.root=nowhere"], 1, "--data.root nowhere: no such folder"),
        (["--views.global_size=99x16x16"], 1, "22x18x20 voxels (zyx) is below --views.global_size 99x16x16"),
    ],
)
def test_a_mistake_is_one_line_with_its_exit_code(
    trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, words: str
) -> None:
    assert trainer(tmp_path / "run", *flags) == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert words in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_in_a_config_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"optim": {"learning_rate": 1.0}}))
    assert train.main([f"--config={tmp_path / 'c.yaml'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert "learning_rate" in error
    assert len(error.splitlines()) == 1


def test_a_folder_that_holds_a_run_is_not_overwritten(
    trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trainer(tmp_path / "run", "--steps=1") == 0
    assert trainer(tmp_path / "run", "--steps=1") == 2
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().err


def test_accumulated_micro_batches_train_like_one_batch(trainer: Any, tmp_path: Path) -> None:
    assert trainer(tmp_path / "whole", "--steps=4", "--batch_size=4") == 0
    assert trainer(tmp_path / "halves", "--steps=4", "--batch_size=2", "--accumulate=2") == 0
    assert trainer.losses(tmp_path / "halves") == pytest.approx(trainer.losses(tmp_path / "whole"), rel=1e-5)
    a, b = (medformer.load(tmp_path / name / "backbone.safetensors") for name in ("whole", "halves"))
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


ALONE = ("--dino.norm=none", "--dino.koleo=0", "--byol.koleo=0")  # for one scan a step


@pytest.mark.parametrize("method", ["dino", "byol", "igpt"])
def test_a_dry_run_measures_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(replay, "_LONG_S", 0.0 if method == "byol" else 60.0)
    crop = "--views.global_size=16x16x16" if method != "igpt" else "--views.global_size=12x12x12"
    assert train.main([method, "--dry_run", "--gpus=4", "--batch_size=1", crop, *ALONE]) == 0
    said = capsys.readouterr().out
    assert ("s a step (the first, alone)," in said) is (method == "byol")
    (line,) = (line for line in said.splitlines() if line.startswith("memory: "))
    most, before = (float(part) for part in re.findall(r"\d+\.\d+", line))
    assert most >= before > 0.1
    predicted = [row.split() for row in said.splitlines() if row.startswith("this machine")]
    assert [row[2] for row in predicted] == ["1", "2"]
    assert before < float(predicted[0][-2]) < before + 2
    assert list(tmp_path.iterdir()) == []


BYOL = ["byol", "--views.local_views=0", "--byol.hidden=32", "--byol.projection=16"]
IGPT = [
    "igpt", "--views.local_views=0", "--igpt.colours=16", "--igpt.patch=4x4x4", "--igpt.fit_steps=2",
    "--views.global_views=1",
]  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision=bf16"], ["--checkpoint_activations"], ["--model.attention=softmax"],
        ["--dino.balance=sinkhorn", "--dino.koleo=0.1", "--dino.masked_patches=1", "--model.mask_token=true"],
        ["--views.cutmix=0.12", "--views.rotate=10,5,5", "--views.elastic=1", "--views.bias=0.3", "--views.coarse=2"],
        ["--optim.agc=0.01", "--optim.layer_decay=0.9", "--optim.patch_lr=0.2"],
        BYOL, [*BYOL, "--byol.norm=batch", "--views.cutmix=0.12"], [*BYOL, "--optim.name=adamw", "--precision=bf16"],
        IGPT, [*IGPT, "--igpt.objective=bert", "--igpt.order=morton"], [*IGPT, "--model.attention=softmax"],
    ],
)  # fmt: skip
def test_variants_train(trainer: Any, tmp_path: Path, flags: list[str]) -> None:
    assert trainer(tmp_path / "run", "--steps=2", *flags) == 0
    assert all(math.isfinite(loss) for loss in trainer.losses(tmp_path / "run"))


def test_activation_checkpointing_changes_no_loss(trainer: Any, tmp_path: Path) -> None:
    assert trainer(tmp_path / "plain", "--steps=2", "--model.drop_path=0.3", "--model.depth=2") == 0
    flags = ("--steps=2", "--model.drop_path=0.3", "--model.depth=2", "--checkpoint_activations")
    assert trainer(tmp_path / "again", *flags) == 0
    assert trainer.losses(tmp_path / "plain") == trainer.losses(tmp_path / "again")


def states_of(run: Path) -> list[dict[str, Any]]:
    return [torch.load(path, weights_only=True) for path in runs.checkpoints(run)]


EVERY_STEP = ("--steps=4", "--save_every=1", "--keep=9")


@pytest.mark.parametrize(
    ("flags", "average", "averaged"),
    [(["--dino.freeze_last=2"], "teacher", {"backbone", "head"}), (BYOL, "target", {"backbone", "projector"})],
)
def test_the_average_follows_the_new_weights_and_all_rates_their_schedules(
    trainer: Any, tmp_path: Path, flags: list[str], average: str, averaged: set[str]
) -> None:
    run = tmp_path / "run"
    assert trainer(run, *EVERY_STEP, "--optim.layer_decay=0.5", "--optim.final_weight_decay=0.4", *flags) == 0
    states, lines = states_of(run), trainer.lines(run)
    for step in range(1, 4):
        old, new = states[step - 1]["method"], states[step]["method"]
        pairs = {n: n.replace("student", average) for n, value in new.items() if value.is_floating_point()}
        pairs = {mine: other for mine, other in pairs.items() if mine.startswith("student") and other in new}
        assert {name.split(".")[1] for name in pairs} == averaged
        for mine, other in pairs.items():
            followed = torch.lerp(old[other], new[mine], 1 - lines[step]["momentum"])
            torch.testing.assert_close(new[other], followed, rtol=1e-5, atol=1e-7)
    assert [line["momentum"] for line in lines] == pytest.approx([cosine(s, 4, 0.99, 1.0) for s in range(4)])
    assert [line["lr"] for line in lines] == pytest.approx([cosine(s, 4, 5e-4, 1e-6) for s in range(4)])
    assert [line["weight_decay"] for line in lines] == pytest.approx([cosine(s, 4, 0.04, 0.4) for s in range(4)])
    for state, line in zip(states, lines, strict=True):
        groups = state["optimiser"]["param_groups"]
        assert {group["lr_scale"] for group in groups} == {0.25, 0.5, 1.0}
        assert {group["decay"] for group in groups} == {False, True}
        for group in groups:
            assert group["lr"] == pytest.approx(line["lr"] * group["lr_scale"])
            assert group["weight_decay"] == pytest.approx(line["weight_decay"] if group["decay"] else 0.0)


def test_prototypes_are_held_in_a_run_as_long_as_asked(trainer: Any, tmp_path: Path) -> None:
    assert trainer(tmp_path / "run", *EVERY_STEP, "--dino.freeze_last=2") == 0
    held = [state["method"]["student.head.prototypes"] for state in states_of(tmp_path / "run")]
    assert [torch.equal(a, b) for a, b in pairwise(held)] == [True, False, False]


@pytest.mark.parametrize("kind", ["clip", "agc"])
def test_the_optimiser_sees_clipped_gradients(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    students: list[torch.nn.Module] = []
    seen: list[dict[str, tuple[float, float]]] = []
    real, step = loop.make_optimiser, torch.optim.AdamW.step

    def make(module: torch.nn.Module, config: Any) -> torch.optim.Optimizer:
        students.append(module)
        return real(module, config)

    def look(self: torch.optim.AdamW, *rest: Any) -> Any:
        named = students[0].named_parameters()
        seen.append({n: (p.grad.norm().item(), p.norm().item()) for n, p in named if p.grad is not None})
        return step(self, *rest)

    monkeypatch.setattr(loop, "make_optimiser", make)
    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    limits = {"clip": ["--optim.clip=1e-3"], "agc": ["--optim.clip=0", "--optim.agc=1e-4"]}
    assert trainer(tmp_path / "run", "--steps=2", "--dino.freeze_last=0", *limits[kind]) == 0
    assert len(seen) == 2
    for norms in seen:
        if kind == "clip":
            assert max(gradient for gradient, _ in norms.values()) == pytest.approx(1e-3, rel=1e-3)
        else:
            gradient, weight = norms["backbone.blocks.0.mlp.fc1.weight"]
            assert gradient == pytest.approx(1e-4 * weight, rel=1e-2)  # all of its rows were longer
            gradient, weight = norms["head.prototypes"]
            assert gradient > 1e-3 * weight


@pytest.mark.parametrize("method", ["dino", "byol", "igpt"])
def test_what_adaptive_clipping_leaves_alone_is_there(method: str) -> None:
    made = methods.make(settings.parse([method]), "")
    parts = {name for name, _ in (*made.student.named_modules(), *made.student.named_parameters())}
    assert set(made.last_layers) <= parts


def poisoned(monkeypatch: pytest.MonkeyPatch, steps: range, by: float = math.nan) -> None:
    real = dino.Dino.loss

    def loss(self: dino.Dino, student: torch.nn.Module, views: list, step: int) -> tuple:
        value, parts = real(self, student, views, step)
        if step in steps:  # as a scan with NaN in it would
            self.centre._pending = cast(torch.Tensor, self.centre._pending) * by
        return (value * by if step in steps else value), parts

    monkeypatch.setattr(dino.Dino, "loss", loss)


def test_a_step_with_nan_touches_no_weight_and_is_counted(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(monkeypatch, range(1, 3))
    assert trainer(tmp_path / "run", "--steps=4", "--save_every=1") == 0
    said = capsys.readouterr().out
    assert "step 1 skipped" in said
    assert "scan" in said.split("step 1 skipped")[1].splitlines()[0]
    assert "2 steps were skipped" in said
    kept = tmp_path / "run" / "bad" / "step-00000001.pt"
    assert f"--replay {kept}" in said
    assert train.main([f"--replay={kept}"]) == 0
    again = capsys.readouterr().out
    assert "step 1, scans: scan" in again
    assert "loss nan" in again
    assert "weights that are not finite: none" in again
    assert [line["loss"] is None for line in trainer.lines(tmp_path / "run")] == [False, True, True, False]
    assert trainer.lines(tmp_path / "run")[-1]["skipped_steps"] == 2
    backbone = medformer.load(tmp_path / "run" / "backbone.safetensors")
    assert all(p.isfinite().all() for p in backbone.parameters())


def test_a_replay_has_the_weights_that_the_step_met(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(monkeypatch, range(1, 2))
    assert trainer(tmp_path / "run", "--steps=2") == 0
    kept = tmp_path / "run" / "bad" / "step-00000001.pt"
    state = torch.load(kept, weights_only=True)
    state["method"]["student.head.prototypes"][0] = math.nan
    torch.save(state, kept)
    capsys.readouterr()
    assert train.main([f"--replay={kept}"]) == 0
    assert "weights that are not finite: student.head.prototypes\n" in capsys.readouterr().out


def test_what_is_drawn_in_a_step_follows_the_seed_the_step_and_the_micro_batch(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drop path and masks: from torch's generator, which is seeded anew each time and in no checkpoint."""
    real, seeds = dino.Dino.loss, {}

    def loss(self: dino.Dino, student: torch.nn.Module, views: list, step: int) -> tuple:
        seeds[name].append(torch.initial_seed())
        return real(self, student, views, step)

    monkeypatch.setattr(dino.Dino, "loss", loss)
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        seeds[name] = []
        assert trainer(tmp_path / name, "--steps=3", "--accumulate=2", f"--seed={seed}") == 0
    assert len(set(seeds["first"])) == 6
    assert seeds["first"] == seeds["again"]
    assert not set(seeds["first"]) & set(seeds["other"])


@pytest.mark.parametrize("place", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_step_leaves_weights_average_centre_and_moments_as_they_were(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, value: float
) -> None:
    def bad_gradient(self: dino.Dino, step: int) -> None:
        if step == 1:
            next(self.student.backbone.parameters()).grad.view(-1)[0] = value  # type: ignore[union-attr]

    if place == "gradient":
        monkeypatch.setattr(dino.Dino, "before_step", bad_gradient)
    else:
        poisoned(monkeypatch, range(1, 2), value)
    assert trainer(tmp_path / "run", *EVERY_STEP) == 0
    before, bad, after = states_of(tmp_path / "run")[:3]
    assert (bad["bad"], bad["sample"]) == (1, 4)
    for kind in ("method", "optimiser"):
        same = [torch.equal(torch.as_tensor(a), torch.as_tensor(b))
                for a, b in zip(leaves_of(before[kind]), leaves_of(bad[kind]), strict=True)]  # fmt: skip
        assert all(same)
    centres = [state["method"]["centre.value"] for state in (bad, after)]
    assert not torch.equal(*centres)
    assert centres[1].isfinite().all()


def leaves_of(state: dict[str, Any]) -> list[Any]:
    return tree_leaves(state.get("state", state))  # of an optimiser without its groups, whose rates move


def test_too_many_bad_steps_end_the_run_naming_the_scans(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(monkeypatch, range(1, 99))
    assert trainer(tmp_path / "run", "--steps=20", "--max_bad_steps=3", "--save_every=1") == 1
    error = capsys.readouterr().err.strip()
    assert "3 steps in a row" in error
    assert "scan" in error.split("the last on ")[1]
    assert len(error.splitlines()) == 1
    assert runs.load_checkpoint(tmp_path / "run", print)[1]["step"] == 3  # the last one written before giving up


def test_disk_full_while_saving_names_the_file_and_keeps_the_last_good_one(
    trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert trainer(run, "--steps=2") == 0
    good = (run / "checkpoints" / "step-00000002.pt").read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, before[1]))
    try:
        code = train.main([f"--resume={run}", "--steps=4"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err.strip()
    assert code == 1
    assert len(error.splitlines()) == 1
    assert f"cannot write {run / 'checkpoints' / 'step-00000004.pt'}" in error
    assert "make room" in error
    assert "step-00000002.pt is safe" in error
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000002.pt"]
    assert (run / "checkpoints" / "step-00000002.pt").read_bytes() == good


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file: object) -> None:
        file.write(b"new")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device; make room"):
        runs.write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_train_like_one(trainer: Any, tmp_path: Path) -> None:
    assert trainer(tmp_path / "one", "--steps=4", "--batch_size=4") == 0
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0", str(trainer.script), *trainer.flags, f"--data.root={trainer.scans}",
        f"--out={tmp_path / 'two'}", "--steps=4", "--batch_size=2",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ln K") == 2  # said by the first process only, at the start and at the end
    assert trainer.losses(tmp_path / "two") == pytest.approx(trainer.losses(tmp_path / "one"), rel=1e-5)
    a, b = (medformer.load(tmp_path / name / "backbone.safetensors") for name in ("one", "two"))
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
