"""Tensors into a model: inflation to 3D, other input channels, and what does not fit, all listed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["built", "filled", "fit_kernel"]


def built(kind: Any, config: Any) -> Any:
    """A model whose start values, which the weights replace, take nothing from torch's generator."""
    with torch.random.fork_rng(devices=[]):
        return kind(config)


def fit_kernel(weight: Tensor, wanted: Tensor) -> Tensor:
    """A 2D kernel for 3D (repeated, divided by its depth), and for other input channels (their sum, shared out)."""
    if wanted.ndim == weight.ndim + 1:
        weight = weight.unsqueeze(2).expand(-1, -1, wanted.shape[2], -1, -1) / wanted.shape[2]
    if weight.ndim == wanted.ndim and weight.shape[1] != wanted.shape[1]:
        weight = weight.sum(1, keepdim=True).expand(-1, wanted.shape[1], *weight.shape[2:]) / wanted.shape[1]
    return weight


def filled(caller: str, model: Any, state: Mapping[str, Tensor], strict: bool, hint: str = "") -> Any:
    """`model` with `state`; ValueError where a tensor has no place or a place no tensor, or (not strict) a warning."""
    expected = model.state_dict()
    # The features of FAVOR+ are drawn, not learned, and none of these weights has them.
    drawn = {name for name in expected if name.endswith((".omega", ".draws"))}
    missing = expected.keys() - state.keys() - drawn
    problems = [f"{name} is missing" for name in missing]
    problems += [f"{name} is unknown" for name in state.keys() - expected.keys()]
    for name in expected.keys() & state.keys():
        found, wanted = tuple(state[name].shape), tuple(expected[name].shape)
        if found != wanted:
            problems.append(f"{name} has shape {found} instead of {wanted}")
    if problems:
        message = f"{caller}: {len(problems)} tensors do not fit {model.config}: {'; '.join(sorted(problems))}{hint}"
        if strict:
            raise ValueError(f"{message}. strict=False loads the rest")
        warnings.warn(f"{message}. These were left at their start values or ignored", stacklevel=4)
    dtype = next(model.parameters()).dtype
    fits = {
        name: tensor.contiguous().to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
        if name in expected and tensor.shape == expected[name].shape
    }
    nn.Module.load_state_dict(model, fits, strict=False)
    return model
