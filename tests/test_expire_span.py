"""Expire-Span attention against its formula, and its memory."""

from __future__ import annotations

import copy
import math
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from medformer.expire_span import ExpireSpanAttention

WIDTH, HEADS = 8, 2


def build(*, scattered: bool = True, **options: Any) -> ExpireSpanAttention:
    """In float64, with spans that differ between tokens."""
    torch.manual_seed(0)
    options = {"max_span": 30, "ramp": 5, "initial_span": 0.3, "chunk": 7, **options}
    module = ExpireSpanAttention(WIDTH, HEADS, **options).double()
    if scattered:
        torch.nn.init.normal_(module.span_weight, std=0.7)
    return module


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def reference(module: ExpireSpanAttention, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Output, weights and span loss by the formulas of the paper, one query and one memory at a time."""
    batch, count, _ = x.shape
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in module.qkv(x).chunk(3, -1))
    span = module.max_span * torch.sigmoid(x @ module.span_weight + module.span_bias)
    a = torch.full((batch, HEADS, count, count), -torch.inf, dtype=x.dtype)
    m = torch.zeros(batch, count, count, dtype=x.dtype)
    loss = torch.zeros((), dtype=x.dtype)
    for b in range(batch):
        for t in range(count):
            for i in range(t + 1):
                if mask is not None and not mask[b, i]:
                    continue
                a[b, :, t, i] = (q[b, :, t] * k[b, :, i]).sum(-1) / math.sqrt(WIDTH // HEADS)
                m[b, t, i] = (1 + (span[b, i] - (t - i)) / module.ramp).clamp(0, 1)
                if 0 < m[b, t, i] < 1:
                    loss = loss + span[b, i]
    weights = a.softmax(-1) * m[:, None]
    weights = weights / weights.sum(-1, keepdim=True)
    out = module.proj((weights @ v).transpose(1, 2).flatten(2))
    return out, weights, loss / (batch * count * module.ramp * module.max_span)


@pytest.mark.parametrize("count", [1, 7, 33])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_matches_the_formula_with_every_gradient(count: int, chunk: int) -> None:
    module, x = build(chunk=chunk), tokens(2, count).requires_grad_()
    wanted, _, wanted_loss = reference(module, x)
    inputs = [x, *module.parameters()]
    seed = torch.randn(wanted.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad((wanted * seed).sum() + wanted_loss, inputs, allow_unused=True)
    out = module(x)
    assert module.span_loss is not None
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(module.span_loss, wanted_loss)
    found = torch.autograd.grad((out * seed).sum() + module.span_loss, inputs, allow_unused=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rows_are_those_of_the_formula() -> None:
    module, x = build(), tokens(2, 33)
    rows = module.attention_rows(x, [0, 20, -1])
    torch.testing.assert_close(rows, reference(module, x)[1][:, :, [0, 20, 32]])
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, HEADS, 3).double())


def test_spans_start_at_the_chosen_fraction() -> None:
    module = build(scattered=False, max_span=1000, initial_span=0.1)
    torch.testing.assert_close(module._spans(tokens(1, 5), None), torch.full((1, 5), 100.0).double())


@pytest.mark.parametrize("piece", [1, 5, 20])
def test_pieces_give_what_one_call_gives(piece: int) -> None:
    module, x = build(), tokens(2, 40)
    whole = module(x)
    memory, outs = None, []
    for part in x.split(piece, dim=1):
        out, memory = module.extend(part, memory)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole)
    assert memory.step == 40  # type: ignore[union-attr]


def test_memory_follows_the_spans_and_not_the_length() -> None:
    module, x = build(scattered=False, max_span=100, initial_span=0.1, chunk=8), tokens(1, 400)
    module(x)
    assert module.peak_memory == 14  # 10 steps of life and 5 of fading, the last of which has weight 0
    module.span_bias.data.fill_(20.0)
    module(x)
    assert 100 <= module.peak_memory <= 105


def test_an_expired_token_is_never_read() -> None:
    module, x = build(scattered=False, initial_span=0.1), tokens(1, 30)
    out = module(x)
    x[:, 4] = 1e8
    later = module(x)
    torch.testing.assert_close(later[:, :4], out[:, :4])
    torch.testing.assert_close(later[:, 12:], out[:, 12:])  # 3 steps of life, 5 of fading
    assert (later[:, 4:11] - out[:, 4:11]).abs().amin((0, 2)).gt(1e-9).all()


def test_a_forgotten_key_of_huge_score_leaves_the_rest_finite() -> None:
    module, x = build(scattered=False, initial_span=0.1), tokens(1, 30)
    x[:, 0] *= 1e6
    x[:, 20:] *= 1e3
    out = module(x)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())  # type: ignore[union-attr]


def test_only_fading_memories_feel_the_span_loss() -> None:
    module = build(scattered=False, max_span=1000, initial_span=0.5)
    module(tokens(1, 20))
    module.span_loss.backward()  # type: ignore[union-attr]
    assert module.span_loss == 0
    assert module.span_bias.grad == 0
    module = build(scattered=False)
    module(tokens(1, 20))
    module.span_loss.backward()  # type: ignore[union-attr]
    assert module.span_bias.grad > 0  # type: ignore[operator]


def test_span_loss_shortens_the_spans() -> None:
    module, x = build(), tokens(2, 40)
    before = module._spans(x, None).mean()
    optimiser = torch.optim.SGD(module.parameters(), lr=20.0)
    for _ in range(5):
        optimiser.zero_grad()
        module(x)
        module.span_loss.backward()  # type: ignore[union-attr]
        optimiser.step()
    assert module._spans(x, None).mean() < before / 1.5


@pytest.mark.parametrize("real", [1, 8, 20])
def test_padding_never_changes_the_rest(real: int) -> None:
    module, x = build(), tokens(2, 21)
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[0, real:] = False
    out = module(x, key_padding_mask=mask)
    torch.testing.assert_close(out[0, :real], module(x[:1, :real])[0])
    torch.testing.assert_close(out[1], module(x[1:])[0])
    x[0, real:] = 1e30
    torch.testing.assert_close(module(x, key_padding_mask=mask)[0, :real], out[0, :real])


def test_a_module_that_ran_can_be_copied() -> None:
    module, x = build(), tokens(2, 9)
    out = module(x)
    twin = copy.deepcopy(module)
    assert twin.span_loss is None
    torch.testing.assert_close(twin(x), out)


def test_output_does_not_depend_on_batch_mates() -> None:
    module, x = build(), tokens(3, 40)
    torch.testing.assert_close(module(x)[1], module(x[1:2])[0])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_module_matches_eager() -> None:
    module, x = build(max_span=12, chunk=16).float(), tokens(1, 40).float()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_double(dtype: torch.dtype) -> None:
    module, x = build(), tokens(2, 40)
    exact = module(x)
    out = module.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() < 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_span": 0}, "max_span=0 must be at least 1"),
        ({"ramp": 0}, "ramp=0 must be at least 1"),
        ({"initial_span": 1.0}, "initial_span=1.0 must be between 0 and 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)
