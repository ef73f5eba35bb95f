"""Residual networks in 2D and 3D, with the parameter names of torchvision, timm and MedicalNet.

Shape legend: B batch, Cin image channels, C channels of the last stage, N places of its map, Z Y X voxels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medformer.checks import check, check_choice, check_whole
from medformer.features import Features, layers_of, split_tokens, whole_mask

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["BLOCKS", "ResNet", "ResNetConfig"]

BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
_GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Everything that decides the shape of a `ResNet`."""

    dims: int = 3
    """Spatial axes of the input: 3 for volumes (Z, Y, X), 2 for images (Y, X)."""
    in_channels: int = 1
    """Channels of the input."""
    depth: Literal[10, 18, 34, 50, 101] = 50
    """Layers with weights; 50 and 101 have bottlenecks."""
    base_width: int = 64
    """Channels of the first stage; they double with every stage."""
    stages: int = 4
    """Stages that are built, 1 to 4; fewer make a convolutional stem."""
    norm: Literal["group", "batch"] = "group"
    """group: GroupNorm and standardised convolution weights, for the small batches of volumes. batch: BatchNorm, which
    published weights need."""
    shortcut: Literal["conv", "pad"] = "conv"
    """What a skip does where channels change: a 1x1 convolution, or zeros for the new channels (no parameters;
    MedicalNet's 18 and 34 are made so)."""
    output_stride: Literal[8, 16, 32] = 32
    """Voxels per place of the last map: below 32 the last stages dilate instead of stepping (MedicalNet: 8)."""
    classes: int = 0
    """Outputs of a linear head on the mean of the last map; 0 for none."""

    def __post_init__(self) -> None:
        choices = {"dims": (2, 3), "depth": tuple(BLOCKS), "stages": (1, 2, 3, 4), "norm": ("group", "batch"),
                   "shortcut": ("conv", "pad"), "output_stride": (8, 16, 32)}  # fmt: skip
        for name, known in choices.items():
            check_choice(self, name, known)
        check_whole(self, 1, "in_channels", "base_width")
        check_whole(self, 0, "classes")
        check(
            self,
            self.norm == "batch" or self.base_width % _GROUPS == 0,
            f"base_width={self.base_width} must be a multiple of {_GROUPS} with norm='group'",
        )
        check(self, not self.classes or self.stages == 4, f"classes={self.classes} needs stages=4, not {self.stages}")

    @property
    def expansion(self) -> int:
        """Channels out of a block as a multiple of those inside."""
        return 4 if self.depth >= 50 else 1

    @property
    def width(self) -> int:
        """Channels of the last map."""
        return self.base_width * 2 ** (self.stages - 1) * self.expansion

    @property
    def strides(self) -> tuple[int, ...]:
        """Step of each stage, after the factor 4 in front of the first."""
        most = {8: 1, 16: 2, 32: 3}[self.output_stride]
        return tuple(2 if 1 <= stage <= most else 1 for stage in range(self.stages))

    @property
    def step(self) -> int:
        """Voxels from one place of the last map to the next."""
        return 4 * math.prod(self.strides)


