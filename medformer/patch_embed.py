"""Volumes and images to tokens: one strided convolution whose windows may overlap, or a transposed one.

Shape legend: B batch, Cin image channels, C model width, N tokens, Z Y X voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from medformer_kernels import patch_embed
from medformer_kernels._tracing import standard

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["PatchEmbed"]


class PatchEmbed(nn.Module):
    """Convolve, then flatten the token grid: (B, Cin, Z, Y, X) or (B, Cin, Y, X) to (B, N, C), x fastest.

    Token i of an axis sees the voxels `i * stride - padding` to `i * stride - padding + reach - 1`, where
    `reach = dilation * (kernel - 1) + 1`; voxels past the last whole window are not seen. A stride below the
    kernel makes neighbouring patches overlap.

    Args:
        in_channels: channels of the volume (one per modality or window).
        width: channels of a token.
        kernel: patch size in voxels, one number per axis, zyx; its length (2 or 3) sets the dimension.
        stride: step between patches in voxels.
        padding: zeros on both ends of each axis, in voxels.
        dilation: step between the voxels of one patch.
        transposed: by a transposed convolution instead: every voxel paints a patch of tokens, `stride` apart, and
            what overlaps adds up. More tokens than voxels, for thick slices and small images.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        transposed: bool = False,
    ) -> None:
        super().__init__()
        if len(kernel) not in (2, 3):
            raise ValueError(f"PatchEmbed: kernel={kernel} must have 2 or 3 axes")
        self.in_channels, self.transposed = in_channels, transposed
        self.kernel, self.stride, self.padding, self.dilation = kernel, stride, padding, dilation
        options: Any = {"stride": stride, "padding": padding, "dilation": dilation}
        if transposed:
            kind = nn.ConvTranspose3d if len(kernel) == 3 else nn.ConvTranspose2d
        else:
            kind = nn.Conv3d if len(kernel) == 3 else nn.Conv2d
        self.conv = kind(in_channels, width, kernel, **options)  # type: ignore[arg-type]

    def grid_of(self, size: Sequence[int]) -> tuple[int, ...]:
        """Token grid for a volume of `size` voxels (zyx).

        Raises:
            ValueError: `size` has another number of axes, or an axis is shorter than one patch.
        """
        size = tuple(size)
        if len(size) != len(self.kernel):
            raise ValueError(
                f"PatchEmbed: size={size} has {len(size)} axes, this model expects {len(self.kernel)} (zyx)"
            )
        reach = tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))
        axes = zip(size, self.padding, reach, self.stride, strict=True)
        if self.transposed:
            grid = tuple((n - 1) * s + r - 2 * p for n, p, r, s in axes)
            if any(n < 1 for n in grid):
                raise ValueError(
                    f"PatchEmbed: {_times(size)} voxels give a grid of {_times(grid)} tokens; choose less padding"
                )
            return grid
        if any(n < r for n, r in zip(size, reach, strict=True)):
            kind = "volume" if len(size) == 3 else "image"
            raise ValueError(
                f"PatchEmbed: a {kind} of {_times(size)} voxels is smaller than the patch kernel "
                f"{_times(reach)}; "
                f"pad or resample the {kind}, or build the model with a smaller patch_size"
            )
        return tuple((n + 2 * p - r) // s + 1 for n, p, r, s in axes)

    def forward(self, x: Float[Tensor, "B Cin *size"]) -> Float[Tensor, "B N C"]:
        if x.ndim != len(self.kernel) + 2 or x.shape[1] != self.in_channels:
            axes = "Z, Y, X" if len(self.kernel) == 3 else "Y, X"
            raise ValueError(f"PatchEmbed: input of shape {tuple(x.shape)} must be (batch, {self.in_channels}, {axes})")
        if not x.is_floating_point():
            raise TypeError(f"PatchEmbed: input of dtype {x.dtype} must be floating point; scale it first")
        self.grid_of(x.shape[2:])
        if (
            x.is_cuda and not self.transposed and not standard()
        ):  # on a CPU the kernel's own paths made training steps slower
            conv = self.conv
            return patch_embed(
                x.to(conv.weight.dtype), conv.weight, conv.bias, stride=self.stride, padding=self.padding,
                dilation=self.dilation,
            )  # fmt: skip
        return self.conv(x).flatten(2).transpose(1, 2)


def _times(size: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in size)
