"""What a run of `medformer pretrain` writes to go on from (`checkpoints/step-*.pt`), and the encoder in it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from medformer.channels import name_channels
from medformer.data.sequences import patterns_of
from medformer.errors import UserError
from medformer.models import BackboneConfig, Model, ResNetConfig, TNTConfig, build

__all__ = ["FORMAT", "MARK", "encoder_of", "read_run_checkpoint"]

FORMAT = "medformer-run-1"
MARK = b"medformer-sha256"
"""A checkpoint ends with this and the SHA-256 of all before it; readers of zip files pass over what follows the
archive. torch.load itself does not look at the checksums in the archive: a flipped bit would go unseen."""

# Where a method keeps what is evaluated. An Image-GPT needs a codebook and a grid too, which only a run puts together.
_ENCODERS = {"dino": "teacher.backbone.", "byol": "student.backbone."}
_CONFIGS: dict[str, Any] = {"transformer": BackboneConfig, "resnet": ResNetConfig, "tnt": TNTConfig}


def read_run_checkpoint(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The state, or None and what is wrong with the file."""
    try:
        if not _checksum_holds(path):
            return None, "is damaged: its checksum does not match its content"
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:
        # Whatever the unpickler or the zip reader makes of a damaged file.
        first = next(iter(str(error).strip().splitlines()), "")
        return None, "is damaged or no checkpoint" + (f" ({first[:120]})" if " " in first else "")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        return None, "is not a checkpoint of this trainer (checkpoints/step-*.pt of a run folder are)"
    return state, ""


def _checksum_holds(path: Path) -> bool:
    """True also without a checksum: what was cut off there is found by torch.load."""
    end = len(MARK) + hashlib.sha256().digest_size
    with open(path, "rb") as file:
        left = max(0, os.fstat(file.fileno()).st_size - end)
        digest = hashlib.sha256()
        while left and (part := file.read(min(left, 2**22))):
            digest.update(part)
            left -= len(part)
        tail = file.read(end)
    return not tail.startswith(MARK) or tail == MARK + digest.digest()


def encoder_of(path: Path) -> tuple[Model, dict[str, Any]]:
    """What the run would save if it ended at this checkpoint (DINO's teacher, BYOL's online backbone), and the
    settings of the run.

    Raises:
        UserError: the file cannot be read, or is of an Image-GPT.
    """
    state, problem = read_run_checkpoint(path)
    if state is None:
        raise UserError(f"{path} {problem}", 2)
    run, prefix = state["config"], _ENCODERS.get(state["config"]["method"])
    if prefix is None:
        raise UserError(f"{path} is of {run['method']}, of which only a finished run can be read; --resume it", 2)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in run["model"].items()}
    with torch.random.fork_rng(devices=[]):
        model = build(_CONFIGS[run["network"]](**values))
    tensors = {k.removeprefix(prefix): v for k, v in state["method"].items() if k.startswith(prefix)}
    model.load_state_dict(tensors)
    name_channels(model, tuple(patterns_of(run["data"].get("channels") or ())))
    return model, run
