"""FAVOR#'s features, which are not shipped: what `benchmarks/favor_sharp.py` measures, and why they are not."""

from __future__ import annotations

import pytest
import torch

from favor_sharp import KINDS, attention, fitted, inputs, log_features, second_moment
from medformer_kernels import orthogonal_features, performer_attention


def scaled(name: str, tokens: int, width: int, std: float) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = inputs(name, std, tokens, width, torch.Generator().manual_seed(0))
    return q * width**-0.25, k * width**-0.25


@pytest.mark.parametrize("kind", KINDS)
def test_features_estimate_the_softmax_kernel_without_bias(kind):
    x, y = scaled("unlike", 6, 4, 0.7)
    scale, a = fitted(kind, x, y)
    omega = torch.randn(100_000, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    products = log_features(x @ scale.mT, omega, a)[:, None] + log_features(y @ torch.linalg.inv(scale), omega, a)[None]
    estimates = products.exp()
    error = estimates.std(-1) / len(omega) ** 0.5
    assert ((estimates.mean(-1) - (x @ y.mT).exp()).abs() <= 5 * error).all()
    sampled = (2 * products).exp().mean(-1).log().mean()
    moment = second_moment(x @ scale.mT, y @ torch.linalg.inv(scale), a)
    torch.testing.assert_close(sampled, moment, rtol=0.05, atol=0.05)


def test_each_wider_class_has_less_variance():
    x, y = scaled("unlike", 200, 16, 1.0)
    moments = {}
    for kind in KINDS:
        scale, a = fitted(kind, x, y)
        moments[kind] = float(second_moment(x @ scale.mT, y @ torch.linalg.inv(scale), a))
    assert moments["asymmetric, dense"] < moments["symmetric dense"] < moments["optimal positive"] < moments["positive"]


def test_positive_features_are_those_of_performer_attention():
    q, k = inputs("few axes", 0.7, 50, 16, torch.Generator().manual_seed(0))
    omega = orthogonal_features(40, 16, dtype=torch.float64)
    expected = performer_attention(q[None, None], k[None, None], k[None, None], omega)[0, 0]
    torch.testing.assert_close(attention("positive", q, k, k, omega), expected)


def test_the_gain_is_in_a_change_of_basis_that_a_model_can_hold_itself():
    """FAVOR+ on queries G q and keys G^-T k, which two linear layers can make."""
    q, k = inputs("unlike", 0.5, 512, 32, torch.Generator().manual_seed(0))
    omega = orthogonal_features(256, 32, dtype=torch.float64)
    v = torch.randn(512, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = torch.softmax(q @ k.mT * 32**-0.5, -1) @ v
    errors = {kind: float((attention(kind, q, k, v, omega) - exact).norm() / exact.norm()) for kind in KINDS}
    assert errors["asymmetric, dense"] < errors["positive"] / 2
    assert errors["positive in its basis"] < errors["positive"] / 2