class ResNet(nn.Module):
    """A residual network over a volume (or image) of any size.

    Source: He et al. 2016; bottlenecks step in their 3x3 convolution, as torchvision's do.

    >>> model = ResNet(ResNetConfig(dims=2, in_channels=3, depth=50, norm="batch", classes=1000))
    >>> sum(p.numel() for p in model.parameters())
    25557032

    Attributes:
        config: what it was built from.
        checkpoint_activations: in training, keep only each block's input and compute the rest again in backward.
    """

    origin: object = None
    """Of weights that others trained: `medformer.weights.Origin`."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        base = config.base_width
        self.conv1 = _conv(config, config.in_channels, base, 7, stride=2)
        self.bn1 = _norm(config, base)
        width = base
        for stage, (count, stride) in enumerate(zip(BLOCKS[config.depth], config.strides, strict=False)):
            # A stage that does not step looks further instead, so that what it sees stays the same.
            dilation = 2 ** sum(step == 1 for step in config.strides[1 : stage + 1])
            blocks = []
            for i in range(count):
                blocks.append(_Block(config, width, base * 2**stage, stride=stride if i == 0 else 1, dilation=dilation))
                width = base * 2**stage * config.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(width, config.classes) if config.classes else None
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "B Cin *size"]) -> Float[Tensor, "B C"]:
        """The mean of the last map, or the head's outputs where there is one."""
        cls = self.stage_maps(x)[-1].flatten(2).mean(dim=2)
        return cls if self.fc is None else self.fc(cls)

    def forward_features(
        self, x: Float[Tensor, "B Cin *size"], *, mask: None = None, key_padding_mask: Bool[Tensor, "B N"] | None = None
    ) -> Features:
        """The last map as patches, and their mean as the class vector.

        Args:
            x: volumes (B, Cin, Z, Y, X) or images (B, Cin, Y, X), floating point.
            mask: None; there is no mask token to put in.
            key_padding_mask: True where a place of the last map is real. What is under the others is never read,
                neither by convolutions nor by group norms: a scan in a larger batch gives what it gives alone, padded
                with zeros to whole places.

        Raises:
            ValueError: `x` or a mask has the wrong shape, or BatchNorm would have to learn from a padded batch.
            TypeError: `x` holds whole numbers.
        """
        if mask is not None:
            raise ValueError("ResNet.forward_features: a ResNet has no mask token; leave mask out")
        return self.get_intermediate_layers(x, key_padding_mask=key_padding_mask)[0]

    def get_intermediate_layers(
        self,
        x: Float[Tensor, "B Cin *size"],
        layers: int | Sequence[int] = 1,
        *,
        key_padding_mask: Bool[Tensor, "B N"] | None = None,
    ) -> list[Features]:
        """What several stages give, finest first, each with a width and a grid of its own.

        Args:
            x: as for `forward_features`.
            layers: how many stages, counted from the end, or which ones (negative numbers count from the end).
            key_padding_mask: as for `forward_features`, of the last stage's places.

        Raises:
            IndexError: no such stage.
        """
        wanted = layers_of("ResNet", layers, self.config.stages)
        found = []
        for stage, (places, real) in enumerate(zip(*self._maps(x, key_padding_mask), strict=True)):
            if stage in wanted:
                real = None if real is None else real.flatten(1)
                found.append(split_tokens(places.flatten(2).mT, tuple(places.shape[2:]), False, 0, real))
        return found

    def stage_maps(
        self, x: Float[Tensor, "B Cin *size"], *, key_padding_mask: Bool[Tensor, "B N"] | None = None
    ) -> list[Float[Tensor, "B Cs *grid"]]:
        """The map behind every stage, finest first; arguments and errors as for `forward_features`."""
        return self._maps(x, key_padding_mask)[0]

    def _maps(self, x: Tensor, key_padding_mask: Tensor | None) -> tuple[list[Tensor], list[Tensor | None]]:
        """Map and real places (B, 1, *grid) of every stage."""
        dims, channels = self.config.dims, self.config.in_channels
        if x.ndim != dims + 2 or x.shape[1] != channels:
            axes = "Z, Y, X" if dims == 3 else "Y, X"
            raise ValueError(f"ResNet: input of shape {tuple(x.shape)} must be (batch, {channels}, {axes})")
        if not x.is_floating_point():
            raise TypeError(f"ResNet: input of dtype {x.dtype} must be floating point; scale it first")
        size = x.shape[2:]
        grid = self.grid_of(size)
        last = whole_mask("ResNet", key_padding_mask, (x.shape[0], math.prod(grid)), grid, 0)

        def real_at(step: int) -> Tensor | None:
            """Where places `step` voxels apart are real."""
            if last is None:
                return None
            apart = (self.config.step // step,) * dims
            return spread(last.unflatten(1, grid)[:, None], apart, apart, [-(-n // step) for n in size])

        voxels = real_at(1)
        x = x if voxels is None else torch.where(voxels, x, 0.0)
        x = F.relu(_normed(self.bn1, self.conv1(x), real_at(2)), inplace=True)
        x = _pooled(x)
        step, before = 4, real_at(4)
        x = x if before is None else torch.where(before, x, 0.0)
        maps, reals = [], []
        for stage, stride in zip(self.stages, self.config.strides, strict=True):
            step *= stride
            after = real_at(step)
            for block in stage:  # type: ignore[attr-defined]
                if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                    x = _checkpointed(block, x, before, after)
                else:
                    x = block(x, before, after)
                before = after
            maps.append(x)
            reals.append(after)
        return maps, reals

    @property
    def stages(self) -> list[nn.Module]:
        """The stages, finest first."""
        return [self.get_submodule(f"layer{stage + 1}") for stage in range(self.config.stages)]

    def grid_of(self, size: Sequence[int]) -> tuple[int, ...]:
        """Places of the last map for an input of `size` voxels (zyx)."""
        return tuple(-(-n // self.config.step) for n in size)


class _Block(nn.Module):
    """Two 3x3 convolutions, or the bottleneck of 1x1, 3x3 and 1x1, around a skip."""

    def __init__(self, config: ResNetConfig, width_in: int, width: int, *, stride: int, dilation: int) -> None:
        super().__init__()
        out = width * config.expansion
        self.stride, self.extra = stride, out - width_in
        if config.expansion == 1:
            self.conv1 = _conv(config, width_in, width, 3, stride=stride, dilation=dilation)
            self.conv2 = _conv(config, width, width, 3, dilation=dilation)
            self.conv3 = self.bn3 = None
        else:
            self.conv1 = _conv(config, width_in, width, 1)
            self.conv2 = _conv(config, width, width, 3, stride=stride, dilation=dilation)
            self.conv3 = _conv(config, width, out, 1)
        self.bn1, self.bn2 = _norm(config, width), _norm(config, width)
        if self.conv3 is not None:
            self.bn3 = _norm(config, out)
        self.downsample = None
        if config.shortcut == "conv" and (stride != 1 or self.extra):
            self.downsample = nn.Sequential(_conv(config, width_in, out, 1, stride=stride), _norm(config, out))

    def forward(self, x: Tensor, before: Tensor | None = None, after: Tensor | None = None) -> Tensor:
        """`before` and `after` (B, 1, *grid): where the places that come in and go out are real; None: everywhere."""
        first = after if self.conv3 is None else before  # a bottleneck steps in its second convolution
        y = F.relu(_normed(self.bn1, self.conv1(x), first), inplace=True)
        y = _normed(self.bn2, self.conv2(y), after)
        if self.conv3 is not None and self.bn3 is not None:
            y = _normed(self.bn3, self.conv3(F.relu(y, inplace=True)), after)
        if self.downsample is not None:
            x = _normed(self.downsample[1], self.downsample[0](x), after)
        elif self.stride != 1 or self.extra:
            steps = (slice(None, None, self.stride),) * (x.ndim - 2)
            x = F.pad(x[:, :, *steps], (0, 0) * (x.ndim - 2) + (0, self.extra))
        return F.relu(x + y, inplace=True)


class _StandardConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, _standardise(self.weight), self.bias)


class _StandardConv3d(nn.Conv3d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, _standardise(self.weight), self.bias)


def _standardise(weight: Tensor) -> Tensor:
    """Mean 0 and variance 1 / fan-in for every output channel. Source: Qiao et al. 2019, section 3."""
    exact = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    exact = exact - exact.mean(dim=1, keepdim=True)
    squares = exact.square().sum(dim=1, keepdim=True)  # var_mean takes a CPU five times as long
    return (exact * torch.rsqrt(squares.clamp(min=1e-8))).view_as(weight).to(weight.dtype)


def _pooled(x: Tensor) -> Tensor:
    """The largest of 3 x 3 (x 3) neighbours, at every second place."""
    pool, last = (F.max_pool3d, torch.channels_last_3d) if x.ndim == 5 else (F.max_pool2d, torch.channels_last)
    if x.is_cpu and not (x.requires_grad and torch.is_grad_enabled()):
        # Channels last are a vector to a CPU: 4 to 5 times as fast. The gradient gains nothing, in 3D it loses.
        return pool(x.contiguous(memory_format=last), 3, 2, 1).contiguous()
    return pool(x, 3, 2, 1)


def _conv(
    config: ResNetConfig, width_in: int, width: int, kernel: int, *, stride: int = 1, dilation: int = 1
) -> nn.Module:
    kinds: dict[Any, Any] = {
        ("batch", 2): nn.Conv2d, ("batch", 3): nn.Conv3d, ("group", 2): _StandardConv2d, ("group", 3): _StandardConv3d,
    }  # fmt: skip
    kind = kinds[config.norm, config.dims]
    padding = dilation * (kernel // 2)
    return kind(width_in, width, kernel, stride=stride, padding=padding, dilation=dilation, bias=False)


def _norm(config: ResNetConfig, width: int) -> nn.Module:
    if config.norm == "group":
        return nn.GroupNorm(_GROUPS, width)
    return nn.BatchNorm2d(width) if config.dims == 2 else nn.BatchNorm3d(width)


def _checkpointed(block: nn.Module, *inputs: Tensor | None) -> Tensor:
    """The block, of which backward computes all but the inputs again, without counting the batch again."""
    # A compiled block is a function of its statistics, which changes them once, and dynamo takes no such context.
    compiling = torch.compiler.is_compiling()
    more: Any = {} if compiling else {"context_fn": lambda: (nullcontext(), _counting_nothing(block))}
    return cast(Tensor, checkpoint(block, *inputs, use_reentrant=False, **more))


@contextmanager
def _counting_nothing(block: nn.Module) -> Iterator[None]:
    norms = [norm for norm in block.modules() if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d)]
    kept = [(norm.momentum, cast(Tensor, norm.num_batches_tracked).clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            cast(Tensor, norm.num_batches_tracked).copy_(batches)


def _normed(norm: nn.Module, x: Float[Tensor, "B C *grid"], real: Bool[Tensor, "B 1 *grid"] | None) -> Tensor:
    """`norm` over the real places; 0 at the others."""
    if real is None:
        return norm(x)
    if not isinstance(norm, nn.GroupNorm):
        if norm.training:
            raise ValueError(
                "ResNet: key_padding_mask in training needs norm='group'; BatchNorm would count the padding, and takes "
                "it in eval() only"
            )
        return torch.where(real, norm(x), 0.0)
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    exact = exact.unflatten(1, (norm.num_groups, -1))  # (B, G, C / G, *grid)
    real, axes = real[:, None], tuple(range(2, exact.ndim))
    count = (real.sum(axes, keepdim=True) * exact.shape[2]).clamp(min=1)
    centred = torch.where(real, exact - torch.where(real, exact, 0.0).sum(axes, keepdim=True) / count, 0.0)
    variance = centred.square().sum(axes, keepdim=True) / count
    y = (centred * torch.rsqrt(variance + norm.eps)).flatten(1, 2)
    gain, offset = (p.view(-1, *[1] * (x.ndim - 2)) for p in (norm.weight, norm.bias))
    return torch.where(real[:, 0], y * gain + offset, 0.0)


def spread(
    real: Bool[Tensor, "B 1 *grid"], reach: Sequence[int], stride: Sequence[int], size: Sequence[int]
) -> Bool[Tensor, "B 1 *size"]:
    """What is under real places, each of which covers `reach` finer ones, `stride` apart."""
    weight = torch.ones(1, 1, *reach, device=real.device)
    transposed = F.conv_transpose3d if len(reach) == 3 else F.conv_transpose2d
    covered = transposed(real.float(), weight, stride=tuple(stride)) > 0
    short = [(0, wanted - found) for wanted, found in zip(size, covered.shape[2:], strict=True)]
    return F.pad(covered, [n for pair in reversed(short) for n in pair])
