"""A folder of results: whether it can be written, before an hour is spent on what goes into it."""

from __future__ import annotations

import os
from pathlib import Path

from medformer.errors import UserError

__all__ = ["hub_name", "model_file", "tried"]


def tried(out: Path, called: str = "--out") -> None:
    """Make the folder and a file in it, which goes again. UserError, which names the argument, where that cannot be."""
    probe = out / f".try-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{called} {out}: {error.strerror or error}; give a folder that can be written") from error


def hub_name(path: Path) -> str | None:
    """hf:owner/name of a path that was one; None for others."""
    text = path.as_posix()
    return text.replace("hf:/", "hf:", 1) if text.startswith("hf:") else None


def model_file(path: Path) -> Path:
    """The weights that a path names: a file, or of a folder of fine-tuning or of a run the one in it.

    Raises:
        UserError: there is none; the message says what to give.
    """
    names = ("model.safetensors", "backbone.safetensors", "image_gpt.safetensors")
    if path.is_dir():
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None and (path / "finetune.json").is_file():
            raise UserError(f"{path}: its fine-tuning is not finished; the same medformer finetune goes on with it", 2)
        if found is None:
            raise UserError(f"{path}: no {', '.join(names)} in this folder; give a file, or the folder of a run", 2)
        return found
    if not path.is_file() and hub_name(path) is None:
        raise UserError(f"{path}: no such file or folder; give weights, the folder of a run, or hf:owner/name", 2)
    return path
