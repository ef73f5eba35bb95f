"""Processes that train as one: who they are, their sums and batch norms, and what it looks like to lose one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from medformer.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = [
    "LOST", "LocalError", "SyncBatchNorm", "agree", "due", "from_environment", "is_loss", "is_worker", "join",
    "restarts", "summed",
]  # fmt: skip

T = TypeVar("T")
LOST = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed later
# What collectives say when the other side is gone or silent (gloo, NCCL, the store).
_GONE = (
    "Connection closed by peer", "Connection reset", "Broken pipe", "Timed out waiting", "Application timeout",
    "ncclRemoteError", "NCCL communicator was aborted", "Socket Timeout", "failed to connect", "Connection refused",
)  # fmt: skip


class LocalError(UserError):
    """A UserError of this process alone, which the first one cannot report."""


def from_environment() -> tuple[int, int]:
    """RANK and WORLD_SIZE as torchrun or a scheduler's script sets them; 0 and 1 without.

    Raises:
        UserError: they are no numbers, or the rank is not one of the world.
    """
    found = {}
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")):
        text = os.environ.get(name, default)
        if not text.isdecimal():
            raise UserError(f"{name}={text!r} in the environment must be a whole number; start with torchrun", 2)
        found[name] = int(text)
    rank, ranks = found["RANK"], found["WORLD_SIZE"]
    if rank >= max(1, ranks):
        raise UserError(f"RANK={rank} must be below WORLD_SIZE={ranks}; start with torchrun", 2)
    return rank, ranks


def restarts() -> int | None:
    """How often torchrun has started these processes again; None where it does not."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0:
        return None
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def join(backend: str) -> None:
    """Begin to train as one."""
    if (life := restarts()) is None:
        dist.init_process_group(backend)
        return
    # All lives share the agent's store, where gloo would find the addresses of processes that are gone (torch 2.14).
    store, rank, ranks = next(iter(rendezvous("env://")))
    dist.init_process_group(backend, store=PrefixStore(f"life {life}", store), rank=rank, world_size=ranks)


def agree(values: Mapping[str, Any]) -> None:
    """Check that all processes hold the same values; nothing to do in one process alone.

    Raises:
        UserError: on every process, naming what differs and where.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    mine = json.dumps(dict(values), sort_keys=True, default=str)
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(mine.encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    everyone: list[Any] = [None] * len(digests)
    dist.all_gather_object(everyone, json.loads(mine))
    other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
    first, second = everyone[0], everyone[other]
    names = [n for n in sorted(first.keys() | second.keys()) if first.get(n) != second.get(n)]
    listed = "; ".join(f"{n} is {first.get(n)} in process 0, {second.get(n)} in process {other}" for n in names[:5])
    raise UserError(f"the processes of this run differ: {listed}; start all of them with the same flags and code", 2)


def summed(x: Tensor) -> Tensor:
    """The sum of `x` over all processes, known to all of them; gradients are summed likewise on their way back."""
    return cast(Tensor, _Sum.apply(x))


class _Sum(torch.autograd.Function):
    """Holds no process group: a graph that outlives the group would keep the group's threads alive to the very end."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        return _Sum.forward(None, grads[0])


class SyncBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the rows of all processes, on any device; torch's own needs a GPU."""

    def forward(self, x: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
        uses_batch = self.training or not self.track_running_stats
        if not (uses_batch and dist.is_initialized()):
            return super().forward(x)
        # Centred before it is squared: the mean of squares less the square of the mean has no digits left where a
        # batch's rows differ little, as they do at the start.
        sums = summed(torch.cat([x.float().sum(0), x.new_tensor([len(x)], dtype=torch.float32)]))
        rows = sums[-1]
        x = x.float() - sums[:-1] / rows
        variance = summed(x.square().sum(0)) / rows
        if self.track_running_stats:
            with torch.no_grad():
                assert self.running_mean is not None
                assert self.running_var is not None
                assert self.num_batches_tracked is not None
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(sums[:-1] / rows, self.momentum or 0.1)
                self.running_var.lerp_(variance * rows / (rows - 1).clamp_min(1), self.momentum or 0.1)
        x = x * torch.rsqrt(variance + self.eps)
        return x * self.weight + self.bias if self.affine else x


def is_loss(error: BaseException) -> bool:
    """Whether `error` is how a process notices that another one died or hangs."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _GONE)


def is_worker(error: BaseException) -> bool:
    """Whether `error` is the death of a loader's worker, which torch raises wherever the process happens to be."""
    return "DataLoader worker" in str(error) and ("killed by signal" in str(error) or "exited" in str(error))


def due(batches: Iterator[T], named: Callable[[], str]) -> T:
    """The next batch; `named`: the scans it should hold.

    Raises:
        LocalError: a read hangs, or failed.
    """
    try:
        return next(batches)
    except (OSError, ValueError, RuntimeError) as error:
        text = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        if is_worker(error):
            raise
        if "timed out" in text:
            what = "no batch within --loader_timeout"
        else:
            what = f"a batch cannot be cut: {text[:240]}"
        raise LocalError(f"{what}; scans due: {named()}; mend or remove them, then --resume") from error
