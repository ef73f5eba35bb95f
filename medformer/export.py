"""Networks into files that run without medformer: `torch.export` programs (.pt2) and ONNX."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medformer.backbone import Backbone
from medformer.image_gpt import ImageGPT
from medformer.resnet import ResNet
from medformer.tnt import TNT

__all__ = ["Exported", "TokensOf", "export"]

Dynamic = Literal["size", "batch", "nothing"]
_NEAR = 1e-4


class TokensOf(nn.Module):
    """A backbone whose call gives (class vector (B, C), patch tokens (B, N, C)), for exports that keep the tokens."""

    def __init__(self, model: Backbone | ResNet | TNT) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.forward_features(x)
        return features.cls, features.patches


class Exported(dict[tuple[int, ...], float]):
    """Largest difference from PyTorch for each input shape that the file was run with."""


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    size: int | Sequence[int] | None = None,
    shape: Sequence[int] | None = None,
    dynamic: Dynamic = "size",
    format: Literal["onnx", "pt2"] | None = None,
) -> Exported:
    """Write `model`, in evaluation mode and on the CPU, to a file; read it back, run it and compare it with PyTorch.

    ONNX holds standard operators alone: FAVOR+, Nystrom, disentangled and inner attention are written as they are
    defined, in memory that grows with tokens times features (causal FAVOR+: tokens squared).

    Args:
        model: a network of medformer, or any module of one tensor that gives one tensor or several.
        path: file to write, *.onnx or *.pt2.
        size: voxels of the example, one number or one per axis; None: what the network's positions were made for.
        shape: of the example with batch and channels, for modules that are no network of medformer.
        dynamic: size leaves batch and size open, batch the batch alone, nothing neither. What does not trace with open
            sizes is refused, not fixed.
        format: None takes the ending of `path`.

    Returns:
        Largest difference for each shape that was run: the example, and with dynamic another batch and size.

    Raises:
        ValueError: an unknown format, a shape that the model does not take, or a file that gives other numbers.
        ModuleNotFoundError: ONNX needs the packages of `pip install 'medformer[export]'`.
    """
    path = Path(path)
    kind = format or _format_of(path)
    if kind not in ("onnx", "pt2"):
        raise ValueError(f"medformer.export: format={kind!r} must be 'onnx' or 'pt2'")
    if dynamic not in ("size", "batch", "nothing"):
        raise ValueError(f"medformer.export: dynamic={dynamic!r} must be 'size', 'batch' or 'nothing'")
    owner = model.model if isinstance(model, TokensOf) else model
    shape = _shape(owner, size, shape)
    was_training, device = model.training, next(iter(model.parameters()), torch.zeros(0)).device
    model.eval().cpu()
    try:
        shapes = _shapes(owner, shape, dynamic)
        x = _example(owner, shapes[0])
        _run(model, x)
        axes = {"size": [0, *range(2, x.ndim)], "batch": [0], "nothing": []}[dynamic]
        open_axes = (dict.fromkeys(axes, torch.export.Dim.DYNAMIC),) if axes else None
        partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
        try:
            run = (_onnx if kind == "onnx" else _pt2)(model, x, open_axes, partial)
            found = Exported()
            for one in shapes:
                x = _example(owner, one)
                found[one] = _difference(_run(model, x), _traced(run, x, what=f"the file does not take {one}: "))
            worst = max(found.values())
            if not worst <= _NEAR:
                what = f"differs from PyTorch by {worst:.1e}, over {_NEAR}; it was not kept"
                raise ValueError(f"medformer.export: the {kind} file {what}")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    finally:
        model.train(was_training).to(device)
    return found


def _format_of(path: Path) -> str:
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"medformer.export: {path.name} must end in .onnx or .pt2, or give format=")
    return path.suffix[1:]


def _shape(model: nn.Module, size: int | Sequence[int] | None, shape: Sequence[int] | None) -> tuple[int, ...]:
    if shape is not None:
        return tuple(shape)
    if isinstance(model, ImageGPT):
        return 2, model.config.tokens
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "dims") or not hasattr(config, "in_channels"):
        raise ValueError(f"medformer.export: {type(model).__name__} says no size; give shape=(batch, channels, ...)")
    dims = config.dims
    if size is None:
        axes = _own_size(model)
    else:
        axes = (size,) * dims if isinstance(size, int) else tuple(size)
    if len(axes) != dims:
        raise ValueError(f"medformer.export: size={size} must be one number or {dims}, one per axis (zyx)")
    return 2, config.in_channels, *axes


def _own_size(model: nn.Module) -> tuple[int, ...]:
    config: Any = model.config
    if isinstance(model, Backbone) and model.stem is None and not config.patch_transposed:
        parts = zip(config.base_grid, config.kernel, config.stride, config.padding, config.dilation, strict=True)
        return tuple((g - 1) * s + d * (k - 1) + 1 - 2 * p for g, k, s, p, d in parts)
    return (224,) * 2 if config.dims == 2 else (64,) * 3


def _shapes(model: nn.Module, shape: tuple[int, ...], dynamic: str) -> list[tuple[int, ...]]:
    """The example and, where axes are open, others."""
    batch, channels, *axes = shape
    # torch.export takes an example of one sample for a batch that is always one.
    first = (max(batch, 2), channels, *axes) if dynamic != "nothing" else shape
    if dynamic == "nothing":
        return [first]
    if dynamic == "batch" or isinstance(model, ImageGPT):
        return [first, (3, channels, *axes)]
    return [first, (1, channels, *(n + max(math.ceil(n / 2), 1) for n in axes))]


def _example(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, ImageGPT):
        return torch.randint(0, model.config.vocabulary, shape, generator=generator)
    return torch.randn(shape, generator=generator).to(next(iter(model.parameters()), torch.zeros(0)).dtype)


def _run(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = model(x)
    return [out] if isinstance(out, Tensor) else list(out)


def _difference(wanted: list[Tensor], found: list[Tensor]) -> float:
    for one, other in zip(wanted, found, strict=True):
        if one.shape != other.shape:
            raise ValueError(f"medformer.export: the file gives {tuple(other.shape)} and PyTorch {tuple(one.shape)}")
    return max((a.float() - b.float()).abs().max().item() if a.numel() else 0.0 for a, b in zip(wanted, found))  # noqa: B905


def _traced(function: Any, *args: Any, what: str = "", **options: Any) -> Any:
    try:
        return function(*args, **options)
    except Exception as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200]
        raise ValueError(
            f"medformer.export: {what}{type(cause).__name__}: {reason}; dynamic='batch' exports one size, "
            "another module one that torch.export traces"
        ) from error


def _pt2(model: nn.Module, x: Tensor, axes: Any, path: Path) -> Any:
    program = _traced(torch.export.export, model, (x,), dynamic_shapes=axes)
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    return lambda x: _run(loaded, x)


def _onnx(model: nn.Module, x: Tensor, axes: Any, path: Path) -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # what torch.onnx writes with
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"medformer.export: format='onnx' needs {error.name}; pip install 'medformer[export]'"
        ) from error
    # A small graph, which every runtime reads: no copies of functions that PyTorch would inline.
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it remarks on operators of torchvision, which no model here has
    try:
        program = _traced(torch.onnx.export, model, (x,), dynamo=True, verbose=False, dynamic_shapes=axes)
    finally:
        logger.setLevel(level)
    program.save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(out) for out in session.run(None, {name: x.numpy()})]
