"""Patch embedding on a GPU, at sizes that the interpreter does not take. Needs torch, triton and pytest only."""

from __future__ import annotations

import pytest
import torch

from medformer_kernels import patch_embed
from tests import launches

pytestmark = [pytest.mark.gpu, launches.embed_forward]


def test_volume_of_more_than_2_to_the_31_voxels_is_addressed_correctly():
    """A view with a z stride of 2^28 voxels over int16: the last token lies beyond 2^31 elements."""
    storage = torch.zeros(9 << 28, dtype=torch.int16, device="cuda")
    scan = storage.as_strided((1, 1, 9, 8, 8), (9 << 28, 9 << 28, 1 << 28, 8, 1))
    scan.copy_(torch.randint(-1100, 2000, (1, 1, 9, 8, 8), dtype=torch.int16))
    weight = torch.randn(16, 1, 3, 3, 3, device="cuda")
    tokens = patch_embed(scan, weight, stride=2, windows=[(-160, 240)], backend="triton")
    expected = patch_embed(scan.contiguous(), weight, stride=2, windows=[(-160, 240)], backend="torch")
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
