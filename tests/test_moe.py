"""The Switch mixture of experts against a loop over its tokens."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import medformer
from medformer import SwitchMLP

WIDTH, HIDDEN, EXPERTS = 8, 12, 4


def build(**options: Any) -> SwitchMLP:
    torch.manual_seed(0)
    module = SwitchMLP(WIDTH, HIDDEN, **{"experts": EXPERTS, **options}).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_token(module: SwitchMLP, x: Tensor, factor: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """Output, auxiliary loss and fraction dropped, one token at a time."""
    out, dropped = torch.zeros_like(x), 0
    real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    logits = x @ module.router.T
    p = logits.softmax(-1)
    for b in range(x.shape[0]):
        taken, capacity = [0] * EXPERTS, math.ceil(factor * int(real[b].sum()) / EXPERTS)
        for n in range(x.shape[1]):
            e = int(p[b, n].argmax())
            if real[b, n] and taken[e] < capacity:
                taken[e] += 1
                hidden = F.gelu(x[b, n] @ module.weight1[e] + module.bias1[e])
                out[b, n] = p[b, n, e] * (hidden @ module.weight2[e] + module.bias2[e])
            elif real[b, n]:
                dropped += 1
    chosen = F.one_hot(p[real].argmax(-1), EXPERTS).double().mean(0)
    balance = EXPERTS * (chosen * p[real].mean(0)).sum()
    z = logits[real].logsumexp(-1).square().mean()
    return out, 1e-2 * balance + 1e-3 * z, dropped / int(real.sum())


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 4.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [1, 13])
def test_matches_a_loop_over_tokens_with_every_gradient(factor: float, masked: bool, count: int) -> None:
    module, x = build(capacity_factor=factor), tokens(3, count).requires_grad_()
    mask = torch.rand(3, count, generator=torch.Generator().manual_seed(2)) > 0.3 if masked else None
    if mask is not None:
        mask[0] = True
    expected, loss, dropped = by_token(module, x, factor, mask)
    seed = tokens(3, count).flip(0)
    inputs = [x, *module.parameters()]
    wanted = torch.autograd.grad((expected * seed).sum() + loss, inputs)
    out = module(x, key_padding_mask=mask)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(module.aux_loss, loss)
    assert module.statistics is not None
    assert module.statistics.dropped.item() == pytest.approx(dropped)
    torch.testing.assert_close(torch.autograd.grad((out * seed).sum() + module.aux_loss, inputs), wanted)


def test_room_follows_training_and_evaluation() -> None:
    module, x = build(capacity_factor=0.5, eval_capacity_factor=4.0), tokens(2, 20)
    torch.testing.assert_close(module(x), by_token(module, x, 0.5)[0])
    torch.testing.assert_close(module.eval()(x), by_token(module, x, 4.0)[0])
    assert module.statistics is not None
    assert module.statistics.dropped == 0


def test_dropped_tokens_ride_the_residual() -> None:
    from medformer.attention import SoftmaxAttention
    from medformer.blocks import Block

    module = build(capacity_factor=0.25)
    block = Block(WIDTH, SoftmaxAttention(WIDTH, 2).double(), module).double()
    x = tokens(1, 16)
    mixed = x + block.attention(block.norm1(x))
    same = (block(x) == mixed).all(-1)
    assert module.statistics is not None
    assert same.double().mean() == module.statistics.dropped
    assert 0.5 < module.statistics.dropped < 1


def test_uniform_routing_costs_the_coefficient_and_one_expert_for_all_costs_more() -> None:
    module = build(z_coefficient=0.0)
    module.router.data.zero_()
    module(tokens(2, 16))
    torch.testing.assert_close(module.aux_loss, torch.tensor(1e-2).double())
    assert module.statistics is not None
    assert module.statistics.entropy.item() == pytest.approx(math.log(EXPERTS))
    module.router.data[2] = 100.0
    module(tokens(2, 16).abs())
    torch.testing.assert_close(module.aux_loss, torch.tensor(EXPERTS * 1e-2).double())
    assert module.statistics.load.tolist() == [0, 0, 1, 0]


def test_the_loss_spreads_the_tokens() -> None:
    module, x = build(z_coefficient=0.0, balance_coefficient=1.0), tokens(8, 32)
    module.router.data[0] += 0.5 * x.mean((0, 1)) + 0.3
    module(x)
    assert module.statistics is not None
    before = module.statistics.balance_loss
    optimiser = torch.optim.Adam([module.router], lr=0.05)
    for _ in range(30):
        optimiser.zero_grad()
        module(x)
        module.aux_loss.backward()  # type: ignore[union-attr]
        optimiser.step()
    assert module.statistics.balance_loss < before
    assert module.statistics.balance_loss < 1.05


def test_jitter_never_touches_what_the_experts_see() -> None:
    """With one choice whatever the noise, only the gate may differ."""
    module, x = build(jitter=0.3, capacity_factor=4.0, eval_capacity_factor=4.0), tokens(1, 9).abs()
    module.router.data.zero_()
    module.router.data[1] = 5.0
    kept = x.clone()
    torch.manual_seed(3)
    noisy = module(x)
    quiet = module.eval()(x)
    assert torch.equal(x, kept)
    ratio = noisy / quiet
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
    assert not torch.equal(module.train()(x), noisy)


def test_the_router_decides_in_float32_under_autocast() -> None:
    module, x = build().float(), tokens(2, 30).float()
    wanted = x @ module.router.T
    seen = []
    original = module._account
    module._account = lambda logits, *rest: (seen.append(logits), original(logits, *rest))[1]  # type: ignore[method-assign]
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    assert module.aux_loss is not None
    assert module.aux_loss.dtype == torch.float32
    torch.testing.assert_close(seen[0], wanted)
    low = build().to(torch.bfloat16)
    assert low(x.bfloat16()).dtype == torch.bfloat16
    assert low.aux_loss is not None
    assert low.aux_loss.dtype == torch.float32


def test_dropout_of_experts_is_for_training() -> None:
    module, x = build(dropout=0.5, eval_capacity_factor=1.25), tokens(2, 20)
    trained = module(x)
    torch.testing.assert_close(module.eval()(x), by_token(module, x, 1.25)[0])
    assert not torch.equal(trained, module(x))


def test_a_module_that_ran_can_be_copied() -> None:
    module, x = build(eval_capacity_factor=1.25), tokens(2, 9)
    out = module(x)
    twin = copy.deepcopy(module)
    assert twin.aux_loss is None
    assert module.aux_loss is not None
    torch.testing.assert_close(twin(x), out)


def test_losses_of_a_model_add_up() -> None:
    model = medformer.tiny_3d(width=24, heads=2, depth=4, mlp="moe", experts=2)
    model(torch.randn(1, 1, 8, 8, 8))
    experts = [block.mlp for block in model.blocks if isinstance(block.mlp, SwitchMLP)]
    assert len(experts) == 2
    torch.testing.assert_close(medformer.auxiliary_loss(model), experts[0].aux_loss + experts[1].aux_loss)  # type: ignore[operator]
    assert medformer.auxiliary_loss(torch.nn.Linear(2, 2)) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 1}, "experts=1 must be at least 2"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 must be above 0"),
        ({"jitter": 1.0}, "jitter=1.0 must be at least 0 and below 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize(("every", "experts"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [2])])
def test_every_nth_block_of_a_backbone_has_experts(every: int, experts: list[int]) -> None:
    config = medformer.BackboneConfig(width=24, depth=5, heads=2, mlp="moe", experts=3, moe_every=every)
    blocks = medformer.Backbone(config).blocks
    assert [i for i, block in enumerate(blocks) if isinstance(block.mlp, SwitchMLP)] == experts
