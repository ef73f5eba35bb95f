"""The configuration of a backbone, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from medformer.checks import check, check_choice, check_number, check_switches, check_whole, is_whole

__all__ = ["BackboneConfig"]


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Everything that decides the shape and the random features of a `Backbone`."""

    dims: int = 3
    """Spatial axes of the input: 3 for volumes (Z, Y, X), 2 for images (Y, X)."""
    in_channels: int = 1
    """Channels of the input, one per modality, window or colour."""
    stem: Literal["resnet18", "resnet34", "resnet50", "resnet101"] | None = None
    """First stages of a `ResNet` (GroupNorm) in front of the patches, which then count its places and not voxels; null
    for none."""
    stem_stages: int | None = None
    """Stages of the stem, 1 to 4, steps of 4, 8, 16 and 32 voxels; null takes 2."""
    patch_size: int | tuple[int, ...] = 8
    """Patch kernel in voxels: one number, or one per axis in zyx order."""
    patch_stride: int | tuple[int, ...] = 4
    """Step between patches in voxels; below patch_size the patches overlap. One number, or one per
    axis."""
    patch_padding: int | tuple[int, ...] = 2
    """Zeros added on both ends of each axis, in voxels, less than the patch kernel. One number, or one per
    axis."""
    patch_dilation: int | tuple[int, ...] = 1
    """Step between the voxels inside one patch. One number, or one per axis, zyx."""
    patch_transposed: bool = False
    """Embed by a transposed convolution: stride tokens for every voxel and not one token every stride voxels, for
    thick slices and small images."""
    width: int = 384
    """Channels of a token."""
    depth: int = 12
    """Number of transformer blocks."""
    heads: int = 6
    """Attention heads; must divide width."""
    mlp_ratio: float = 4.0
    """Hidden channels of each MLP, as a multiple of width; a gated MLP has two thirds of them, and so as many
    parameters."""
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    """Of a dense MLP: exact GELU, its tanh approximation (SigLIP), or x sigmoid(1.702 x) (CLIP)."""
    mlp: Literal["dense", "gated", "moe"] = "dense"
    """dense: activation. gated: SwiGLU. moe: a Switch mixture of experts in every moe_every-th block, dense in the
    others; add `medformer.auxiliary_loss(model)` to the loss."""
    experts: int | None = None
    """Experts of a mixture; null takes 8."""
    moe_every: int | None = None
    """Every which block has a mixture; null takes 2, the second, fourth, ..."""
    capacity_factor: float | None = None
    """Room of an expert in training, as a multiple of an equal share of a sample's tokens; null takes 1.25."""
    expert_dropout: float = 0.0
    """Dropout inside the experts."""
    router_jitter: float = 0.0
    """Noise on what the router sees in training, for example 0.01."""
    attention: Literal["performer", "softmax", "nystrom", "hopfield", "disentangled"] = "performer"
    """Linear in the tokens: performer (FAVOR+), nystrom (landmarks). Quadratic: softmax, hopfield (softmax that
    retrieves repeatedly, with a learned temperature a head), disentangled (DeBERTa's content and relative place)."""
    num_features: int | None = None
    """Random features per head of performer attention; null takes D ln D rounded to a multiple of 64,
    where D is the head width."""
    state_blocks: int | tuple[int, ...] | None = None
    """Tokens along each axis, zyx, of the blocks whose states performer attention keeps apart, near ones weighing more;
    null for one state of all tokens."""
    num_landmarks: int | None = None
    """Landmarks of nystrom attention; null takes 64."""
    hopfield_steps: int | None = None
    """Most updates of hopfield attention before it reads; 0 for attention with a learned temperature; null takes 3."""
    class_token: bool = True
    """Prepend a learned class token; without it the summary of a scan is the mean of its patch tokens."""
    registers: int = 4
    """Learned register tokens, scratch space that keeps the patch tokens clean; 0 for none."""
    mask_token: bool = False
    """Hold a learned token that replaces masked patches (iBOT, masked modelling)."""
    position: Literal["learned", "sincos", "rotary", "none"] = "learned"
    """learned: a table over position_grid, stretched to the grid of each input. sincos: fixed waves of the
    token index. rotary: queries and keys turned by the token index. none: as disentangled attention needs no other."""
    rotary_coordinates: Literal["index", "unit"] = "index"
    """Where a token is to rotary positions. index: 0, 1, 2, ... along each axis. unit: the centre of its cell between
    -1 and 1 along each axis, times 2 pi, whatever the size, as in DINOv3."""
    rotary_periods: float | tuple[float, ...] = 100.0
    """Periods of the pairs of an axis: a number p for 1, p^(1/n), p^(2/n), ... of n pairs; or one number per pair."""
    position_grid: int | tuple[int, ...] | None = None
    """Base grid of the learned table in tokens: one number, one per axis in zyx order, or null for 8 (3D) and
    16 (2D)."""
    drop_path: float = 0.0
    """Stochastic depth: probability of skipping the last block's branches in training, falling linearly to 0
    at the first block."""
    layer_scale: float | None = None
    """Start value of a learned gain per channel on every branch, for example 1e-5; null for none."""
    classes: int = 0
    """Outputs of a linear head on the class vector, for `forward`; 0 for none."""
    norm_eps: float = 1e-6
    """Added to the variance in every LayerNorm of the blocks and in the last one."""
    qk_norm: bool = False
    """LayerNorm queries and keys over each head: steadier training at large width or low precision."""
    alike_start: float | None = None
    """Start queries and keys with the same projection, whose outputs have this deviation, for example 2.5, so that
    tokens read their like from the first step; both learn on by themselves. null: two small projections."""
    seed: int = 0
    """Of the random features of performer attention; the weights follow torch's own generator."""

    def __post_init__(self) -> None:
        check(self, is_whole(self.dims, 2) and self.dims <= 3, f"dims={self.dims!r} must be 2 or 3")
        check_whole(self, 1, "in_channels", "width", "depth", "heads")
        check_whole(self, 0, "registers", "classes", "seed")
        check_switches(self, "patch_transposed", "class_token", "mask_token", "qk_norm")
        check(self, self.seed < 2**31, f"seed={self.seed} must be below 2**31")
        for name, least in (
            ("patch_size", 1),
            ("patch_stride", 1),
            ("patch_padding", 0),
            ("patch_dilation", 1),
        ):
            self._check_axes(name, least=least)
        check(
            self,
            all(p < d * (k - 1) + 1 for p, d, k in zip(self.padding, self.dilation, self.kernel, strict=True)),
            f"patch_padding={self.patch_padding} must be below the patch kernel: a patch must see a voxel",
        )
        if self.position_grid is not None:
            self._check_axes("position_grid", least=1)
        if self.width % self.heads:
            divisors = [h for h in range(1, self.width + 1) if self.width % h == 0]
            near = [h for h in divisors if h < self.heads][-1:] + [h for h in divisors if h > self.heads][:1]
            choice = " or ".join(str(h) for h in near)
            check(self, False, f"heads={self.heads} must divide width={self.width}; use {choice}")
        rule = f"leave at least one hidden channel at width={self.width}"
        check_number(self, "mlp_ratio", rule, lambda ratio: round(self.width * ratio) >= 1)
        check_choice(self, "attention", ("performer", "softmax", "nystrom", "hopfield", "disentangled"))
        check_choice(self, "mlp", ("dense", "gated", "moe"))
        check_choice(self, "position", ("learned", "sincos", "rotary", "none"))
        if self.stem is not None:
            check_choice(self, "stem", ("resnet18", "resnet34", "resnet50", "resnet101"))
        for name, least, owner, value in (
            ("num_features", 1, "attention", "performer"),
            ("num_landmarks", 1, "attention", "nystrom"),
            ("hopfield_steps", 0, "attention", "hopfield"),
            ("experts", 2, "mlp", "moe"),
            ("moe_every", 1, "mlp", "moe"),
        ):
            if getattr(self, name) is not None:
                check_whole(self, least, name)
                self._check_owner(name, owner, value)
        if self.state_blocks is not None:
            self._check_axes("state_blocks", least=1)
            self._check_owner("state_blocks", "attention", "performer")
        if self.capacity_factor is not None:
            self._check_owner("capacity_factor", "mlp", "moe")
            check_number(self, "capacity_factor", "be above 0", lambda factor: factor > 0)
        for name in ("expert_dropout", "router_jitter", "drop_path"):
            check_number(self, name, "be at least 0 and below 1", lambda share: 0 <= share < 1)
        for name in ("expert_dropout", "router_jitter"):
            if getattr(self, name):
                self._check_owner(name, "mlp", "moe")
        check(
            self,
            self.mlp != "moe" or (self.moe_every or 2) <= self.depth,
            f"moe_every={self.moe_every or 2} must be at most depth={self.depth}, or no block has experts",
        )
        if self.stem_stages is not None:
            needs = f"stem_stages={self.stem_stages} needs a stem, for example stem='resnet18'"
            check(self, self.stem is not None, needs)
            check_whole(self, 1, "stem_stages")
            check(self, self.stem_stages <= 4, f"stem_stages={self.stem_stages} must be at most 4")
        if self.position_grid is not None:
            self._check_owner("position_grid", "position", "learned")
        check(
            self,
            self.position != "sincos" or self.width >= 2 * self.dims,
            f"width={self.width} must be at least {2 * self.dims} with position='{self.position}'",
        )
        check_number(self, "norm_eps", "be above 0", lambda eps: eps > 0)
        check_choice(self, "activation", ("gelu", "gelu_tanh", "quick_gelu"))
        if self.activation != "gelu":
            self._check_owner("activation", "mlp", "dense")
        check_choice(self, "rotary_coordinates", ("index", "unit"))
        if isinstance(self.rotary_periods, list):  # from JSON or YAML
            object.__setattr__(self, "rotary_periods", tuple(self.rotary_periods))
        if self.rotary_coordinates != "index":
            self._check_owner("rotary_coordinates", "position", "rotary")
        if self.rotary_periods != 100.0:
            self._check_owner("rotary_periods", "position", "rotary")
        if self.position == "rotary":
            self._check_periods()
            head_width = self.width // self.heads
            check(
                self,
                head_width >= 2 * self.dims,
                f"heads={self.heads} leaves {head_width} channels to a head; position='rotary' needs {2 * self.dims}",
            )
            check(
                self,
                self.attention != "disentangled",
                "position='rotary' has no place in attention='disentangled', which has positions of its own; "
                "use learned, sincos or none",
            )
        check(
            self,
            not (self.qk_norm and self.attention == "disentangled"),
            "qk_norm=True has no place in attention='disentangled', whose positions are projected as its content is",
        )
        if self.alike_start is not None:
            check_number(self, "alike_start", "be above 0, or None", lambda deviation: deviation > 0)
        if self.layer_scale is not None:
            check_number(self, "layer_scale", "be above 0, or None", lambda scale: scale > 0)

    @property
    def kernel(self) -> tuple[int, ...]:
        """patch_size for every axis."""
        return self._axes(self.patch_size)

    @property
    def stride(self) -> tuple[int, ...]:
        """patch_stride for every axis."""
        return self._axes(self.patch_stride)

    @property
    def padding(self) -> tuple[int, ...]:
        """patch_padding for every axis."""
        return self._axes(self.patch_padding)

    @property
    def dilation(self) -> tuple[int, ...]:
        """patch_dilation for every axis."""
        return self._axes(self.patch_dilation)

    @property
    def base_grid(self) -> tuple[int, ...]:
        """position_grid for every axis."""
        default = 8 if self.dims == 3 else 16
        return self._axes(default if self.position_grid is None else self.position_grid)

    @property
    def blocks(self) -> tuple[int, ...] | None:
        """state_blocks for every axis."""
        return None if self.state_blocks is None else self._axes(self.state_blocks)

    @property
    def mlp_hidden(self) -> int:
        """Channels inside an MLP: a gated one has two matrices in front, so two thirds, in multiples of 8."""
        hidden = self.width * self.mlp_ratio
        return math.ceil(hidden * 2 / 24) * 8 if self.mlp == "gated" else round(hidden)

    @property
    def prefix(self) -> int:
        """Class and register tokens, in front of the patch tokens."""
        return int(self.class_token) + self.registers

    def _check_owner(self, name: str, owner: str, value: str) -> None:
        """`name` has a meaning only where the field `owner` is `value`."""
        found = getattr(self, owner)
        check(self, found == value, f"{name}={getattr(self, name)} needs {owner}='{value}', not '{found}'")

    def _check_periods(self) -> None:
        found = self.rotary_periods
        given = isinstance(found, tuple)
        rule = f"rotary_periods={found!r} must be a number above 0, or one for each pair of an axis"
        numbers = found if given else (found,)
        check(
            self,
            all(isinstance(n, int | float) and not isinstance(n, bool) and 0 < n < math.inf for n in numbers),
            rule,
        )
        pairs = self.width // self.heads // (2 * self.dims)
        check(self, not given or len(numbers) == pairs, f"{rule}, which are {pairs}")

    def _axes(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return (value,) * self.dims if isinstance(value, int) else value

    def _check_axes(self, name: str, *, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, list):  # from JSON or YAML
            value = tuple(value)
            object.__setattr__(self, name, value)
        if isinstance(value, tuple):
            check(
                self,
                len(value) == self.dims,
                f"{name}={value} must be one number or {self.dims} numbers, one per axis (dims={self.dims})",
            )
        for number in value if isinstance(value, tuple) else (value,):
            check(self, is_whole(number, least), f"{name}={number!r} must be a whole number of at least {least}")
