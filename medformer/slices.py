"""Encoders of images for volumes: every slice on its own, then attention across the slices.

Shape legend: B batch, Cin channels, C width, S slices that are looked at, n patches of a slice, Z Y X voxels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medformer.backbone import Backbone, BackboneConfig
from medformer.checks import check, check_choice, check_switches, check_whole
from medformer.features import Features, layers_of, whole_mask
from medformer.resnet import ResNet, ResNetConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["SliceEncoder", "SliceEncoderConfig", "SlicePooling"]

# Slices of a frozen encoder that are computed together.
_TOGETHER = 32


@dataclass(frozen=True, kw_only=True)
class SliceEncoderConfig:
    """Everything that decides the shape of a `SliceEncoder`."""

    encoder: BackboneConfig | ResNetConfig
    """Of images (dims=2), without classes."""
    channels: str = "repeat"
    """repeat: each slice fills all channels of the encoder. neighbours: the channels are the slice and those around it
    (an odd number of them), the first and last repeated at the ends."""
    slice_step: int = 1
    """Every which slice is looked at."""
    heads: int = 1
    """Of the attention across slices; must divide the encoder's width."""
    frozen: bool = True
    """The encoder learns nothing and stays in evaluation mode."""
    classes: int = 0
    """Outputs of a linear head on the pooled vector; 0 for none."""

    def __post_init__(self) -> None:
        encoder: Any = self.encoder
        if isinstance(encoder, Mapping):  # from JSON
            kind = ResNetConfig if "base_width" in encoder else BackboneConfig
            known = {field.name for field in fields(kind)}
            unknown = sorted(encoder.keys() - known)
            check(self, not unknown, f"encoder has unknown fields {', '.join(unknown)}")
            object.__setattr__(self, "encoder", kind(**encoder))
        check(
            self,
            isinstance(self.encoder, BackboneConfig | ResNetConfig) and self.encoder.dims == 2,
            "encoder must be a BackboneConfig or ResNetConfig with dims=2",
        )
        check(self, self.encoder.classes == 0, f"encoder has classes={self.encoder.classes}; build it with 0")
        check_choice(self, "channels", ("repeat", "neighbours"))
        check_whole(self, 1, "slice_step", "heads")
        check_whole(self, 0, "classes")
        check_switches(self, "frozen")
        check(
            self,
            self.channels == "repeat" or self.encoder.in_channels % 2 == 1,
            f"channels='neighbours' needs an odd in_channels of the encoder, not {self.encoder.in_channels}",
        )
        check(self, self.width % self.heads == 0, f"heads={self.heads} must divide the encoder's width {self.width}")

    @property
    def dims(self) -> int:
        """Axes of the input: 3."""
        return 3

    @property
    def in_channels(self) -> int:
        """Of the volumes: 1."""
        return 1

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.encoder.width

    @property
    def class_token(self) -> bool:
        """The pooled vector stands for it."""
        return True

    @property
    def prefix(self) -> int:
        """No token lies in front of the patches."""
        return 0


