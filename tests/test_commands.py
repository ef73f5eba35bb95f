"""The command `medformer`: its subcommands, their help, and all of it from a wheel outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medformer import commands
from medformer.short_help import ALL

ROOT = Path(__file__).parents[1]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int | str | None, str, str]:
    try:
        code: int | str | None = commands.main(list(words))
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_overview_lists_every_command(capsys):
    code, out, _ = said(capsys, "--help")
    assert code == 0
    assert all(f"\n  {name} " in out for name in commands.ABOUT)


@pytest.mark.parametrize("name", commands.ABOUT)
def test_help_of_each_command_fits_on_a_page(name, capsys):
    code, out, err = said(capsys, name, "--help")
    assert (code, err) == (0, "")
    assert f"medformer {name}" in out
    assert len(out.splitlines()) <= 65
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("name", ["pretrain", "evaluate"])
def test_long_help_has_the_flags_that_the_short_one_leaves_out(name, capsys):
    flag = {"pretrain": "--optim.agc", "evaluate": "--split_seed"}[name]
    short = said(capsys, name, "--help")[1]
    assert flag not in short
    assert ALL in short
    assert flag in said(capsys, name, ALL)[1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["pretain"], "error: medformer pretain: no such command; did you mean pretrain?\n"),
        (["frobnicate"], "error: medformer frobnicate: no such command; medformer --help\n"),
        (["inspect"], "arguments are required: folder; medformer inspect --help lists all flags\n"),
        (["evaluate", "x", "--tusk", "y"], "; medformer evaluate --help-all lists all flags\n"),
        (["pretrain", "--xyzzy"], "error: unknown flag --xyzzy: medformer pretrain --help-all lists all flags\n"),
    ],
)
def test_wrong_words_are_one_line(words, line, capsys):
    code, _, err = said(capsys, *words)
    assert code == 2
    assert err.endswith(line)
    assert err.count("\n") == 1


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(build, check=True)
    (found,) = folder.glob("*.whl")
    return found


def test_wheel_holds_trainers_page_and_kernels(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    scripts = {f"medformer/ssl/{path.name}" for path in (ROOT / "ssl").glob("*.py")}
    data = {"medformer/page/page.html", "medformer/page/page.js", "medformer_kernels/configs/tnt.json"}
    assert scripts | data <= names
    assert not any(name.startswith(("ssl/", "tests/", "kernels/")) for name in names)


def test_installed_wheel_inspects_pretrains_evaluates_and_reports(wheel, trainer, tmp_path):
    """In an environment of its own, whose only link to this one is the folder of the dependencies."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    # A .pth is not read in a folder that another .pth names: an editable install of the checkout is out of sight.
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--force-reinstall", wheel]
    subprocess.run(pip, check=True)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def medformer(*words: object) -> str:
        command = [tmp_path / "env" / "bin" / "medformer", *map(str, words)]
        made = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        return made.stdout

    where = [python, "-c", "import medformer, medformer_kernels as m; print(medformer.__file__, m.__file__)"]
    files = subprocess.run(where, cwd=tmp_path, env=clean, capture_output=True, text=True, check=True).stdout.split()
    assert all(file.startswith(str(site)) for file in files)

    assert "4 readable" in medformer("inspect", trainer.scans)
    run = tmp_path / "run"
    medformer("pretrain", *trainer.flags, f"--data.root={trainer.scans}", f"--out={run}", "--steps=6")
    assert (run / "backbone.safetensors").is_file()
    cases = tmp_path / "cases"
    cases.mkdir()
    for i in range(8):
        voxels = np.random.default_rng(i).normal(100 * (i % 2), 30, (16, 16, 16)).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), cases / f"case{i}.nii")
    table = cases / "cases.csv"
    table.write_text("path,label,patient\n" + "".join(f"case{i}.nii,{i % 2},p{i}\n" for i in range(8)))
    flags = ("--methods=knn", "--fractions=1.0", "--seeds=1", "--resamples=20", "--device=cpu")
    medformer("evaluate", run, f"--task={table}", f"--out={tmp_path / 'eval'}", *flags)
    assert (tmp_path / "eval" / "results.json").is_file()
    medformer("report", run, trainer.scans / "scan0.nii", f"--out={tmp_path / 'page.html'}")
    assert "<script" in (tmp_path / "page.html").read_text()
