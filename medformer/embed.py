"""A whole scan to tokens, in as much memory as is allowed: sliding windows, or one pass over all tokens.

The scan stays in its stored type: what a tile needs is cast and scaled when it is cut, and a float copy of the volume
never exists.

Independent of the tiling means here: the places of windows, and the weight of each in a token, follow from the sizes of
scan and window alone; in one pass every token attends to all. `max_memory` decides only how many windows or tokens are
computed together, so results under two limits differ by float rounding. Windows and one pass are two different
results: in a window a token sees its window, as in training, and in one pass the whole scan.

Axes: Z Y X voxels, gz gy gx tokens, N tokens in all, C width, H heads, W pairs of channels that rotary positions turn.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medformer.attention import PerformerAttention, SoftmaxAttention
from medformer.backbone import Backbone
from medformer.blocks import Block
from medformer.describe import describe
from medformer.files import byte_count
from medformer.footprint import footprint
from medformer.mlp import MLP, GatedMLP
from medformer.models import Encoder
from medformer.position import LearnedPosition, _linear_resampling
from medformer.resnet import ResNet
from medformer_kernels.performer.arguments import without_kernel
from medformer_kernels.performer.ops import performer_read, performer_state

if TYPE_CHECKING:
    from jaxtyping import Float

    from medformer.data import Volume

__all__ = ["Embedding", "TokenStream", "embed"]

_MIB = 2**20
# Kernels loaded on first use, threads' buffers, blocks that the allocator keeps.
_SLACK = 48 * _MIB
_CHUNK = 16_384  # tokens of one step of the one-pass forward, at most


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """What `embed` found."""

    tokens: Float[np.ndarray, "gz gy gx C"]
    """float32; a read-only memory map of `out` where that was given."""
    cls: Float[np.ndarray, " C"]
    """The class token, or the mean token of a model without; with windows the mean over them."""
    affine: np.ndarray
    """(4, 4) float64: token (x, y, z, 1) to RAS+ mm, of the middle of its patch."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """(gz, gy, gx)."""
        z, y, x, _ = self.tokens.shape
        return z, y, x

    def centres_mm(self) -> Float[np.ndarray, "gz gy gx 3"]:
        """Middle of each token's patch, x, y, z in RAS+ mm."""
        zyx = np.stack(np.meshgrid(*(np.arange(n) for n in self.grid), indexing="ij"), axis=-1)
        return zyx[..., ::-1] @ self.affine[:3, :3].T + self.affine[:3, 3]


