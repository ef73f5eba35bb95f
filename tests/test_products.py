"""Products by oneDNN are those of `@`, whatever lies transposed."""

from __future__ import annotations

import pytest
import torch

from medformer_kernels import _products
from medformer_kernels._products import product

SIZES = [(300, 65, 256), (256, 300, 65), (3, 5, 2)]


@pytest.mark.parametrize("batch", [(), (1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_product_is_a_product(monkeypatch, batch, size, transposed):
    monkeypatch.setattr(_products, "_LEAST_OF_MANY", _products._LEAST)  # however many threads
    n, k, m = size
    shapes = [(n, k), (k, m)]
    x, y = (
        torch.randn(*batch, *shape[:: -1 if flip else 1]).transpose(-1, -2 if flip else -1)
        for shape, flip in zip(shapes, transposed, strict=True)
    )
    exact = x.double() @ y.double()
    error = (product(x, y).double() - exact).norm() / exact.norm()
    assert product(x, y).shape == exact.shape
    assert error <= 2 * ((x @ y).double() - exact).norm() / exact.norm() + 1e-7


def test_operands_may_be_cut_out_of_larger_tensors():
    qkv = torch.randn(400, 3, 4, 64)  # tokens, and heads of q, k and v as a projection lays them out
    x, y = qkv[50:350, 0, 1], qkv[100:, 2, 3]
    weights = torch.randn(400, 310)[:300, 5:305]
    everywhere = torch.randn(1, 64).expand(300, 64)
    for a, b in ((x, y.mT), (weights, y), (weights.mT, x), (y.mT, weights), (weights, everywhere), (everywhere, y.mT)):
        torch.testing.assert_close(product(a, b), a @ b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(_products.ONEDNN is None, reason="this PyTorch holds no oneDNN")
def test_small_products_and_other_dtypes_are_left_to_matmul(monkeypatch):
    monkeypatch.setattr(_products, "_linear", None)  # not callable: a use would raise
    product(torch.randn(4, 5), torch.randn(5, 6))
    product(torch.randn(300, 128, dtype=torch.float64), torch.randn(128, 256, dtype=torch.float64))
    with pytest.raises(TypeError):
        product(torch.randn(300, 128), torch.randn(128, 256))
