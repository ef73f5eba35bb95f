"""Which voxels the patch tokens of a model stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from medformer.backbone import Backbone
from medformer.resnet import ResNet
from medformer.slices import SliceEncoder

if TYPE_CHECKING:
    from medformer.tnt import TNT

__all__ = ["Footprint", "footprint"]


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Token i of an axis stands for `reach` voxels from voxel i * stride - padding on; axes are zyx.

    The same numbers as those of a convolution: n voxels have (n + 2 * padding - reach) // stride + 1 tokens.
    """

    reach: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    def under(
        self, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
    ) -> Footprint:
        """The footprint of windows over these tokens."""
        axes = list(zip(self.reach, self.stride, self.padding, kernel, stride, padding, dilation, strict=True))
        return Footprint(
            reach=tuple(r + d * (k - 1) * s for r, s, _, k, _, _, d in axes),
            stride=tuple(s * t for _, s, _, _, t, _, _ in axes),
            padding=tuple(q + p * s for _, s, q, _, _, p, _ in axes),
        )


def footprint(model: Backbone | ResNet | TNT | SliceEncoder) -> Footprint:
    """What `forward_features(x).patches` stand for in x.

    For a transformer and a TNT exactly what enters a token before attention. A place of a residual network, and of a
    stem, sees far more; it stands for the part between the middles of its neighbours.

    Raises:
        ValueError: the patch embedding is transposed and has several tokens a voxel.
    """
    if isinstance(model, SliceEncoder):
        plane = footprint(model.encoder)
        return Footprint(
            reach=(1, *plane.reach), stride=(model.config.slice_step, *plane.stride), padding=(0, *plane.padding)
        )
    config = model.config
    voxels = Footprint(reach=(1,) * config.dims, stride=(1,) * config.dims, padding=(0,) * config.dims)
    if isinstance(model, ResNet):
        step = model.config.step
        return voxels.under(*((n,) * config.dims for n in (2 * step + 1, step, step, 1)))
    if isinstance(model, Backbone):
        config = model.config
        if config.patch_transposed:
            raise ValueError("footprint: patch_transposed=True has several tokens a voxel; choose a plain embedding")
        below = voxels if model.stem is None else footprint(model.stem)
        return below.under(config.kernel, config.stride, config.padding, config.dilation)
    for index in range(len(model.config.levels)):
        kernel, stride, padding, dilation = (
            model.config.axes(index, name) for name in ("kernel", "stride", "padding", "dilation")
        )
        voxels = voxels.under(kernel, stride, padding, dilation)
    return voxels