def embed(
    model: Encoder,
    volume: Volume | np.ndarray,
    *,
    max_memory: int | str = "4 GiB",
    method: Literal["windows", "one_pass"] = "windows",
    window: Sequence[int] | None = None,
    overlap: float = 0.5,
    units: Literal["HU", "arbitrary", "normalised"] | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Embedding:
    """Tokens of a whole scan, whatever its size.

    >>> found = embed(model, read_volume("ct.nii.gz"), max_memory="2 GiB", window=(64, 64, 64))  # doctest: +SKIP

    Args:
        model: on any device; used in evaluation mode and handed back in its own.
        volume: a scan from `medformer.data.read_volume`, scaled as `normalise` does; or an array (Z, Y, X), which may
            be a memory map, with its `units` and voxels of 1 mm.
        max_memory: bytes, or text such as "800 MB" and "2 GiB": all that is allocated beyond model and volume, and with
            the tokens unless `out` is given. With a model on a GPU it holds for the sum of both memories.
        method: "windows" slides a crop of the size that the model was trained on over the scan; "one_pass" lets all
            tokens attend to each other, in chunks (performer: exact and linear; softmax: exact and quadratic), for a
            `Backbone` without a stem.
        window: voxels of a window, zyx: views.global_size of the training. None: what the position grid covers,
            position_grid times the step of a token; a `ResNet` has none and needs it. Cut down to the scan where that
            is smaller.
        overlap: share of a window that the next one covers again, 0 to below 1. A token is the mean over its windows,
            weighted by its distance from their edges.
        units: of an array: "HU", "arbitrary", or "normalised" to use it as it is.
        out: .npy file that the tokens are written to as they are ready, plane by plane.

    Raises:
        TypeError: `model` is another kind.
        ValueError: `max_memory` below the least that would do (which is named), or another argument out of its range.
    """
    planes = TokenStream(
        model, volume, max_memory=max_memory, method=method, window=window, overlap=overlap, units=units,
        result_held=out is None,
    )  # fmt: skip
    shape = (*planes.grid, model.config.width)
    if out is None:
        tokens = np.empty(shape, np.float32)
        for z, plane in enumerate(planes):
            tokens[z] = plane
    else:
        with open(out, "wb") as file:
            np.lib.format.write_array_header_2_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for plane in planes:
                file.write(plane.astype("<f4", copy=False).data)
        tokens = np.load(out, mmap_mode="r")
    assert planes.cls is not None
    return Embedding(tokens=tokens, cls=planes.cls, affine=planes.affine)


class TokenStream:
    """`embed`, one plane of tokens [gy, gx, C] at a time, from z = 0 on; arguments as there.

    Attributes:
        grid: tokens (gz, gy, gx).
        affine: as `Embedding.affine`.
        least: the smallest `max_memory` that would do, in bytes.
        windows: how many are computed; 0 in one pass.
        cls: as `Embedding.cls`, once all planes are through.
    """

    def __init__(
        self,
        model: Encoder,
        volume: Volume | np.ndarray,
        *,
        max_memory: int | str = "4 GiB",
        method: Literal["windows", "one_pass"] = "windows",
        window: Sequence[int] | None = None,
        overlap: float = 0.5,
        units: Literal["HU", "arbitrary", "normalised"] | None = None,
        result_held: bool = False,
    ) -> None:
        if not isinstance(model, Encoder):
            kind = type(model).__name__
            raise TypeError(f"embed: {kind} is not a Backbone, ResNet or TNT; give one, or the one inside it")
        config = model.config
        transposed = getattr(config, "patch_transposed", False)
        if config.dims != 3 or config.in_channels != 1 or transposed:
            raise ValueError(
                f"embed: a model with dims={config.dims}, in_channels={config.in_channels} and patch_transposed="
                f"{transposed} must have 3, 1 and False; call forward_features instead"
            )
        if method not in ("windows", "one_pass"):
            raise ValueError(f"embed: method={method!r} must be 'windows' or 'one_pass'")
        if not 0 <= overlap < 1:
            raise ValueError(f"embed: overlap={overlap} must be at least 0 and below 1")
        if window is not None and (len(window) != 3 or any(int(n) != n or n < 1 for n in window)):
            raise ValueError(f"embed: window={tuple(window)} must be three whole numbers of voxels, zyx")
        self.model, self.source = model, _Source(volume, units)
        self.budget = _bytes(max_memory)
        size = self.source.size
        self.grid = cast(tuple[int, int, int], model.grid_of(size))
        seen = footprint(model)
        self.stride = seen.stride
        middle = [(reach - 1) / 2 - padding for reach, padding in zip(seen.reach, seen.padding, strict=True)]
        steps = np.eye(4)
        steps[:3, :3], steps[:3, 3] = np.diag(self.stride[::-1]), middle[::-1]
        self.affine = self.source.affine @ steps
        self.cls: np.ndarray | None = None
        self.windows = 0
        tokens = math.prod(self.grid) * config.width * 4
        fixed = _SLACK + self.source.bytes_of_mask + tokens * result_held
        if method == "one_pass":
            backbone = _one_pass_model(model)
            fixed += _one_pass_bytes(backbone, self.grid, size)
            self.least, unit = fixed, _chunk_bytes(backbone)
            self.least += unit * 256
            self.chunk = min(_CHUNK, (self.budget - fixed) // unit)
        else:
            if window is None and isinstance(model, ResNet):
                raise ValueError("embed: window of a ResNet must be given; take views.global_size of its training")
            grid = getattr(config, "base_grid", self.grid)
            wanted = [s * n for s, n in zip(self.stride, grid, strict=True)] if window is None else window
            self.window = tuple(min(int(w), n) for w, n in zip(wanted, size, strict=True))
            self.tile = model.grid_of(self.window)
            self.starts = [_starts(g, t, overlap) for g, t in zip(self.grid, self.tile, strict=True)]
            self.windows = math.prod(len(s) for s in self.starts)
            fixed += self.tile[0] * math.prod(self.grid[1:]) * config.width * 4  # planes that are not ready yet
            unit = _window_bytes(model, self.window, self.tile)
            self.least = fixed + unit
            self.batch = min((self.budget - fixed) // unit, len(self.starts[1]) * len(self.starts[2]))
        if self.budget < self.least:
            ways = [f"give out= to write the {_mib(tokens)} of tokens to a file"] if result_held else []
            ways.append("take a smaller window" if method == "windows" else "take method='windows'")
            raise ValueError(
                f"embed: max_memory={_mib(self.budget)} must be at least {_mib(self.least)} for {math.prod(self.grid)} "
                f"tokens of width {config.width}; or {', or '.join(ways)}"
            )

    def __iter__(self) -> Iterator[Float[np.ndarray, "gy gx C"]]:
        """Each plane as a new array."""
        was = self.model.training
        self.model.eval()
        planes = self._windows() if self.windows else self._one_pass()
        try:
            while True:
                with torch.inference_mode():
                    plane = next(planes, None)
                if plane is None:
                    return
                yield plane
        finally:
            self.model.train(was)

    def _windows(self) -> Iterator[np.ndarray]:
        width, like = self.model.config.width, next(self.model.parameters())
        depth, tile = self.tile[0], self.tile
        ready = np.zeros((depth, *self.grid[1:], width), np.float32)  # a ring: plane z is at z % depth
        shares = [_shares(s, t, g) for s, t, g in zip(self.starts, self.tile, self.grid, strict=True)]
        places = [(y, x) for y in range(len(self.starts[1])) for x in range(len(self.starts[2]))]
        cls, done = np.zeros(width, np.float64), 0
        for layer, z in enumerate(self.starts[0]):
            while done < z:
                yield ready[done % depth].copy()
                ready[done % depth] = 0
                done += 1
            for first in range(0, len(places), self.batch):
                some = places[first : first + self.batch]
                cuts = np.empty((len(some), 1, *self.window), np.float32)
                for cut, (y, x) in zip(cuts, some, strict=True):
                    at = (z, self.starts[1][y], self.starts[2][x])
                    cut[0] = self.source.cut([s * i for s, i in zip(self.stride, at, strict=True)], self.window)
                found = self.model.forward_features(torch.from_numpy(cuts).to(like))
                patches = found.patches.float().cpu().numpy().reshape(len(some), *tile, width)
                cls += found.cls.double().sum(0).cpu().numpy()
                # Window after window, in an order that the batch does not change.
                for tokens, (y, x) in zip(patches, some, strict=True):
                    share = shares[1][y][:, None, None] * shares[2][x][:, None]
                    rows = slice(self.starts[1][y], self.starts[1][y] + tile[1])
                    columns = slice(self.starts[2][x], self.starts[2][x] + tile[2])
                    for i in range(depth):
                        ready[(z + i) % depth, rows, columns] += tokens[i] * (share * shares[0][layer][i])
        for z in range(done, self.grid[0]):
            yield ready[z % depth].copy()
        self.cls = (cls / self.windows).astype(np.float32)

    def _one_pass(self) -> Iterator[np.ndarray]:
        model = cast(Backbone, self.model)  # no other came so far
        prefix = model.config.prefix
        x = self._all_tokens()
        rotary = None if model.rotary is None else model.rotary(self.grid, prefix=prefix)
        spans = [slice(a, min(a + self.chunk, len(x))) for a in range(0, len(x), self.chunk)]
        for block in model.blocks:
            _mix(cast(Block, block), x, rotary, spans)
        if model.class_token is not None:
            self.cls = model.norm(x[0]).float().cpu().numpy()
        plane, total = math.prod(self.grid[1:]), np.zeros(x.shape[1], np.float64)
        for first in range(prefix, len(x), plane):
            tokens = model.norm(x[first : first + plane]).float().cpu().numpy()
            total += tokens.sum(0, dtype=np.float64)
            yield tokens.reshape(*self.grid[1:], -1)
        if model.class_token is None:
            self.cls = (total / math.prod(self.grid)).astype(np.float32)

    def _all_tokens(self) -> Float[Tensor, "N C"]:
        """What the first block gets: patches embedded a plane at a time, positions, class and register tokens."""
        model = cast(Backbone, self.model)
        config, conv = model.config, model.patch_embed.conv
        like, prefix, plane = model.norm.weight, config.prefix, math.prod(self.grid[1:])
        x = torch.empty(prefix + math.prod(self.grid), config.width, dtype=like.dtype, device=like.device)
        if model.register_tokens is not None:
            x[prefix - config.registers : prefix] = model.register_tokens
        if model.class_token is not None:
            place = None if model.position is None else model.position.cls
            x[0] = model.class_token if place is None else model.class_token + place
        positions = _positions(model, self.grid)
        (stride, kernel, dilation, padding) = (config.stride, config.kernel, config.dilation, config.padding)
        reach = dilation[0] * (kernel[0] - 1) + 1
        for z in range(self.grid[0]):
            start = z * stride[0] - padding[0]
            low, high = max(start, 0), min(start + reach, self.source.size[0])
            slab = torch.from_numpy(self.source.cut((low, 0, 0), (high - low, *self.source.size[1:]))).to(like)
            slab = F.pad(slab, (0, 0, 0, 0, low - start, start + reach - high))
            tokens = F.conv3d(slab[None, None], conv.weight, conv.bias, conv.stride, (0, *padding[1:]), conv.dilation)
            at = slice(prefix + z * plane, prefix + (z + 1) * plane)
            x[at] = tokens[0, :, 0].flatten(1).T
            if positions is not None:
                x[at] += positions(z)
        return x


class _Source:
    """The scan as it is stored, and parts of it as the model takes them."""

    def __init__(self, volume: Volume | np.ndarray, units: str | None) -> None:
        from medformer.data import Volume  # here: reading scans needs packages that a model does not
        from medformer.data.intensity import scaling_of

        if isinstance(volume, Volume):
            if units is not None and units != volume.units:
                raise ValueError(f"embed: units={units!r} with a Volume in {volume.units}; leave units out")
        else:
            if units not in ("HU", "arbitrary", "normalised"):
                raise ValueError(f"embed: units={units!r} of an array must be 'HU', 'arbitrary' or 'normalised'")
            if volume.ndim != 3:
                raise ValueError(f"embed: array of shape {volume.shape} must be (Z, Y, X)")
            if units == "normalised" and volume.dtype.kind != "f":
                raise ValueError(
                    f"embed: array of {volume.dtype} cannot be normalised; give its units, HU or arbitrary"
                )
            volume = Volume(voxels=volume, affine=np.eye(4), modality="unknown", units=units, notes=(), source="array")
        self.voxels, self.valid, self.affine = volume.voxels, volume.valid, volume.affine
        self.size: tuple[int, ...] = volume.shape
        self.scaling = None if volume.units == "normalised" else scaling_of(volume)
        self.bytes_of_mask = 0 if self.valid is None else self.valid[0].nbytes

    def cut(self, start: Sequence[int], size: Sequence[int]) -> Float[np.ndarray, "Z Y X"]:
        """float32, scaled; past the end of the scan its last voxels repeat, as in training."""
        part = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        voxels = self.voxels[part]
        valid = None if self.valid is None else self.valid[part]
        out = voxels.astype(np.float32) if self.scaling is None else self.scaling.apply(voxels, valid)
        short = [(0, n - m) for n, m in zip(size, out.shape, strict=True)]
        return np.pad(out, short, mode="edge") if any(after for _, after in short) else out


def _starts(grid: int, tile: int, overlap: float) -> list[int]:
    """First token of each window along an axis; the last one ends with the grid."""
    step = max(1, math.floor(tile * (1 - overlap)))
    return [*range(0, grid - tile, step), grid - tile]


def _shares(starts: list[int], tile: int, grid: int) -> list[np.ndarray]:
    """Weight of each token of each window along an axis: highest in its middle, 1 over all windows of a token."""
    hat = np.minimum(np.arange(tile) + 1.0, tile - np.arange(tile))
    total = np.zeros(grid)
    for start in starts:
        total[start : start + tile] += hat
    return [(hat / total[start : start + tile]).astype(np.float32) for start in starts]


def _mix(block: Block, x: Float[Tensor, "N C"], rotary: Float[Tensor, "2 N W"] | None, spans: list[slice]) -> None:
    """The block, in place. Two passes over the tokens: what keys and values come to, then what each query reads."""
    attention = cast(Any, block.attention)

    def split(span: slice) -> tuple[Tensor, Tensor, Tensor]:
        return attention._split(block.norm1(x[None, span]), None if rotary is None else rotary[:, span])

    read = _performer(attention, split, spans) if isinstance(attention, PerformerAttention) else _exact(split, spans)
    for span in spans:
        mixed = attention.proj(read(split(span)[0]).transpose(1, 2).flatten(2))[0]
        x[span] += mixed if block.scale1 is None else mixed * block.scale1
        mixed = block.mlp(block.norm2(x[None, span]))[0]
        x[span] += mixed if block.scale2 is None else mixed * block.scale2


def _performer(attention: PerformerAttention, split: Any, spans: list[slice]) -> Any:
    """Softmax-weighted means of the values, one a feature, merged over spans by the logarithms of their weights."""
    omega, values, lse = attention.omega, None, None
    backend = "torch"
    for span in spans:
        _, k, v = split(span)
        if omega.dtype.itemsize < k.dtype.itemsize:
            omega = omega.to(k.dtype)
        backend = "triton" if k.is_cuda and without_kernel(k, v, omega, False, "softmax") is None else "torch"
        some, weight, _ = performer_state(k, v, omega, None, False, backend)
        if values is None or lse is None:
            values, lse = some, weight
        else:
            both = torch.logaddexp(lse, weight)
            values = values * (lse - both).exp()[..., None] + some * (weight - both).exp()[..., None]
            lse = both
    return lambda q: performer_read(q, omega, values, lse, None, None, backend)[0]


def _exact(split: Any, spans: list[slice]) -> Any:
    k, v = (torch.cat(parts, dim=2) for parts in zip(*(split(span)[1:] for span in spans), strict=True))
    return lambda q: F.scaled_dot_product_attention(q, k, v)


def _positions(model: Backbone, grid: tuple[int, int, int]) -> Any:
    """A function of the plane: its positions [gy * gx, C]; None for a model that adds none."""
    position, plane = model.position, math.prod(grid[1:])
    if position is None:
        return None
    if not isinstance(position, LearnedPosition):
        whole = position(grid)
        return lambda z: whole[z * plane : (z + 1) * plane].to(model.norm.weight.dtype)
    # Stretched in the plane once, and along z when a plane is due: the whole table would be as large as the tokens.
    base = position.grid[0]
    flat = position((base, *grid[1:])).view(base, -1)
    rows = _linear_resampling(base, grid[0], like=flat)
    return lambda z: (rows[z] @ flat).view(plane, -1)


def _one_pass_model(model: Encoder) -> Backbone:
    """The model, which one pass can take; ValueError otherwise."""
    if not isinstance(model, Backbone):
        raise ValueError(
            f"embed: method='one_pass' takes a Backbone, not a {type(model).__name__}; use method='windows'"
        )
    config = model.config
    kinds = {type(cast(Block, block).attention) for block in model.blocks}
    mlps = {type(cast(Block, block).mlp) for block in model.blocks}
    if config.stem is not None or not kinds <= {PerformerAttention, SoftmaxAttention} or not mlps <= {MLP, GatedMLP}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds | mlps))
        raise ValueError(
            f"embed: method='one_pass' takes performer or softmax attention and dense MLPs without a stem, not {names}"
            f"{'' if config.stem is None else f' behind {config.stem}'}; use method='windows'"
        )
    return model


def _window_bytes(model: Encoder, window: tuple[int, ...], tile: Sequence[int]) -> int:
    """Upper bound of what one window needs in `forward_features` and around it."""
    item, voxels = next(model.parameters()).element_size(), math.prod(window)
    if not isinstance(model, Backbone):
        # All that training would keep, and the largest convolution unfolded.
        conv = model.conv1 if isinstance(model, ResNet) else model.conv
        inside = math.prod(conv.kernel_size) * voxels // math.prod(conv.stride)  # type: ignore[union-attr,arg-type,operator]
        return 12 * voxels + describe(model, window).saved_bytes + item * inside
    config = model.config
    tokens = math.prod(tile) + config.prefix
    per_token = 12 * config.width + 3 * config.mlp_hidden  # the wider of attention and MLP, plus the residual stream
    per_token += 2 * config.width  # the result, and its share of the planes
    work = item * tokens * per_token
    if config.attention not in ("performer", "softmax", "nystrom"):
        work += 3 * item * config.heads * tokens**2
    patches = item * math.prod(tile) * (math.prod(config.kernel) + 2 * config.width)  # unfolded, where the library does
    if config.stem is not None:
        patches += 4 * item * 64 * voxels // 8
    return 12 * voxels + work + patches


def _chunk_bytes(model: Backbone) -> int:
    """A token of a chunk of the one-pass forward."""
    config = model.config
    return model.norm.weight.element_size() * (12 * config.width + 3 * config.mlp_hidden)


def _one_pass_bytes(model: Backbone, grid: tuple[int, int, int], size: Sequence[int]) -> int:
    """The residual stream, positions, and one plane on its way in and out."""
    config, item = model.config, model.norm.weight.element_size()
    tokens, plane = math.prod(grid) + config.prefix, math.prod(grid[1:])
    total = tokens * config.width * item
    if config.position == "sincos":
        total += 2 * tokens * config.width * 4
    elif config.position == "learned":
        total += 2 * config.base_grid[0] * plane * config.width * item
    elif config.position == "rotary":
        total += 3 * tokens * (config.width // config.heads) * 4
    if any(isinstance(cast(Block, block).attention, SoftmaxAttention) for block in model.blocks):
        total += 4 * tokens * config.width * item  # keys and values, and again while they are joined
    reach = config.dilation[0] * (config.kernel[0] - 1) + 1
    voxels = reach * math.prod(size[1:])
    return total + voxels * (8 + 2 * item) + plane * item * (math.prod(config.kernel) + 4 * config.width)


def _bytes(limit: int | str) -> int:
    try:
        return byte_count(limit)
    except ValueError as error:
        raise ValueError(f"embed: max_memory={error}") from None


def _mib(count: int) -> str:
    return f"{math.ceil(count / _MIB)} MiB"