class SlicePooling(nn.Module):
    """A weighted mean over slices, whose weights are learned; it starts as the plain mean.

    Weights are softmax over slices of w tanh(V norm(x)), one set a head, each over its share of the channels.
    Source: Ilse et al. 2018, eq. (8). Differs: heads, a norm, and w that starts at 0.

    Args:
        width: channels, which `heads` must divide.
        heads: sets of weights.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width)
        self.score = nn.Linear(width, heads)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, x: Float[Tensor, "B S C"], real: Bool[Tensor, "B S"] | None = None) -> Float[Tensor, "B C"]:
        """`real`: True where a slice is; a sample without any gives 0."""
        scores = self.score(torch.tanh(self.hidden(self.norm(x))))  # (B, S, heads)
        if real is not None:
            x = torch.where(real[..., None], x, 0.0)
            scores = scores.masked_fill(~real[..., None], torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=1)
        heads = weights.shape[-1]
        return (weights[..., None] * x.unflatten(-1, (heads, -1))).sum(dim=1).flatten(1)


class SliceEncoder(nn.Module):
    """An encoder of images over the slices of a volume (z), and attention across them.

    >>> config = SliceEncoderConfig(encoder=ResNetConfig(dims=2, in_channels=3, depth=10, norm="batch"))
    >>> SliceEncoder(config)(torch.zeros(1, 1, 5, 32, 32)).shape
    torch.Size([1, 512])

    Attributes:
        config: what it was built from.
        encoder: the `Backbone` or `ResNet` of images.
    """

    origin: object = None
    """Of weights that others trained: that of the encoder."""

    def __init__(self, config: SliceEncoderConfig) -> None:
        super().__init__()
        self.config = config
        encoder = config.encoder
        self.encoder = Backbone(encoder) if isinstance(encoder, BackboneConfig) else ResNet(encoder)
        self.pool = SlicePooling(config.width, config.heads)
        self.head = nn.Linear(config.width, config.classes) if config.classes else None
        if config.frozen:
            self.encoder.requires_grad_(False).eval()

    @classmethod
    def over(cls, encoder: Backbone | ResNet, **options: Any) -> SliceEncoder:
        """Over an encoder that has weights, for example of `load_pretrained`; its head, if any, is left out.

        Args:
            encoder: of images; it is copied.
            options: fields of `SliceEncoderConfig`.
        """
        if not isinstance(encoder, Backbone | ResNet):
            raise TypeError(f"SliceEncoder.over: {type(encoder).__name__} must be a Backbone or a ResNet of images")
        fitting = replace(encoder.config, classes=0)
        model = cls(SliceEncoderConfig(encoder=fitting, **options))
        state = {n: t for n, t in encoder.state_dict().items() if n.partition(".")[0] not in ("head", "fc")}
        model.encoder.load_state_dict(copy.deepcopy(state))
        model.origin = encoder.origin
        return model

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Blocks or stages of the encoder."""
        return self.encoder.stages if isinstance(self.encoder, ResNet) else list(self.encoder.blocks)

    @property
    def checkpoint_activations(self) -> bool:
        """Of the encoder."""
        return self.encoder.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, value: bool) -> None:
        self.encoder.checkpoint_activations = value

    def train(self, mode: bool = True) -> SliceEncoder:
        super().train(mode)
        if self.config.frozen:
            self.encoder.eval()
        return self

    def forward(self, x: Float[Tensor, "B 1 Z Y X"]) -> Float[Tensor, "B C"]:
        """The pooled vector, or the head's outputs where there is one."""
        cls = self.forward_features(x).cls
        return cls if self.head is None else self.head(cls)

    def forward_features(
        self,
        x: Float[Tensor, "B 1 Z Y X"],
        *,
        mask: None = None,
        key_padding_mask: Bool[Tensor, "B N"] | None = None,
    ) -> Features:
        """Patches of every slice that is looked at, and the slices' class vectors, pooled.

        Args:
            x: volumes, floating point, scaled as the encoder was trained.
            mask: None; there is no mask token for volumes.
            key_padding_mask: True where a patch is real; a slice without any is left out of the pooling.

        Raises:
            ValueError: `x` or a mask has the wrong shape.
        """
        if mask is not None:
            raise ValueError("SliceEncoder.forward_features: mask is for encoders of volumes; leave mask out")
        return self.get_intermediate_layers(x, key_padding_mask=key_padding_mask)[0]

    def get_intermediate_layers(
        self,
        x: Float[Tensor, "B 1 Z Y X"],
        layers: int | Sequence[int] = 1,
        *,
        norm: bool = True,
        key_padding_mask: Bool[Tensor, "B N"] | None = None,
    ) -> list[Features]:
        """What several blocks or stages give; all but the last one's vectors are plain means over slices.

        Args:
            x: as for `forward_features`.
            layers: how many, counted from the end, or which ones (negative numbers count from the end).
            norm: apply the encoder's final norm; a `ResNet` has none.
            key_padding_mask: as for `forward_features`.

        Raises:
            IndexError: no such layer.
        """
        if x.ndim != 5 or x.shape[1] != 1:
            raise ValueError(f"SliceEncoder: input of shape {tuple(x.shape)} must be (batch, 1, Z, Y, X)")
        depth = len(self.blocks)
        wanted = layers_of("SliceEncoder", layers, depth)
        grid = self.grid_of(x.shape[2:])
        batch, slices = x.shape[0], grid[0]
        images = self._images(x)
        shape = (batch, slices * grid[1] * grid[2])
        key_padding_mask = whole_mask("SliceEncoder", key_padding_mask, shape, grid, 0)
        real = inner = None
        if key_padding_mask is not None:
            inner = key_padding_mask.unflatten(1, (slices, -1)).flatten(0, 1)
            real = inner.any(dim=1).unflatten(0, (batch, slices))
        found = []
        for layer, features in zip(sorted(wanted), self._encoded(images, sorted(wanted), norm, inner), strict=True):
            vectors = features.cls.unflatten(0, (batch, slices))
            if layer == depth - 1:
                cls = self.pool(vectors, real)
            elif real is None:
                cls = vectors.mean(dim=1)
            else:
                count = real.sum(dim=1, keepdim=True).clamp(min=1)
                cls = torch.where(real[..., None], vectors, 0.0).sum(dim=1) / count
            patches = features.patches.unflatten(0, (batch, slices)).flatten(1, 2)
            found.append(
                Features(cls=cls, registers=patches[:, :0], patches=patches, grid=(slices, *features.grid))
            )  # fmt: skip
        return found

    def grid_of(self, size: Sequence[int]) -> tuple[int, ...]:
        """Slices that are looked at, and the encoder's grid, for a volume of `size` voxels (zyx)."""
        if len(size) != 3:
            raise ValueError(f"SliceEncoder: size={tuple(size)} must have three axes (zyx)")
        return -(-size[0] // self.config.slice_step), *self.encoder.grid_of(size[1:])

    def _images(self, x: Tensor) -> Tensor:
        """(B S, channels of the encoder, Y, X)."""
        channels, step = self.config.encoder.in_channels, self.config.slice_step
        if self.config.channels == "repeat":
            return x[:, :, ::step].transpose(1, 2).flatten(0, 1).expand(-1, channels, -1, -1)
        around = channels // 2
        ends = torch.cat(
            [x[:, :, :1].expand(-1, -1, around, -1, -1), x, x[:, :, -1:].expand(-1, -1, around, -1, -1)], 2
        )
        stacks = [ends[:, 0, i : i + x.shape[2]][:, ::step] for i in range(channels)]
        return torch.stack(stacks, dim=2).flatten(0, 1)

    def _encoded(self, images: Tensor, layers: list[int], norm: bool, mask: Tensor | None) -> list[Features]:
        more: dict[str, Any] = {} if isinstance(self.encoder, ResNet) else {"norm": norm}
        if not self.config.frozen or torch.compiler.is_compiling():
            return self.encoder.get_intermediate_layers(images, layers, key_padding_mask=mask, **more)
        parts = []
        with torch.no_grad():
            for start in range(0, max(images.shape[0], 1), _TOGETHER):
                some = slice(start, start + _TOGETHER)
                inner = None if mask is None else mask[some]
                parts.append(
                    self.encoder.get_intermediate_layers(images[some], layers, key_padding_mask=inner, **more)
                )  # fmt: skip
        return [
            Features(
                cls=torch.cat([one.cls for one in same]), registers=torch.cat([one.registers for one in same]),
                patches=torch.cat([one.patches for one in same]), grid=same[0].grid,
            )
            for same in zip(*parts, strict=True)
        ]  # fmt: skip
