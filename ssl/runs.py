"""A run's folder: config, metrics, checkpoints that are whole or absent, and the way back into it."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from medformer.errors import UserError, complain
from medformer.files import naming, write_whole
from medformer.locks import Claim
from medformer.run_checkpoint import MARK, read_run_checkpoint

__all__ = [
    "Metrics",
    "Writer",
    "checkpoints",
    "claim",
    "latest_run",
    "load_checkpoint",
    "save_checkpoint",
    "snapshot",
]

KEEP = 2  # checkpoints of a run, besides the best


def claim(out: str | None = None, run: Path | None = None, *, again: bool = False) -> Claim:
    """The folder of a run, which this process alone writes until the claim is closed.

    Args:
        out: a folder that holds no run yet, made if it is not there; None: a new one in runs/, named by the time.
        run: the folder of a run to go on with.
        again: `out` may hold the beginning of a run, which begins once more.

    Raises:
        UserError: another process writes it, it holds a run, or it cannot be made.
    """
    if run is not None:
        return Claim(run, "--resume", "wait for it, or stop it")
    if out is not None and not again:
        _check_free(Path(out))
    found = Claim(_new(out), "--out", "give another --out")
    if out is not None and not again:
        try:
            _check_free(found.path)  # one that began and ended since
        except UserError:
            found.close()
            raise
    return found


def _check_free(run: Path) -> None:
    """UserError where it already holds a run."""
    if checkpoints(run):
        raise UserError(f"--out {run} holds a run: --resume {run} goes on with it, another --out starts anew", 2)
    if (run / "checkpoints").exists() or (run / "metrics.jsonl").exists():
        raise UserError(f"--out {run} holds a run without a checkpoint; remove it, or give another --out", 2)


def _new(out: str | None) -> Path:
    """Make the folder of a new run."""
    if out is not None:
        run = Path(out)
        with naming(run):
            run.mkdir(parents=True, exist_ok=True)
        return run
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for name in (stamp, *(f"{stamp}-{i}" for i in range(2, 100))):
        run = Path("runs") / name
        with naming(run):
            try:
                run.mkdir(parents=True)
                return run
            except FileExistsError:
                continue
    raise UserError(f"runs/{stamp} and 98 more names are taken; give --out")


def latest_run() -> Path:
    """The newest folder in runs/ that holds a checkpoint."""
    found = [run for run in Path("runs").glob("*") if checkpoints(run)]
    if not found:
        raise UserError("--resume auto: no folder in runs/ holds a checkpoint; start a run without --resume", 2)
    return max(found, key=lambda run: checkpoints(run)[-1].stat().st_mtime_ns)


def checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [p for p in (run / "checkpoints").glob("step-*.pt") if re.fullmatch(r"step-\d+\.pt", p.name)]
    return sorted(found, key=lambda p: int(p.stem[5:]))


class _Hashed:
    """What torch.save needs of a file, with the checksum of what went through."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(run: Path, step: int, state: dict[str, Any], *, keep: int = KEEP, best: bool = False) -> Path:
    """Write `checkpoints/step-<step>.pt` whole or not at all, with its checksum; then drop all but the newest `keep`.

    `best`: this one is also `checkpoints/best.pt` from now on, which outlives it.

    Raises:
        UserError: naming the file and the last good checkpoint.
    """
    path = run / "checkpoints" / f"step-{step:08d}.pt"

    for left in path.parent.glob(".step-*.partial"):
        left.unlink(missing_ok=True)  # of a run that was killed while it wrote

    def write(file: io.BufferedWriter) -> None:
        hashed = _Hashed(file)
        # The archive's own checksums, which torch.load does not read, take as long as all else and hold up training.
        torch.serialization.set_crc32_options(False)
        torch.save(state, hashed)  # pyright: ignore[reportArgumentType]
        file.write(MARK + hashed.digest.digest())

    try:
        write_whole(path, write)
        if best:
            _link(path, path.with_name("best.pt"))
    except UserError as error:
        good = [p for p in checkpoints(run) if p != path]
        kept = f"; {good[-1].name} is safe, go on with --resume {run}" if good else ""
        raise UserError(f"{error}{kept}") from error
    for old in checkpoints(run)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def snapshot(state: Any) -> Any:
    """The same with a copy of every tensor in main memory, which later steps do not touch."""

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        kept = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
        return kept.copy_(x, non_blocking=True)

    with torch.no_grad():
        copied = tree_map(copy, state)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copied


class Writer:
    """Writes in a thread while training goes on; one thing at a time.

    Checksums, copies and the disk leave the interpreter to the training thread.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[object] | None = None

    def start(self, write: Callable[[], object]) -> None:
        """Have `write` called, once what was given before is finished."""
        self.finish()
        self._writing = self._pool.submit(write)

    def check(self) -> None:
        """Raise what a write has failed with; returns at once."""
        if self._writing is not None and self._writing.done():
            self.finish()

    def finish(self) -> None:
        """Wait until nothing is being written; raises what it failed with."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, where another error may already be on its way: one of the writer is printed."""
        try:
            self.finish()
        except UserError as error:
            complain(str(error))
        self._pool.shutdown()


def _link(path: Path, name: Path) -> None:
    """A second name for a file, in place of what had it; a copy where the file system knows no links."""
    draft = name.with_name(f".{name.name}.{os.getpid()}.partial")
    with naming(name):
        try:
            draft.unlink(missing_ok=True)
            try:
                os.link(path, draft)
            except OSError:
                shutil.copyfile(path, draft)
                with open(draft, "rb") as copy:
                    os.fsync(copy.fileno())
            os.replace(draft, name)
        finally:
            draft.unlink(missing_ok=True)


def load_checkpoint(path: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """Read a checkpoint file, or the newest good one of a run folder; returns the run's folder and the state.

    A damaged newest checkpoint is named aloud and the one before is taken, `best.pt` last.

    Raises:
        UserError: nothing there to go on from.
    """
    if path.is_file():
        state, problem = read_run_checkpoint(path)
        if state is None:
            raise UserError(f"--resume {path}: {problem}")
        return path.parent.parent, state
    if not path.is_dir():
        raise UserError(f"--resume {path}: no such run folder or checkpoint file", 2)
    found = [*reversed(checkpoints(path)), *(path / "checkpoints").glob("best.pt")]
    if not found:
        raise UserError(f"--resume {path}: no checkpoint in {path / 'checkpoints'}; start it anew without --resume")
    for candidate in found:
        state, problem = read_run_checkpoint(candidate)
        if state is not None:
            return path, state
        say(f"WARNING: {candidate} {problem}; falling back to the checkpoint before it")
    raise UserError(f"--resume {path}: none of its {len(found)} checkpoints can be read; start the run anew")


class Metrics:
    """metrics.jsonl and TensorBoard, cut back to the resumed step so that no line is lost or doubled."""

    def __init__(self, run: Path, step: int) -> None:
        """`step`: steps already done; lines of later ones, from a run that died after its checkpoint, are dropped."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only one process writes

        self.path = run / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) < step]
            write_whole(self.path, lambda file: file.write("".join(f"{line}\n" for line in kept).encode()))
        with naming(self.path):
            self._file = open(self.path, "a", buffering=1)  # noqa: SIM115
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step or None)

    def write(self, step: int, values: dict[str, float]) -> None:
        """`step` is the number of the step, from 0."""
        with naming(self.path):
            # JSON has no NaN: a skipped step's loss is null there.
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Everything written so far is on the disk; call before a checkpoint that relies on it."""
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the half-written last line of a killed run
