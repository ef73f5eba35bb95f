"""`--parallel fsdp2`: every block's weights, gradients, moments and average split over the processes.

PyTorch's `fully_shard` on each transformer block of student and teacher alike; what is not in a block (patch embedding,
norms, heads: a few percent of a large model) stays whole in every process, its gradients averaged here. A block is
gathered for the time it computes. Checkpoints hold whole tensors, so a run can go on with any number of processes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from medformer.errors import UserError

__all__ = ["average_gradients", "blocks", "check", "norms", "own", "place_moments", "shard", "split_groups", "whole"]


def check(config: Any, ranks: int) -> None:
    """UserError where --parallel fsdp2 cannot do what the other flags ask for."""
    if ranks == 1:
        raise UserError("--parallel fsdp2 with one process: nothing to split; start with torchrun, or use ddp", 2)
    for name, bad, instead in (
        ("--precision fp16", config.precision == "fp16", "bf16"),
        ("--optim.agc", config.optim.agc > 0, "0"),
        ("--views.cutmix", config.views.cutmix > 0, "0"),
        ("--online.task", config.online.task is not None, "evaluate the finished run"),
        ("--picture_every", config.picture_every > 0, "0"),
    ):
        if bad:
            raise UserError(f"--parallel fsdp2 does not go with {name}: a whole model is needed; use {instead}", 2)


def blocks(module: nn.Module) -> list[nn.Module]:
    """What is split and gathered as one: the members of every list named `blocks`, outermost first."""
    return [m for name, m in module.named_modules() if re.fullmatch(r"(?:.*\.)?blocks\.\d+", name)]


def shard(method: nn.Module) -> None:
    """Split the blocks, in place; all processes hold the same weights before."""
    found = blocks(method)
    if not found:
        raise UserError("--parallel fsdp2: this model has no blocks to split; use ddp", 2)
    for block in found:
        fully_shard(block, reshard_after_forward=True)


def own(x: Tensor) -> Tensor:
    """The part of a split tensor that is here, sharing its memory; any other tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Of what is not split: FSDP takes care of the rest."""
    grads = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


@torch.no_grad()
def norms(tensors: Sequence[Tensor], of: Sequence[Tensor] | None = None) -> Tensor:
    """Euclidean norm of each, over all its parts; `of`: weights that are split as the tensors are."""
    found = torch.stack(torch._foreach_norm([own(t) for t in tensors]))  # pyright: ignore[reportPrivateImportUsage]
    split = torch.tensor([isinstance(t, DTensor) for t in of or tensors], device=found.device)
    if not split.any():
        return found
    squares = torch.where(split, found.square(), 0.0)
    dist.all_reduce(squares)
    return torch.where(split, squares.sqrt(), found)


def split_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fused optimisers take split and whole tensors only apart."""
    result = []
    for group in groups:
        for kind in (False, True):
            some = [p for p in group["params"] if isinstance(p, DTensor) is kind]
            if some:
                result.append({**group, "params": some})
    return result


def place_moments(optimiser: torch.optim.Optimizer) -> None:
    """After loading whole moments: keep the part of each that goes with its weights."""
    for p, state in optimiser.state.items():
        for name, value in state.items():
            if isinstance(p, DTensor) and isinstance(value, Tensor) and value.shape == p.shape:
                state[name] = distribute_tensor(value, p.device_mesh, p.placements)


def whole(state: Any) -> Any:
    """Split tensors put together, on every process; all of them have to call it."""
    return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, state)
