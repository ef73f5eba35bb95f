"""Patch and position embeddings."""

from __future__ import annotations

import pytest
import torch

from medformer.patch_embed import PatchEmbed
from medformer.position import LearnedPosition, SinCosPosition


def patches(dims: int = 3, *, kernel: int = 4, stride: int = 2, padding: int = 1, dilation: int = 1) -> PatchEmbed:
    axes = [(value,) * dims for value in (kernel, stride, padding, dilation)]
    return PatchEmbed(2, 8, kernel=axes[0], stride=axes[1], padding=axes[2], dilation=axes[3])


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((4, 5, 7), {}),
        ((9, 4, 13), {"stride": 3, "padding": 0}),
        ((7, 8, 10), {"dilation": 2, "padding": 3}),
        ((6, 11), {"dims": 2}),
    ],
)
def test_grid_of_is_the_grid_that_comes_out(size: tuple[int, ...], options: dict[str, int]) -> None:
    embed = patches(**options)
    grid = embed.grid_of(size)
    assert tuple(embed.conv(torch.randn(1, 2, *size)).shape[2:]) == grid
    assert embed(torch.randn(3, 2, *size)).shape == (3, torch.Size(grid).numel(), 8)


def test_tokens_are_windows_in_zyx_order_with_x_fastest() -> None:
    embed = PatchEmbed(1, 5, kernel=(2, 3, 4), stride=(1, 2, 3), padding=(0, 0, 0), dilation=(1, 1, 1))
    x = torch.randn(1, 1, 4, 7, 10)
    gz, gy, gx = embed.grid_of(x.shape[2:])
    tokens = embed(x).view(gz, gy, gx, 5)
    assert embed.conv.bias is not None
    window = x[0, 0, 2 : 2 + 2, 2 : 2 + 3, 6 : 6 + 4]
    expected = (embed.conv.weight[:, 0] * window).sum((1, 2, 3)) + embed.conv.bias
    torch.testing.assert_close(tokens[2, 1, 2], expected)


def test_volume_of_exactly_one_patch_gives_one_token() -> None:
    assert patches(padding=0).grid_of((4, 4, 4)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 3, 9, 9), "volume of 3x9x9 voxels is smaller than the patch kernel 4x4x4; pad or resample"),
        ((1, 3, 9, 9, 9), r"\(1, 3, 9, 9, 9\) must be \(batch, 2, Z, Y, X\)"),
        ((2, 9, 9, 9), r"\(2, 9, 9, 9\) must be \(batch, 2, Z, Y, X\)"),
    ],
)
def test_wrong_input_is_refused_with_its_shape(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patches()(torch.zeros(shape))


def test_dilation_counts_in_the_smallest_size() -> None:
    embed = patches(dilation=3)
    assert embed.grid_of((10, 10, 10)) == (2, 2, 2)
    with pytest.raises(ValueError, match="10x10x10"):
        embed.grid_of((9, 10, 10))


def test_integer_volume_is_refused() -> None:
    with pytest.raises(TypeError, match="int16 must be floating point"):
        patches()(torch.zeros(1, 2, 9, 9, 9, dtype=torch.int16))


def test_learned_position_is_the_table_at_its_base_grid() -> None:
    position = LearnedPosition(6, (3, 4, 5), class_token=True)
    assert torch.equal(position((3, 4, 5)), position.patches.reshape(-1, 6))


@pytest.mark.parametrize("grid", [(1, 1, 1), (7, 4, 5), (2, 9, 3), (64, 1, 5)])
def test_learned_position_keeps_a_constant_table_constant(grid: tuple[int, ...]) -> None:
    position = LearnedPosition(2, (3, 4, 5), class_token=False).double()
    torch.nn.init.constant_(position.patches, 1.5)
    expected = torch.full((torch.Size(grid).numel(), 2), 1.5, dtype=torch.float64)
    torch.testing.assert_close(position(grid), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("grid", [(6, 8, 10), (5, 4, 7)])
def test_enlarged_position_matches_torch_interpolate(grid: tuple[int, ...]) -> None:
    position = LearnedPosition(2, (3, 4, 5), class_token=False).double()
    table = position.patches.permute(3, 0, 1, 2)[None]
    expected = torch.nn.functional.interpolate(table, grid, mode="trilinear", align_corners=False)
    torch.testing.assert_close(position(grid), expected[0].flatten(1).T)


def test_shrunk_position_matches_antialiased_torch_interpolate() -> None:
    position = LearnedPosition(2, (12, 15), class_token=False).double()
    table = position.patches.permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(table, (5, 4), mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(position((5, 4)), expected[0].flatten(1).T)


def test_autocast_leaves_positions_in_full_precision() -> None:
    position = LearnedPosition(4, (4, 4), class_token=False)
    exact = position((7, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(position((7, 5)), exact)


@pytest.mark.parametrize("width", [6, 20, 48])
def test_sincos_positions_are_distinct_and_agree_between_grids(width: int) -> None:
    position = SinCosPosition(width, 3)
    small, large = position((2, 3, 2)).view(2, 3, 2, width), position((4, 5, 3)).view(4, 5, 3, width)
    assert torch.equal(large[:2, :3, :2], small)
    assert torch.pdist(large.reshape(-1, width)).min() > 1e-2
    assert not position.state_dict()


def test_sincos_positions_do_not_depend_on_the_dtype_of_the_model() -> None:
    expected = SinCosPosition(8, 2)((3, 2))
    assert torch.equal(SinCosPosition(8, 2).bfloat16()((3, 2)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(SinCosPosition(8, 2)((3, 2)), expected)
