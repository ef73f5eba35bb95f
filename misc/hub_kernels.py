"""The folder that the Hugging Face `kernels` project asks for, made of `kernels/medformer_kernels`.

    python misc/hub_kernels.py build/hub-kernels [--repo owner/medformer-kernels]

writes `build.toml`, `README.md` and a variant for each backend, `build/torch-cpu`, `-cuda` and `-rocm`: the package
with relative imports, operators under a namespace of this build, and `metadata.json`. It is loaded by
`kernels.get_local_kernel(Path(folder))`. Nothing is uploaded; `hf upload` does that, or `kernel-builder` from the same
folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "kernels" / "medformer_kernels"
NAME = "medformer-kernels"
BACKENDS = ("cpu", "cuda", "rocm")
VERSION = 1
# As the package itself asks, and as `kernels` asks.
PYTHON = "3.11"
_IMPORT = re.compile(r"^(\s*)from medformer_kernels(\.[\w.]+)? import ", re.MULTILINE)
_PLAIN = re.compile(r"^\s*import medformer_kernels", re.MULTILINE)


def build(folder: Path, repo: str) -> str:
    """Write the folder; the identity of the build, of what the sources say."""
    sources = sorted(path for path in SOURCE.rglob("*") if path.suffix in (".py", ".json"))
    digest = hashlib.sha256()
    for path in sources:
        digest.update(str(path.relative_to(SOURCE)).encode() + b"\0" + path.read_bytes() + b"\0")
    identity = digest.hexdigest()[:7]
    if (folder / "build").exists():
        shutil.rmtree(folder / "build")
    for backend in BACKENDS:
        target = folder / "build" / f"torch-{backend}"
        unique = f"_medformer_kernels_{backend}_{identity}"
        for path in sources:
            relative = path.relative_to(SOURCE)
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text()
            (target / relative).write_text(moved(text, relative, unique) if path.suffix == ".py" else text)
        about = {
            "name": NAME, "id": unique, "version": VERSION, "license": "Apache-2.0", "python-depends": [],
            "backend": {"type": backend},
        }  # fmt: skip
        (target / "metadata.json").write_text(json.dumps(about, indent=2) + "\n")
    (folder / "build.toml").write_text(
        f'[general]\nname = "{NAME}"\nversion = {VERSION}\nlicense = "Apache-2.0"\n'
        f"backends = {json.dumps(list(BACKENDS))}\n\n"
        f'[general.hub]\nrepo-id = "{repo}"\n\n[torch-noarch]\n'
    )
    (folder / "README.md").write_text(
        "---\nlibrary_name: kernels\nlicense: apache-2.0\n---\n\n# medformer kernels\n\n"
        "FAVOR+, Nystrom and disentangled attention, patch embedding and inner blocks of Transformer-in-Transformer, "
        "in Triton with PyTorch paths.\n\n"
        f'```python\nfrom kernels import get_kernel\n\nkernels = get_kernel("{repo}", version={VERSION})\n```\n\n'
        f"Python {PYTHON} or newer, PyTorch 2.11 or newer. Build {identity}.\n"
    )
    return identity


def moved(text: str, relative: Path, unique: str) -> str:
    """A module with imports relative to itself, and operators under `unique`."""
    dots = "." * len(relative.parts)
    text = _IMPORT.sub(lambda match: f"{match[1]}from {dots}{(match[2] or '')[1:]} import ", text)
    if _PLAIN.search(text):
        raise ValueError(f"hub_kernels: {relative} has `import medformer_kernels`; from ... import ... can be moved")
    text = text.replace('torch.library.Library("medformer"', f'torch.library.Library("{unique}"')
    text = text.replace('f"medformer::{name}"', f'f"{unique}::{{name}}"')
    text = re.sub(r"torch\.ops\.medformer\b", f"torch.ops.{unique}", text)
    package = "__package__" if len(relative.parts) == 1 else f'__package__.rsplit(".", {len(relative.parts) - 1})[0]'
    text = text.replace('importlib.resources.files("medformer_kernels")', f"importlib.resources.files({package})")
    left = re.findall(r'"medformer(?:_kernels)?(?:::|")', text)
    if left:
        raise ValueError(f"hub_kernels: {relative} still names {left[0]}; teach `moved` to replace it")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repo", default="medformer/medformer-kernels", help="repository that the folder names")
    given = parser.parse_args()
    identity = build(given.folder, given.repo)
    print(f"{given.folder}: build {identity} for {', '.join(BACKENDS)}")


if __name__ == "__main__":
    main()
