"""The hash that says what dropout drops, which PyTorch and the kernels share."""

from __future__ import annotations

import itertools

import pytest
import torch

from medformer_kernels import disentangled_attention
from medformer_kernels._dropout import kept, seed_tensor
from tests import launches

CPU = torch.device("cpu")


def mask(seed: int, sample: int, head: int, p: float = 0.5, size: int = 16) -> torch.Tensor:
    return kept(torch.tensor(seed), p, sample, head, (0, size), (0, size)).flatten()


def test_no_two_seeds_samples_and_heads_drop_alike() -> None:
    seeds = (0, 1, 2, 3, 7, 2**31, 2**32, 2**32 + 1, 2**33, 2**62)
    places = itertools.product(seeds, range(4), range(8))
    masks = torch.stack([mask(*place) for place in places])
    assert len(masks.unique(dim=0)) == len(masks)
    # Not nearly either: of 256 weights two masks share half, here within 6 standard deviations of all 51,040 pairs.
    alike = (2.0 * masks - 1) @ (2.0 * masks - 1).T
    assert alike.fill_diagonal_(0).abs().max() < 6 * 256**0.5


def test_no_two_rows_or_columns_drop_alike() -> None:
    weights = kept(torch.tensor(0), 0.5, 0, 0, (0, 256), (0, 256))
    assert len(weights.unique(dim=0)) == len(weights.unique(dim=1).T) == 256


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-12])
def test_rate_is_right_within_four_standard_deviations(p: float) -> None:
    weights = kept(torch.tensor(3), p, (0, 2), (0, 4), (0, 200), (0, 200))
    rate = 1 - weights.double().mean().item()
    assert abs(rate - p) <= 4 * (p * (1 - p) / weights.numel()) ** 0.5


def test_parts_of_an_axis_are_those_of_the_whole() -> None:
    seed = torch.tensor(5)
    whole = kept(seed, 0.3, (0, 2), (0, 3), (0, 10), (0, 12))
    assert torch.equal(kept(seed, 0.3, 1, (1, 3), (4, 9), (2, 12)), whole[1, 1:, 4:9, 2:])


@pytest.mark.parametrize("backend", launches.backends(launches.disentangled_forward))
def test_backends_drop_the_weights_of_the_hash(backend: str) -> None:
    """Equal scores, and a value for each key: the output is the weights."""
    q, v = torch.zeros(2, 3, 32, 16), torch.eye(32).expand(2, 3, 32, 32)
    out = disentangled_attention(q, q, v, terms=("c2c",), dropout=0.4, seed=2**40 + 1, backend=backend)
    assert torch.equal(out > 0, kept(torch.tensor(2**40 + 1), 0.4, (0, 2), (0, 3), (0, 32), (0, 32)))


@pytest.mark.parametrize("seed", [-1, 2**63, torch.tensor(1.0), torch.tensor([1, 2])])
def test_what_is_no_seed_is_refused(seed: int | torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^f: seed"):
        seed_tensor("f", seed, CPU)
