"""The loop that every trained method shares: one budget, one optimiser, one schedule."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from medformer.errors import UserError
from medformer.schedules import cosine

__all__ = ["Budget", "fit", "fit_together", "optimiser_of"]


Watch = Callable[[int, float, Callable[[], dict[str, Any]]], bool]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every trained method may spend."""

    steps: int
    batch: int
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float = 1.0


def optimiser_of(network: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Matrices and kernels decay; biases, norms and other vectors do not."""
    moving = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in moving if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in moving if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr)


def fit(
    network: nn.Module,
    budget: Budget,
    lr: float,
    seed: int,
    batch_at: Callable[[np.random.Generator], tuple[Tensor, Tensor]],
    loss_at: Callable[[Tensor, Tensor], Tensor],
    run: Callable[..., Any],
    progress: Callable[[Any], Any],
    *,
    watch: Watch | None = None,
    state: dict[str, Any] | None = None,
) -> None:
    """AdamW, linear warm-up, half cosine to 0, gradient norm clipped; `run` is entered for the loss alone.

    Under torch.distributed every process draws batches of its own and gradients are averaged.

    Args:
        watch: asked after every step with the steps done, the loss and a function that gives the state to go on from;
            True ends the training. The network may be evaluated in it.
        state: what that function gave, to go on from.
    """
    fit_together([network], budget, [lr], seed, batch_at, loss_at, run, progress, None, watch=watch, state=state)


def fit_together(
    networks: Sequence[nn.Module],
    budget: Budget,
    lrs: Sequence[float],
    seed: int,
    batch_at: Callable[[np.random.Generator], tuple[Tensor, Tensor]],
    loss_at: Callable[[Tensor, Tensor], Tensor],
    run: Callable[..., Any],
    progress: Callable[[Any], Any],
    shared: Callable[[Tensor], Any] | None,
    *,
    watch: Watch | None = None,
    state: dict[str, Any] | None = None,
) -> None:
    """`fit` of several networks on the same batches, each at its rate, as if each were trained alone.

    A step whose gradient is not finite is skipped; RuntimeWarning says how many were, UserError that all were.

    shared: what their frozen part makes of a batch, computed once and given to each as its second argument.
    watch, state: as of `fit`; the loss is the mean over the networks.
    """
    optimisers = [optimiser_of(network, lr, budget.weight_decay) for network, lr in zip(networks, lrs, strict=True)]
    rank = dist.get_rank() if dist.is_initialized() else 0
    rng = np.random.default_rng((seed, 31, rank) if rank else (seed, 31))
    torch.manual_seed(seed)
    first = 0
    if state is not None:
        for network, optimiser, its, own in zip(
            networks, optimisers, state["networks"], state["optimisers"], strict=True
        ):
            network.load_state_dict(its)
            optimiser.load_state_dict(own)
        first = state["step"]
        if rank:  # the state is that of the first process, whose batches the others must not draw
            rng = np.random.default_rng((seed, 31, rank, first))
        else:
            rng.bit_generator.state = state["numpy"]
        torch.set_rng_state(state["torch"])

    def now(step: int) -> dict[str, Any]:
        return {
            "step": step, "networks": [network.state_dict() for network in networks],
            "optimisers": [optimiser.state_dict() for optimiser in optimisers], "numpy": rng.bit_generator.state,
            "torch": torch.get_rng_state(),
        }  # fmt: skip

    skipped, taken = [0] * len(networks), 0
    for network in networks:
        network.train()
    for step in progress(range(first, budget.steps)):
        x, y = batch_at(rng)
        given: tuple[Any, ...] = (x,)
        if shared is not None:
            with torch.no_grad(), run():
                given = (x, shared(x))
        total = 0.0
        for i, (network, optimiser, lr) in enumerate(zip(networks, optimisers, lrs, strict=True)):
            for group in optimiser.param_groups:
                group["lr"] = cosine(step, budget.steps, lr, 0.0, warmup=round(budget.warmup * budget.steps))
            with run():
                loss = loss_at(network(*given), y)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            _average(network)
            norm = nn.utils.clip_grad_norm_(network.parameters(), budget.clip)
            if math.isfinite(norm.item()):
                optimiser.step()
            else:
                skipped[i] += 1
            if watch is not None:
                total += float(loss.detach())
        taken += 1
        if watch is not None:
            over = watch(step + 1, total / len(networks), partial(now, step + 1))
            for network in networks:
                network.train()
            if over:
                break
    for network in networks:
        network.eval()
    for lr, count in zip(lrs, skipped, strict=True):
        _say_skipped(count, taken, lr)


def _say_skipped(count: int, steps: int, lr: float) -> None:
    """A network that could not learn must not be scored as one that did."""
    said = f"rate {lr:g}: {count} of {steps} steps had a gradient that is not finite and were skipped"
    if count == steps > 0:
        raise UserError(
            f"{said}: nothing was learned; look for infinite voxels or targets, or train with precision fp32"
        )
    if count:
        warnings.warn(f"{said}; a lower rate or precision fp32 may not need that", RuntimeWarning, stacklevel=3)


def _average(network: nn.Module) -> None:
    """Gradients, over the processes of a run under torchrun."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for parameter in network.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
