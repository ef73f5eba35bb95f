"""The house rules that keep imports working (misc/CONTRIBUTING names the reasons)."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import networkx  # a requirement of torch
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


def modules() -> dict[str, Path]:
    """Every file of the three rooms by the name it is imported under; `ssl` is a folder of flat scripts."""
    found = {}
    for room in ROOMS:
        base = ROOT / room if room == "ssl" else (ROOT / room).parent
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def circles(files: dict[str, Path]) -> list[list[str]]:
    """Modules (name to file) that import each other, directly or around, each circle sorted.

    Every import counts, also one inside a function or under TYPE_CHECKING: both hide a circle, neither undoes it. What
    Python imports unasked, the packages above a module, does not count.
    """
    graph = networkx.DiGraph()
    for name, path in files.items():
        package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            wanted: list[str] = []
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                inside = [f"{base}.{alias.name}" for alias in node.names]
                wanted = [each if each in files else base for each in inside]
            graph.add_edges_from((name, each) for each in wanted if each in files and each != name)
    return sorted(sorted(found) for found in networkx.strongly_connected_components(graph) if len(found) > 1)


def test_no_modules_import_each_other():
    assert circles(modules()) == []


def test_circles_are_found_wherever_the_import_stands(tmp_path):
    text = {
        "room": "from room import near",
        "room.near": "def f():\n    from room.far import g",
        "room.far": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import near",
        "room.other": "import room, room.near",
    }
    files = {name: tmp_path / f"{name}.py" for name in text}
    for name, path in files.items():
        path.write_text(text[name])
    assert circles(files) == [["room.far", "room.near"]]


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_ssl_holds_trainers_only():
    scripts = list((ROOT / "ssl").glob("*.py"))
    assert len(scripts) <= 27
    assert sum(map(lines_of, scripts)) <= 5500


@pytest.mark.parametrize("name", ["evaluate", "prepare", "report"])
def test_commands_of_the_library_are_short_scripts_in_ssl(name):
    assert lines_of(ROOT / "ssl" / f"{name}.py") <= 12


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


def test_import_leaves_the_compiler_and_what_only_training_needs_alone():
    """torch._dynamo and sympy alone took four fifths of what `import medformer` costs beyond `import torch`."""
    heavy = ["torch._dynamo", "sympy", "torchvision", "matplotlib", "tensorboard", "transformers"]
    code = f"import sys, torch; had = {{*sys.modules}}; import medformer; print({{*{heavy}}} & {{*sys.modules}} - had)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.strip() == "set()"
