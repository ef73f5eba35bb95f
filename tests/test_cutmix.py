"""Attentive CutMix: which cells move, where from, and how much they weigh."""

from __future__ import annotations

import pytest
import torch

import cutmix


@pytest.mark.parametrize("size", [(14, 14), (14, 14, 14)])
def test_the_cells_with_most_attention_are_pasted_in_place(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    scans, views = 3, 2
    x = torch.randn(views * scans, 1, *size)
    attention = torch.rand(views * scans, *(7 for _ in size))
    mixed, partner, weight = cutmix.attentive(x, attention, 6 / 49, views=views)
    count = round(6 / 49 * 7 ** len(size))
    assert partner.tolist() == [1, 2, 0, 1, 2, 0]
    torch.testing.assert_close(weight, torch.full((6,), count / 7 ** len(size)))
    for view in range(views):
        for scan in range(scans):
            row, source = view * scans + scan, view * scans + (scan + 1) % scans
            cells = attention[source].flatten().topk(count).indices
            expected = x[row, 0].clone()
            for cell in cells.tolist():
                at = torch.unravel_index(torch.tensor(cell), (7,) * len(size))
                box = tuple(slice(2 * int(i), 2 * int(i) + 2) for i in at)
                expected[box] = x[source, 0][box]
            assert torch.equal(mixed[row, 0], expected)


def test_fine_attention_is_pooled_and_coarse_attention_kept() -> None:
    x = torch.zeros(2, 1, 12, 12)
    x[1] = 1.0
    attention = torch.zeros(2, 14, 14)
    attention[1, :2, :2] = 1.0  # one pooled cell of 7 x 7
    mixed, _, weight = cutmix.attentive(x, attention, 1 / 49)
    assert mixed[0, 0, 0, 0] == 1.0
    assert mixed[0].mean().item() == pytest.approx(weight[0].item())
    _, _, coarse = cutmix.attentive(x, torch.rand(2, 3, 3), 0.1)
    torch.testing.assert_close(coarse, torch.full((2,), 1 / 9))


def test_one_scan_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="--batch_size 2"):
        cutmix.attentive(torch.zeros(2, 1, 4, 4), torch.zeros(2, 2, 2), 0.1, views=2)
