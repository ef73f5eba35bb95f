"""The folder for the hub of kernels: relative imports, operators of its own, loadable next to the package."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import medformer_kernels


def tool() -> ModuleType:
    path = Path(__file__).parents[1] / "misc" / "hub_kernels.py"
    spec = importlib.util.spec_from_file_location("hub_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_folder_is_made_that_loads_by_its_path(tmp_path: Path) -> None:
    identity = tool().build(tmp_path, "me/medformer-kernels")
    assert {path.name for path in (tmp_path / "build").iterdir()} == {"torch-cpu", "torch-cuda", "torch-rocm"}
    variant = tmp_path / "build" / "torch-cpu"
    about = json.loads((variant / "metadata.json").read_text())
    assert about["id"] == f"_medformer_kernels_cpu_{identity}"
    for path in variant.rglob("*.py"):
        assert not re.search(r"^\s*(from|import) medformer", path.read_text(), re.MULTILINE), path
    assert 'repo-id = "me/medformer-kernels"' in (tmp_path / "build.toml").read_text()

    # As `kernels` imports it.
    spec = importlib.util.spec_from_file_location(about["id"], variant / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[about["id"]] = module
    try:
        spec.loader.exec_module(module)
        check(module)
        assert hasattr(torch.ops, about["id"])
        assert (
            "performer_state" in dir(getattr(torch.ops, about["id"])) or getattr(torch.ops, about["id"]).performer_state
        )
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == about["id"]]:
            del sys.modules[name]


def check(module: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 16, generator=generator) for _ in range(3))
    omega = module.orthogonal_features(32, 16)
    wanted = medformer_kernels.performer_attention(q, k, v, omega)
    torch.testing.assert_close(module.performer_attention(q, k, v, omega), wanted)


def test_the_kernels_package_loads_the_folder(tmp_path: Path) -> None:
    kernels = pytest.importorskip("kernels", reason="the kernels package loads the folder where it is installed")
    if not hasattr(kernels, "get_local_kernel"):
        pytest.skip("the folder kernels/ of this repository, not the package")
    tool().build(tmp_path, "me/medformer-kernels")
    check(kernels.get_local_kernel(tmp_path, backend="cpu"))


def test_what_cannot_be_moved_is_named() -> None:
    moved = tool().moved
    assert moved("from medformer_kernels.a import b\n", Path("x/y.py"), "_u") == "from ..a import b\n"
    assert moved("from medformer_kernels import b\n", Path("y.py"), "_u") == "from . import b\n"
    with pytest.raises(ValueError, match=r"x\.py has `import medformer_kernels`"):
        moved("import medformer_kernels\n", Path("x.py"), "_u")
    with pytest.raises(ValueError, match=r"x\.py still names \"medformer::"):
        moved('op = "medformer::other"\n', Path("x.py"), "_u")
