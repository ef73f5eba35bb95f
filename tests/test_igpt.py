"""Image-GPT: the published network, tokens and their order, both objectives, and completions."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import medformer
from igpt import Igpt, IgptConfig, igpt_loss, model_config, random_mask
from medformer import BackboneConfig
from medformer.codebook import Codebook, kmeans, morton_order
from medformer.errors import UserError
from medformer.image_gpt import (
    ImageGPT,
    ImageGPTConfig,
    image_gpt_large,
    image_gpt_medium,
    image_gpt_small,
)

SMALL: dict[str, Any] = {"vocabulary": 11, "grid": (4, 5), "width": 16, "depth": 2, "heads": 2}


def make(**settings: Any) -> ImageGPT:
    torch.manual_seed(0)
    model = ImageGPT(ImageGPTConfig(**{**SMALL, **settings}))
    torch.nn.init.normal_(model.output)  # which starts at 0
    return model.eval()


def tokens_of(model: ImageGPT, batch: int = 2) -> Tensor:
    return torch.randint(model.config.vocabulary, (batch, model.config.tokens))


@pytest.mark.parametrize(
    ("size", "parameters"),
    [(image_gpt_small, 76_571_648), (image_gpt_medium, 455_157_760), (image_gpt_large, 1_362_250_752)],
)
def test_published_numbers_of_parameters(size: Any, parameters: int) -> None:
    with torch.device("meta"):
        model = size()
    count = sum(p.numel() for p in model.parameters())
    width, depth, vocabulary, tokens = model.config.width, model.config.depth, 512, 1024
    by_hand = depth * (12 * width**2 + 2 * width) + 2 * vocabulary * width + tokens * width + 2 * width
    assert count == by_hand == parameters


def test_blocks_are_the_published_ones() -> None:
    model = make()
    assert [name for name, _ in model.named_parameters() if "bias" in name] == []
    block = model.blocks[0]
    x = torch.randn(3, 16)
    torch.testing.assert_close(block.norm1(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    h = F.linear(block.norm2(x), block.fc1.weight)
    torch.testing.assert_close(block._mlp(x), F.linear(h * torch.sigmoid(1.702 * h), block.fc2.weight))


def test_weights_start_as_published() -> None:
    model = ImageGPT(ImageGPTConfig(vocabulary=64, grid=(8, 8), width=128, depth=4, heads=4))
    assert not model.output.any()
    for block in model.blocks:
        for layer in (block.attention.proj, block.fc2):
            assert layer.weight.std().item() == pytest.approx(1 / math.sqrt(128 * 4), rel=0.05)
        assert block.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    tokens = tokens_of(model)
    assert igpt_loss(model(tokens), tokens).item() == pytest.approx(math.log(64), rel=1e-5)


@pytest.mark.parametrize("attention", ["performer", "softmax", "expire_span"])
@pytest.mark.parametrize("order", ["raster", "morton"])
def test_a_token_is_told_from_those_before_it_only(attention: str, order: str) -> None:
    model = make(attention=attention, order=order)
    tokens = tokens_of(model, 1)
    base = model(tokens)
    for at in (0, 7, 19):
        changed = tokens.clone()
        place = model.sequence[at]
        changed[0, place] = (changed[0, place] + 1) % 11
        moved = (model(changed) - base).abs().amax(-1)[0] > 1e-5
        assert not moved[model.sequence[: at + 1]].any()  # nor does it see itself
        assert moved[model.sequence[at + 1 :]].all()


def test_masked_tokens_are_not_seen_and_all_others_are() -> None:
    model = make(objective="bert")
    tokens, mask = tokens_of(model, 1), torch.zeros(1, 20, dtype=torch.bool)
    mask[0, 7] = True
    base = model(tokens, mask=mask)
    hidden, shown = tokens.clone(), tokens.clone()
    hidden[0, 7] = (hidden[0, 7] + 1) % 11
    shown[0, 19] = (shown[0, 19] + 1) % 11
    assert torch.equal(model(hidden, mask=mask), base)
    assert ((model(shown, mask=mask) - base).abs().amax(-1) > 1e-6).all()  # before it as well


@pytest.mark.parametrize("order", ["raster", "morton"])
def test_the_stream_starts_with_a_token_of_its_own_and_learned_places(order: str) -> None:
    model, bert = make(order=order), make(order=order, objective="bert")
    tokens, mask = tokens_of(model), torch.rand(2, 20) < 0.5
    told = model.token_embed[tokens[:, model.sequence]]
    assert model.start is not None
    shifted = torch.cat([model.start.expand(2, 1, -1), told[:, :-1]], 1)
    torch.testing.assert_close(model.hidden(tokens, blocks=0), shifted + model.position)
    shown = bert.token_embed[tokens[:, bert.sequence]] * ~mask[:, bert.sequence, None]  # zeroed, not a learned one
    torch.testing.assert_close(bert.hidden(tokens, mask=mask, blocks=0), shown + bert.position)


def test_bert_loss_is_the_mean_over_masked_tokens() -> None:
    logits, tokens = torch.randn(2, 6, 5), torch.randint(5, (2, 6))
    mask = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0]], dtype=torch.bool)
    terms = -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(igpt_loss(logits, tokens, mask), terms[mask].mean())
    torch.testing.assert_close(igpt_loss(logits, tokens), terms.mean())
    counts = random_mask(50, 40, 0.15, torch.device("cpu")).sum(1)
    assert (counts == 6).all()


@pytest.mark.parametrize("attention", ["performer", "softmax", "expire_span"])
def test_completing_step_by_step_equals_the_whole_pass(attention: str) -> None:
    """Greedy completion must agree with what the full pass finds likeliest at each place."""
    for order in ("raster", "morton"):
        model = make(attention=attention, order=order)
        tokens = tokens_of(model)
        for known in (0, 9, 20):
            made = model.complete(tokens, known, temperature=0)
            early = model.sequence[:known]
            assert torch.equal(made[:, early], tokens[:, early])
            late = model.sequence[known:]
            assert torch.equal(model(made).argmax(-1)[:, late], made[:, late])


def test_short_spans_are_paid_for_and_learned() -> None:
    method = method_of(expire_span=8)
    assert method.student.config.attention == "expire_span"
    loss, parts = method.loss(method.student, [torch.randn(2, 1, 8, 8)], 0)
    spans = method.student.span_loss()
    assert spans is not None
    assert loss.item() == pytest.approx(parts["bits"].item() * math.log(2) + 0.01 * spans.item(), rel=1e-5)
    loss.backward()
    assert method.student.blocks[0].attention.span_bias.grad is not None
    with pytest.raises(UserError, match="expire_span 8 is causal"):
        method_of(expire_span=8, objective="bert")


def test_samples_follow_the_generator() -> None:
    model = make()
    tokens = tokens_of(model)
    a, b, c = (model.complete(tokens, 5, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_filling_keeps_what_is_shown_and_leaves_nothing_masked() -> None:
    model = make(objective="bert", vocabulary=11)
    tokens, mask = tokens_of(model), torch.rand(2, 20) < 0.5
    made = model.fill(tokens, mask, passes=4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made[~mask], tokens[~mask])
    assert not torch.equal(made[mask], tokens[mask])
    with pytest.raises(ValueError, match="use fill"):
        model.complete(tokens, 3)
    with pytest.raises(ValueError, match="use complete"):
        make().fill(tokens, mask)


def test_features_come_from_the_middle() -> None:
    model = make(depth=4)
    tokens = tokens_of(model)
    middle = model.features(tokens)
    torch.testing.assert_close(middle, model.features(tokens, 2))
    torch.testing.assert_close(middle, model.blocks[2].norm1(model.hidden(tokens, blocks=2)).mean(1))
    with pytest.raises(IndexError, match="layer=4"):
        model.features(tokens, 4)


@pytest.mark.parametrize("order", ["raster", "morton"])
def test_features_to_learn_from_are_those_that_the_output_reads(order: str) -> None:
    model = make(grid=(4, 4), patch=(2, 3), order=order)
    model.codebook.centres.normal_()
    x = torch.randn(3, 1, 8, 12)
    found = model.forward_features(x)
    assert (found.grid, tuple(found.registers.shape)) == ((4, 4), (3, 0, 16))
    torch.testing.assert_close(found.patches @ model.output.T, model(model.codebook.encode(x)))
    torch.testing.assert_close(found.cls, found.patches.mean(1))
    with pytest.raises(ValueError, match=r"size=\(8, 13\) must be \(8, 12\)"):
        model.forward_features(torch.randn(1, 1, 8, 13))


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (4, 4, 4), (2, 3, 5)])
def test_morton_order_visits_all_and_interleaves_bits(grid: tuple[int, ...]) -> None:
    order = morton_order(grid)
    assert sorted(order.tolist()) == list(range(math.prod(grid)))
    places = [np.unravel_index(i, grid) for i in order.tolist()]

    def code(place: tuple[int, ...]) -> int:
        return int("".join("".join(str((int(c) >> b) & 1) for c in place) for b in range(3, -1, -1)), 2)

    codes = [code(p) for p in places]
    assert codes == sorted(codes)


def test_morton_order_walks_a_square_as_a_z() -> None:
    assert morton_order((4, 4))[:8].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.parametrize(("patch", "size"), [((1, 1), (4, 6)), ((2, 3), (4, 6)), ((2, 1, 2), (4, 3, 6))])
def test_patches_go_to_tokens_and_back(patch: tuple[int, ...], size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    entries = torch.randn(7, math.prod(patch))
    book = Codebook(7, patch)
    book.centres.copy_(entries)
    grid = tuple(n // p for n, p in zip(size, patch, strict=True))
    tokens = torch.randint(7, (2, math.prod(grid)))
    scan = book.decode(tokens, grid)
    assert scan.shape == (2, 1, *size)
    assert torch.equal(book.encode(scan), tokens)
    assert torch.equal(book.encode(scan + 1e-4), tokens)
    with pytest.raises(ValueError, match="tile"):
        book.encode(torch.zeros(1, 1, *(n + 1 for n in size[:-1]), size[-1] + 1) if max(patch) > 1 else torch.zeros(2))


def test_tokens_are_the_nearest_entries() -> None:
    book = Codebook(5, (2, 2))
    book.centres.normal_()
    x = torch.randn(3, 1, 4, 4)
    distance = torch.cdist(book.patches(x), book.centres.expand(3, -1, -1))
    assert torch.equal(book.encode(x), distance.argmin(-1))


def test_kmeans_finds_clusters_and_the_same_ones_again() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[-5.0, 0.0], [0.0, 5.0], [5.0, 0.0], [9.0, 9.0]])
    x = (centres[:, None] + 0.1 * torch.randn(4, 50, 2, generator=generator)).flatten(0, 1)
    best = min((kmeans(x, 4, seed=s) for s in range(5)), key=lambda c: float(torch.cdist(x, c).amin(1).sum()))
    torch.testing.assert_close(best, centres[centres.mean(1).argsort()], atol=0.1, rtol=0)
    assert torch.equal(kmeans(x, 3, seed=1), kmeans(x, 3, seed=1))
    grey = torch.randn(3000, 1, generator=generator)
    error = (grey - kmeans(grey, 512)[torch.cdist(grey, kmeans(grey, 512)).argmin(1)]).square().mean()
    assert error < 1e-4
    with pytest.raises(ValueError, match="3 different points are too few for k=4"):
        kmeans(torch.tensor([[1.0], [2.0], [3.0], [3.0]]), 4)


def test_a_saved_model_comes_back_with_its_codebook(tmp_path: Path) -> None:
    for attention in ("performer", "softmax"):
        model = make(attention=attention, order="morton", patch=(2, 2), scale="z-score")
        model.codebook.centres.normal_()
        medformer.save(model, tmp_path / "m.safetensors")
        again = medformer.load(tmp_path / "m.safetensors")
        assert isinstance(again, ImageGPT)
        assert again.config == model.config
        tokens = tokens_of(model)
        assert torch.equal(again.eval()(tokens), model(tokens))
        assert torch.equal(again.codebook.centres, model.codebook.centres)
    (tmp_path / "x").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a safetensors file"):
        medformer.load(tmp_path / "x")


def method_of(codebook: str | None = None, scale: str = "z-score", **settings: Any) -> Igpt:
    torch.manual_seed(0)
    config = IgptConfig(**{"colours": 8, "patch": (1, 2, 2), "codebook": codebook, **settings})
    shape = model_config(
        BackboneConfig(dims=2, width=16, depth=2, heads=2, patch_size=2, patch_stride=2, patch_padding=0),
        config,
        (1, 8, 8),
        scale,
    )
    return Igpt(shape, config, seed=0)


def test_the_codebook_is_fitted_on_what_was_seen_and_travels_with_the_weights(tmp_path: Path) -> None:
    method = method_of()
    method.look([torch.randn(20, 1, 8, 8)])
    method.start()
    assert method.student.codebook.centres.any()
    assert any("centres" in name for name in method.state_dict())
    assert method.save(tmp_path) == "image_gpt.safetensors"
    taken = method_of(str(tmp_path / "image_gpt.safetensors"))
    assert torch.equal(taken.student.codebook.centres, method.student.codebook.centres)
    assert taken.look_steps == 0
    loss, parts = method.loss(method.student, [torch.randn(3, 1, 8, 8)], 0)
    assert loss.item() == pytest.approx(math.log(8), rel=1e-5)
    assert parts["unigram_bits"] <= 3.0


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"colours": 9}, "its entries are 8, this model and these scans have 9"),
        ({"patch": (1, 4, 4)}, "voxels a patch"),
        ({"scale": "HU / 500"}, "scale of voxels are z-score, this model and these scans have HU / 500"),
    ],
)
def test_a_codebook_that_does_not_fit_is_refused(tmp_path: Path, other: dict[str, Any], words: str) -> None:
    method = method_of()
    method.save(tmp_path)
    with pytest.raises(UserError, match=words):
        method_of(str(tmp_path / "image_gpt.safetensors"), **other)


def test_too_few_grey_values_for_the_codebook_are_told() -> None:
    method = method_of()
    method.look([torch.zeros(2, 1, 8, 8)])
    with pytest.raises(UserError, match="colours 8: kmeans: 1 different points"):
        method.start()


def test_training_learns_what_follows_what() -> None:
    """Stripes: after a few dozen steps the next token is nearly certain."""
    method = method_of(colours=4, patch=(1, 1, 1))
    stripes = torch.tensor([0.0, 1.0, 2.0, 3.0]).repeat(2).expand(16, 1, 8, 8) + torch.randint(4, (16, 1, 1, 1))
    stripes = stripes % 4
    method.look([stripes])
    method.start()
    optimiser = torch.optim.AdamW(method.student.parameters(), lr=1e-2)
    losses = []
    for step in range(100):
        loss, _ = method.loss(method.student, [stripes], step)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(4), rel=1e-4)
    assert losses[-1] < 0.15


@pytest.mark.parametrize(
    ("values", "words"),
    [({"colours": 1}, "--igpt.colours 1"), ({"mask_share": 1.0}, "--igpt.mask_share"), ({"fit_steps": 0}, "fit_steps")],
)
def test_impossible_settings_name_their_flag(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        IgptConfig(**values)


def test_impossible_shapes_are_told() -> None:
    with pytest.raises(ValueError, match="heads=3 must divide width=16"):
        ImageGPTConfig(width=16, heads=3)
    with pytest.raises(ValueError, match="attention='linear' must be one of"):
        ImageGPTConfig(attention="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be \(batch, 20\)"):
        make()(torch.zeros(1, 21, dtype=torch.int64))


@pytest.mark.parametrize("objective", ["autoregressive", "bert"])
def test_the_method_pays_for_what_its_objective_names_and_says_it_in_bits(objective: str) -> None:
    method = method_of(objective=objective, mask_share=0.25)
    method.look([torch.randn(20, 1, 8, 8)])
    method.start()
    with torch.no_grad():
        method.student.output.normal_()  # it starts at 0, where every token costs the same
    x = torch.randn(3, 1, 8, 8)
    torch.manual_seed(5)
    loss, parts = method.loss(method.student, [x], 0)
    torch.manual_seed(5)
    tokens = method.student.codebook.encode(x)
    mask = random_mask(3, 16, 0.25, torch.device("cpu")) if objective == "bert" else None
    costs = -method.student(tokens, mask=mask).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    expected = costs.mean() if mask is None else costs[mask].mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(parts["bits"], expected.detach() / math.log(2))
    share = torch.bincount(tokens.flatten(), minlength=8).double() / tokens.numel()
    assert parts["unigram_bits"].item() == pytest.approx(
        -(share * share.clamp_min(1e-30).log2()).sum().item(), abs=1e-5
    )


def test_filling_leaves_after_each_pass_what_the_cosine_says() -> None:
    """Chang et al. 2022: of the masked tokens cos(pi / 2 * pass / passes) are left, the least sure ones."""
    model = make(objective="bert")
    with torch.no_grad():
        model.output.normal_()
    tokens, mask = tokens_of(model), torch.zeros(2, 20, dtype=torch.bool)
    mask[0, :16], mask[1, 4:] = True, True
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _m, _args, kwargs: seen.append(kwargs["mask"].clone()), with_kwargs=True)
    model.fill(tokens, mask, passes=4, temperature=0)
    assert [each.sum(1).tolist() for each in seen] == [
        [int(16 * math.cos(math.pi / 2 * done / 4))] * 2 for done in range(4)
    ]
    assert all(not (later & ~before).any() for before, later in pairwise(seen))
