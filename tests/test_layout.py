"""The house rules that keep imports working (misc/CONTRIBUTING names the reasons)."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"kernels/medformer_kernels": "medformer_kernels", "medformer": "medformer", "ssl": "ssl"}


def imports_of(folder: Path) -> dict[Path, set[str]]:
    """Top-level module names that each file imports."""
    found = {}
    for path in folder.rglob("*.py"):
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
        found[path] = names
    return found


@pytest.mark.parametrize("folder", ["kernels", "ssl"])
def test_folder_is_not_a_package(folder):
    """`ssl/__init__.py` would shadow the standard library, `kernels/__init__.py` a package transformers imports."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_module_lies_loose_in_kernels():
    assert list((ROOT / "kernels").glob("*.py")) == []


def test_no_script_in_ssl_shadows_a_module():
    """`python ssl/train.py` puts ssl/ first on the path: a file named like a module in use would replace it."""
    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    assert {path.stem for path in (ROOT / "ssl").glob("*.py")} & taken == set()


def test_every_file_in_ssl_is_on_its_map():
    text = (ROOT / "ssl" / "README.md").read_text()
    assert [path.name for path in sorted((ROOT / "ssl").glob("*.*")) if f"`{path.name}`" not in text] == ["README.md"]


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("kernels/medformer_kernels", {"medformer", "nibabel", "pydicom", "safetensors", "jsonargparse"}),
        ("medformer", {path.stem for path in (ROOT / "ssl").glob("*.py")}),
    ],
)
def test_dependencies_point_one_way(folder, forbidden):
    guilty = {str(path): names & forbidden for path, names in imports_of(ROOT / folder).items() if names & forbidden}
    assert guilty == {}


def test_kernels_need_only_torch_triton_and_numpy():
    allowed = {"torch", "triton", "numpy", "jaxtyping", "medformer_kernels"} | set(sys.stdlib_module_names)
    for path, names in imports_of(ROOT / "kernels").items():
        assert names <= allowed, path


def test_test_only_packages_are_imported_for_type_checking_only():
    """jaxtyping and beartype belong to the test extra."""
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.parse(path.read_text()).body:
                modules = [node.module] if isinstance(node, ast.ImportFrom) else []
                assert "jaxtyping" not in modules, path
