"""The disentangled attention module: DeBERTa-v2's weights, grids in millimetres, maps."""

from __future__ import annotations

import itertools

import pytest
import torch

from medformer.disentangled_attention import DisentangledAttention

transformers = pytest.importorskip("transformers")

TOKENS, HEADS, WIDTH = 40, 2, 16


def deberta(pos_att_type: list[str], share: bool, buckets: int):
    """A DeBERTa-v2 encoder of one layer, and what its attention gives."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Encoder

    torch.manual_seed(0)
    config = transformers.DebertaV2Config(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_hidden_layers=1, intermediate_size=32,
        relative_attention=True,
        pos_att_type=pos_att_type, share_att_key=share, position_buckets=buckets, max_position_embeddings=64,
        max_relative_positions=-1, norm_rel_ebd="layer_norm", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    encoder = DebertaV2Encoder(config).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return config, encoder


def read(config, encoder, state: dict | None = None) -> DisentangledAttention:
    return DisentangledAttention.from_transformers(
        state or encoder.layer[0].attention.state_dict(), encoder.get_rel_embedding(), heads=HEADS,
        pos_att_type=config.pos_att_type, share_att_key=config.share_att_key, position_buckets=config.position_buckets,
        max_relative_positions=config.max_position_embeddings,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("buckets", [8, -1], ids=["log buckets", "no buckets"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("pos_att_type", [["c2p"], ["p2c"], ["c2p", "p2c"]], ids="+".join)
def test_matches_transformers_deberta_v2(pos_att_type: list[str], share: bool, buckets: int) -> None:
    config, encoder = deberta(pos_att_type, share, buckets)
    attention = encoder.layer[0].attention.self
    x = torch.randn(2, TOKENS, WIDTH)
    mask = torch.arange(TOKENS) < torch.tensor([[TOKENS], [29]])
    pairs = (mask[:, None, None] & mask[:, None, :, None]).bool()
    expected = attention(x, pairs, rel_embeddings=encoder.get_rel_embedding())[0]
    module = read(config, encoder, attention.state_dict())
    out = module(x, key_padding_mask=mask)
    # fp32 rounding: both against float64
    exact = module.double()(x.double(), key_padding_mask=mask)
    assert (out - exact).norm() <= 1e-6 * exact.norm()
    torch.testing.assert_close(expected[mask].double(), exact[mask], rtol=1e-5, atol=1e-5)


def test_a_whole_deberta_v2_layer_agrees() -> None:
    config, encoder = deberta(["c2p", "p2c"], True, 8)
    layer = encoder.layer[0]
    x = torch.randn(2, TOKENS, WIDTH)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    expected = encoder(x, mask).last_hidden_state
    module = read(config, encoder)
    mixed = layer.attention.output.LayerNorm(module(x) + x)
    out = layer.output(layer.intermediate(mixed), mixed)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_a_missing_weight_is_named() -> None:
    config, encoder = deberta(["c2p"], False, 8)
    state = encoder.layer[0].attention.self.state_dict()
    del state["pos_key_proj.bias"]
    with pytest.raises(ValueError, match=r"the state has no pos_key_proj\.bias; it holds"):
        read(config, encoder, state)


def volume(**options) -> DisentangledAttention:
    torch.manual_seed(0)
    module = DisentangledAttention(WIDTH, HEADS, max_distance=4, **options).eval()
    for table in module.tables:
        torch.nn.init.normal_(table)
    return module


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("num_buckets", [None, 3])
def test_every_parameter_of_a_volume_gets_a_gradient(share: bool, num_buckets: int | None) -> None:
    module = volume(prefix_tokens=1, share_projections=share, num_buckets=num_buckets)
    x = torch.randn(2, 1 + 3 * 2 * 4, WIDTH)
    module(x, grid=(3, 2, 4)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_scans_of_other_spacing_share_the_table() -> None:
    """Every second token of a fine grid sees the others at the distances of a coarse one."""
    module = volume(unit_mm=2.0, dims=2)
    torch.manual_seed(1)
    fine = torch.randn(1, 6, 8, WIDTH)
    coarse = fine[:, ::2, ::2]
    mask = torch.zeros(1, 6, 8, dtype=torch.bool)
    mask[:, ::2, ::2] = True
    out = module(fine.flatten(1, 2), grid=(6, 8), spacing_mm=(1.0, 1.5), key_padding_mask=mask.flatten(1))
    expected = module(coarse.flatten(1, 2), grid=(3, 4), spacing_mm=(2.0, 3.0))
    torch.testing.assert_close(out[mask.flatten(1)], expected.flatten(0, 1))


def test_moving_a_volume_moves_the_result() -> None:
    """Relative positions know no origin: a cyclic shift along an axis of period 1 aside, crops agree by distance."""
    module = volume()
    torch.manual_seed(1)
    x = torch.randn(1, 1, 1, 9, WIDTH)
    mask = torch.zeros(1, 9, dtype=torch.bool)
    mask[:, 2:6] = True
    whole = module(x.flatten(1, 3), grid=(1, 1, 9), key_padding_mask=mask)[:, 2:6]
    part = module(x[:, :, :, 2:6].flatten(1, 3), grid=(1, 1, 4))
    torch.testing.assert_close(whole, part)


@pytest.mark.parametrize("relative", ["grid", "sequence"])
def test_maps_give_the_output_and_its_terms_add_up(relative: str) -> None:
    terms = ("c2c", "c2p", "p2c", "p2p", "cp2cp")
    options = {"grid": (2, 3, 2)} if relative == "grid" else {}
    module = volume(terms=terms, relative=relative, prefix_tokens=2 if relative == "grid" else 0)
    x = torch.randn(2, 14, WIDTH)
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[0, 9:] = False
    queries = torch.tensor([0, 3, 13])
    made = module.maps(x, queries, key_padding_mask=mask, **options)
    assert list(made.terms) == list(terms)
    v = module._split(x)[2]
    out = module.proj((made.weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, module(x, key_padding_mask=mask, **options)[:, queries])
    twice = sum(made.terms[name] for name in ("c2c", "c2p", "p2c", "p2p"))
    torch.testing.assert_close(made.terms["cp2cp"], twice)
    share = made.share()
    torch.testing.assert_close(sum(share.values()), torch.ones(2, HEADS))
    torch.testing.assert_close(share["cp2cp"], torch.full((2, HEADS), 0.5))


def test_absolute_positions_alone_are_a_plain_sum_in_cp2cp() -> None:
    module = volume(terms=("cp2cp",), relative=None, absolute=True, qkv_bias=False)
    x, position = torch.randn(1, 12, WIDTH), torch.randn(12, WIDTH)
    q, k, _ = module._split(x + position)
    _, _, v = module._split(x)
    usual = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(module(x, position=position), module.proj(usual.transpose(1, 2).flatten(2)))


def test_dropout_is_only_in_training_and_follows_its_seed() -> None:
    module = volume(dropout=0.5)
    x = torch.randn(1, 8, WIDTH)
    still = module(x, grid=(2, 2, 2))
    torch.testing.assert_close(module(x, grid=(2, 2, 2)), still, rtol=0, atol=0)
    module.train()
    one, other, again = (module(x, grid=(2, 2, 2), seed=seed) for seed in (1, 2, 1))
    torch.testing.assert_close(one, again, rtol=0, atol=0)
    assert not torch.equal(one, other)


def test_torch_compile_takes_it_whole() -> None:
    module = volume(prefix_tokens=1)
    x = torch.randn(1, 9, WIDTH)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, grid=(2, 2, 2)), module(x, grid=(2, 2, 2)))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("heads=3 must divide width=16", {"heads": 3}),
        ("terms holds 'x2c', which must be one of c2c", {"terms": ("x2c",)}),
        ("max_distance=0 must be at least 1 for 3 axes", {"max_distance": 0}),
        ("relative='volume' must be 'grid', 'sequence' or None", {"relative": "volume"}),
        ("need a position; set relative or absolute", {"relative": None}),
        ("num_buckets=99 must be between 2 and max_distance=32", {"num_buckets": 99}),
    ],
)
def test_bad_arguments_are_named(message: str, options: dict) -> None:
    with pytest.raises(ValueError, match=r"^(DisentangledAttention|axis_expansion): ") as caught:
        DisentangledAttention(**{"width": WIDTH, "heads": HEADS} | options)
    assert message in str(caught.value)


def test_bad_calls_are_named() -> None:
    x = torch.zeros(1, 8, WIDTH)
    calls = {
        "relative='grid' needs grid": {},
        "must have dims=3 axes": {"grid": (2, 4)},
        "unit_mm=None but spacing_mm=(1, 1, 1)": {"grid": (2, 2, 2), "spacing_mm": (1, 1, 1)},
        "absolute=False but position is given": {"grid": (2, 2, 2), "position": x},
        "grid=(2, 2, 3) holds 12 tokens, but q has 8": {"grid": (2, 2, 3)},
    }
    for message, options in itertools.chain(calls.items()):
        with pytest.raises(ValueError, match=r"attention: |Attention: ") as caught:
            volume()(x, **options)
        assert message in str(caught.value)
