"""What a model costs at a size of input: parameters, operations, memory. Nothing is computed and no memory is taken."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from medformer.channels import channel_names
from medformer.expire_span import ExpireSpanAttention
from medformer.hopfield import HopfieldAttention
from medformer.image_gpt import ImageGPT
from medformer.models import Model

__all__ = ["Description", "describe"]


@dataclass(frozen=True)
class Description:
    """Costs of one forward pass; as text, a table."""

    parameters: int
    """Learned numbers."""
    trainable: int
    """Those that require a gradient."""
    size: tuple[int, ...]
    """Voxels of the input, zyx."""
    batch: int
    grid: tuple[int, ...]
    """Patch tokens of each axis (places of the last map for a ResNet, tokens of the last level for a TNT)."""
    flops: int
    """Floating-point operations of a forward pass, two for a multiplication with addition, of matrix products,
    convolutions and attention; what is linear in the tokens and elementwise is left out."""
    weight_bytes: int
    """Parameters and buffers."""
    saved_bytes: int
    """What a training step keeps for its backward pass, without checkpointing: activations, each once."""
    channels: tuple[str, ...] = ()
    """What the channels of the input are called, in their order; empty where nobody said."""
    in_channels: int = 1

    def __str__(self) -> str:
        size, grid = ("x".join(map(str, axes)) for axes in (self.size, self.grid))
        flags = f", and {len(self.channels)} flags of missing ones" if self.in_channels > len(self.channels) else ""
        named = [f"channels     {', '.join(self.channels)}, in this order{flags}"] if self.channels else []
        return "\n".join(
            [
                f"parameters   {self.parameters:,} ({self.trainable:,} train)",
                f"weights      {_bytes(self.weight_bytes)}",
                f"input        {self.batch} x {size} voxels, {grid} patches",
                *named,
                f"forward      {self.flops / 1e9:,.2f} GFLOP",
                f"training     {_bytes(self.saved_bytes)} of activations kept for the backward pass",
            ]
        )


def describe(model: Model, size: int | Sequence[int], *, batch: int = 1) -> Description:
    """Count what one pass costs, on shapes alone: `print(medformer.describe(model, 128))`.

    Args:
        model: left as it is.
        size: voxels of the input, one number or one per axis, zyx.
        batch: scans at once.

    Raises:
        ValueError: `size` has another number of axes than the model, is smaller than a patch, or is not that of an
            Image-GPT.
    """
    config = model.config
    axes = (size,) * config.dims if isinstance(size, int) else tuple(size)
    if len(axes) != config.dims or min(axes) < 1 or batch < 1:
        raise ValueError(f"describe: size={size} and batch={batch} must be {config.dims} numbers of voxels and a count")
    grid = model.grid_of(axes)
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = tensor  # held, or its address would be given again
        return tensor

    with FakeTensorMode(), FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        shapes = copy.deepcopy(model, {key: _shape(t) for key, t in tensors.items()}).train()
        weights = {p.untyped_storage()._cdata for p in shapes.parameters()}
        for module in shapes.modules():
            if isinstance(module, HopfieldAttention):
                module.tolerance = None  # shapes never come to rest
            elif isinstance(module, ExpireSpanAttention):
                module._trim = module._within_reach  # what has expired is not seen in shapes: the most that may live
        x = torch.empty(batch, config.in_channels, *axes, dtype=next(shapes.parameters()).dtype)
        if isinstance(model, ImageGPT):  # which reads the tokens of its codebook
            x = torch.empty(batch, math.prod(grid), dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            shapes(x)
    return Description(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        size=axes,
        batch=batch,
        grid=tuple(grid),
        flops=counter.get_total_flops(),
        weight_bytes=sum(t.numel() * t.itemsize for t in tensors.values()),
        channels=channel_names(model),
        in_channels=config.in_channels,
        saved_bytes=sum(tensor.untyped_storage().nbytes() for tensor in kept.values()),
    )


def _shape(tensor: Tensor) -> Tensor:
    shape = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(shape, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape


def _performer_state(k: Any, v: Any, omega: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(k[:3]) * omega[-2] * (k[3] + v[3])


def _performer_read(q: Any, omega: Any, values: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(q[:3]) * omega[-2] * (q[3] + values[3])


def _performer_causal(q: Any, k: Any, v: Any, omega: Any, *_: Any, **__: Any) -> int:
    return _performer_state(k, v, omega) + 2 * math.prod(q[:3]) * omega[-2] * (q[3] + v[3])


def _tnt_inner_block(x: Any, *weights: Any, **__: Any) -> int:
    sequences, tokens, width = x
    matrices = sum(math.prod(weight) for weight in weights if isinstance(weight, torch.Size) and len(weight) == 2)
    return 2 * sequences * tokens * (matrices + 2 * tokens * width)


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + v[3])


# Operators that torch's counter does not know.
_FORMULAS: dict[Any, Any] = {
    torch.ops.medformer.performer_state: _performer_state,
    torch.ops.medformer.performer_read: _performer_read,
    torch.ops.medformer.performer_causal: _performer_causal,
    torch.ops.medformer.disentangled_forward: _attention,
    torch.ops.medformer.tnt_inner_block: _tnt_inner_block,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}


def _bytes(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"
