"""Shared fixtures. Must run before any kernel is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys

# As in ssl/train.py: on a shared CPU threads that spin while they wait make everything several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides at decoration time whether a kernel is interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Imports Triton: not before that.
from tests import launches

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A plain `pytest` (the whole suite) takes two processes; a chosen file, or `-n 0`, runs in one."""
    worker = "PYTEST_XDIST_WORKER" in os.environ  # which must not start workers of its own
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if whole and not worker and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses = min(2, os.cpu_count() or 1)


def _mend_old_interpreter() -> None:
    """Triton 3.6's interpreter cannot use a tensor as the bound of a loop with NumPy 2.4 and later; 3.7's can."""
    import triton
    from triton.runtime import interpreter

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7):
        return
    patch = interpreter._patch_lang_tensor

    def mended(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = mended


_mend_old_interpreter()

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests import bf16_interpreter  # its ml_dtypes need not be where a GPU is

    bf16_interpreter.install()
launches.record()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "launches(*kernels): the test launches at least these Triton kernels; without names, none; '*': at least one; "
        "'?': some of its calls do",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that launches kernels says which, so that a silent fallback to PyTorch fails it."""
    launches.launched.clear()
    result = yield
    found, mark = sorted(set(launches.launched)), item.get_closest_marker("launches")
    names = () if mark is None else mark.args
    if names == ("?",):
        return result
    if mark is None and found:
        pytest.fail(f"launched {found}: say so with @pytest.mark.launches(...)", pytrace=False)
    if mark is not None and not names and found:
        pytest.fail(f"launched {found}, and the test says that it launches no kernel", pytrace=False)
    missing = ["any"] if names == ("*",) and not found else sorted({*names} - {*found, "*"})
    if missing:
        pytest.fail(f"did not launch {missing}, only {found}", pytrace=False)
    return result


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU; none is visible to torch here")
    for item in items:
        if item.get_closest_marker("gpu") is not None:  # not in its keywords: they hold the names of folders
            item.add_marker(skip)


@dataclass(frozen=True)
class Trainer:
    """`ssl/train.py` on four tiny scans with a model of 0.03 M parameters: about a second a run.

    Without batch norm, Sinkhorn and masked patches, which see a micro-batch and not the batch: tests that want them
    ask for them.
    """

    scans: Path
    flags = (
        "--model.width=24", "--model.depth=1", "--model.heads=2", "--model.patch_stride=8", "--model.patch_padding=0",
        "--views.global_size=16x16x16", "--views.local_size=8x8x8", "--views.local_views=1", "--dino.prototypes=32",
        "--dino.hidden=16", "--dino.bottleneck=8", "--batch_size=2", "--save_every=2", "--device=cpu",
        "--dino.norm=none", "--dino.balance=centre", "--dino.koleo=0", "--dino.masked_patches=0", "--byol.koleo=0",
        "--byol.masked_patches=0", "--model.mask_token=false", "--optim.lr=5e-4",
    )  # fmt: skip
    script = Path(__file__).parents[1] / "ssl" / "train.py"

    def arguments(self, out: Path, *flags: str) -> list[str]:
        return [*self.flags, f"--data.root={self.scans}", f"--out={out}", *flags]

    def __call__(self, out: Path, *flags: str, picture: bool = False) -> int:
        import train  # not before TRITON_INTERPRET is set

        with nullcontext() if picture else mock.patch("pictures.attention_picture"):  # half a second each
            return train.main(self.arguments(out, *flags))

    def lines(self, run: Path) -> list[dict[str, float]]:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    def losses(self, run: Path) -> list[float]:
        return [line["loss"] for line in self.lines(run)]


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    import nibabel as nib  # a borrowed GPU machine has none, and needs this file

    root = tmp_path_factory.mktemp("trainer") / "scans"
    root.mkdir()
    for i in range(4):
        voxels = np.random.default_rng(i).normal(100, 30, (20, 18, 22)).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.5, 2.0, 1.0])), root / f"scan{i}.nii")
    return Trainer(root)


class Lives:
    """`tests/lives.py` as a process: trainers of one or several processes, about a second each."""

    def __init__(self, scratch: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("lives.py"))]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, cwd=scratch, **pipes)
        self.scratch = scratch

    def __call__(self, argv: list[str], **job: Any) -> dict[str, Any]:
        """Exit codes and output of each process; `lives.live` says what a job may hold."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"argv": argv, "scratch": str(self.scratch), **job}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    found = Lives(tmp_path_factory.mktemp("lives"))
    yield found
    found.process.kill()
    found.process.wait()
