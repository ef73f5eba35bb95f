"""An installation that is older than promised ends the import in one line."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from medformer_kernels import _versions

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def test_oldest_versions_are_those_of_the_project():
    promised = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(PROJECT["dependencies"]), re.MULTILINE))
    assert {name: ".".join(map(str, least)) for name, least in _versions.OLDEST.items()} == {
        name: promised[name] for name in _versions.OLDEST
    }


@pytest.mark.parametrize(
    ("found", "mend"),
    [
        ({"torch": "2.10.2+cu128", "triton": "3.6.0"}, "'torch>=2.11'"),
        ({"torch": "2.11.0", "triton": "3.5.1"}, "'triton>=3.6'"),
        ({"torch": "1.13.1", "triton": "2.1"}, "'torch>=2.11' 'triton>=3.6'"),
        ({"torch": "2.9"}, "'torch>=2.11'"),
    ],
)
def test_an_older_version_raises_one_line_with_both_versions_and_the_command(found, mend):
    with pytest.raises(ImportError) as error:
        _versions.check(found)
    message = str(error.value)
    assert "\n" not in message
    assert all(f"{name} {version}" in message for name, version in found.items())
    assert message.endswith(f"; pip install --upgrade {mend}")


@pytest.mark.parametrize("torch_version", ["2.11.0", "2.12.0a0+git1234", "2.15.0.dev20261130+cpu", "3.0"])
def test_promised_and_newer_versions_pass(torch_version):
    _versions.check({"torch": torch_version, "triton": "3.10.0"})
    _versions.check({"torch": torch_version})


def test_import_checks_before_anything_else():
    """With a PyTorch that claims to be old the first name fails by our line, not by what it lacks."""
    code = "import torch; torch.__version__ = '2.10.0'; import medformer; medformer.Backbone"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert made.returncode == 1
    assert made.stderr.splitlines()[-1].startswith("ImportError: medformer needs torch 2.11")
