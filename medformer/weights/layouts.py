"""The layouts of vision transformers that are read: which tensors tell them, their names in ours, what they leave open.

A layout is data. `names` turns its names into ours; queries, keys and values that are apart go to `attention.q`, `.k`,
`.v` or `.kv`, the halves of a gated MLP to `mlp.gate` and `mlp.up`; `translate` in `vit.py` joins them. `published`
holds what the tensors do not say and every published file of this layout shares; what is neither there, nor in a config
next to the file, nor given, is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

__all__ = ["LAYOUTS", "Layout", "Rotary"]

State = Mapping[str, Tensor]
Names = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Rotary:
    """How a layout turns queries and keys."""

    pairs: Literal["neighbours", "halves"]
    """Channel 2i with 2i + 1, or channel i with i + D / 2."""
    base: float | None = None
    """Periods are base^(i / n); None: the file holds them."""
    periods: str | None = None
    """Tensor that holds them."""


@dataclass(frozen=True)
class Layout:
    name: str
    source: str
    """Whose code it was compared with."""
    fits: Callable[[State, str], bool]
    """Of the state and the prefix that was peeled."""
    names: Names
    published: dict[str, Any] = field(default_factory=dict)
    heads: dict[int, int] = field(default_factory=dict)
    """Heads of the published models by their width."""
    rotary: Rotary | None = None
    axes: Literal["zyx", "xyz"] = "zyx"
    """Order of the axes that its own code is given."""
    dropped: tuple[str, ...] = ()
    """Patterns of tensors that are no part of the encoder."""
    input: str = "scaled as its authors do; the weights do not say"


_TIMM: Names = (
    (r"^cls_token$", "class_token"),
    (r"^(reg_token|register_tokens|storage_tokens)$", "register_tokens"),
    (r"^patch_embed(_[23]D)?\.proj\.", "patch_embed.conv."),
    (r"\.attn\.", ".attention."),
    (r"\.attention\.([qkv])_bias$", r".attention.\1.bias"),
    (r"\.ls([12])\.gamma$", r".scale\1"),
    (r"\.gamma_([12])$", r".scale\1"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.(w1|fc1_g)\.", ".mlp.gate."),
    (r"\.mlp\.(w2|fc1_x)\.", ".mlp.up."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"^head\.head\.", "head."),
)
_TRANSFORMERS: Names = (
    (r"^embeddings\.cls_token$", "class_token"),
    (r"^embeddings\.register_tokens$", "register_tokens"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings$|^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embeddings?\.(projection\.)?", "patch_embed.conv."),
    (r"^(encoder\.|model\.)?(layers?)\.(\d+)\.", r"blocks.\3."),
    (r"\.(norm1|layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(norm2|layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attention.\1."),
    (r"\.self_attn\.", ".attention."),
    (r"\.attention\.(query|q_proj)\.", ".attention.q."),
    (r"\.attention\.(key|k_proj)\.", ".attention.k."),
    (r"\.attention\.(value|v_proj)\.", ".attention.v."),
    (r"\.attention\.(output\.dense|o_proj|out_proj)\.", ".attention.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.fc2."),
    (r"\.mlp\.gate_proj\.", ".mlp.gate."),
    (r"\.mlp\.up_proj\.", ".mlp.up."),
    (r"\.layer_scale([12])\.lambda1$", r".scale\1"),
    (r"^(layernorm|post_layernorm)\.", "norm."),
)
_TORCHVISION: Names = (
    (r"^conv_proj\.", "patch_embed.conv."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attention.qkv."),
    (r"\.self_attention\.out_proj\.", ".attention.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)
# Heads of every published ViT of these widths, but for those that their layout or depth tells apart.
_HEADS = {192: 3, 256: 4, 320: 5, 384: 6, 512: 8, 640: 10, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}
_IMAGENET = "RGB from 0 to 1, minus (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225)"
_TOKENS = (r"^rope_embed\.periods$", r"^rope\.periods$", r"\.bias_mask$", r"^local_cls_norm\.")
_HEADS_OFF = (
    r"^(dino|ibot)_head\.", r"^head\.(mlp|last_layer|\d+)\b", r"^head_dist\.", r"^pre_logits\.", r"^attn_pool\.",
    r"^pooler\.", r"^classifier\.", r"^predictor\.", r"^projector\.",
)  # fmt: skip
_VIT: dict[str, Any] = {"norm_eps": 1e-6, "activation": "gelu"}


def _three(state: State, name: str = "patch_embed.proj.weight") -> bool:
    return name in state and state[name].ndim == 5


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "flexict", "ricklisz/FlexiCT e120a9b, Flexi_CT_Backbone",
        lambda state, _: "patch_embed_3D.proj.weight" in state, _TIMM, published=_VIT,
        rotary=Rotary("halves", periods="rope_embed_3D.periods"),
        dropped=(*_TOKENS, *_HEADS_OFF, r"^rope_embed_[23]D\."),
    ),
    Layout(
        "spectre", "cclaess/SPECTRE 9260676, VisionTransformer",
        lambda state, _: _three(state) and "blocks.0.attn.kv.weight" in state, _TIMM,
        published={"norm_eps": 1e-5, "activation": "gelu"}, heads={192: 2, 384: 4, 768: 8, 1080: 12},
        rotary=Rotary("halves", periods="rope.periods"), axes="xyz", dropped=(*_TOKENS, *_HEADS_OFF),
    ),
    Layout(
        "voxelfm", "rmaguado/VoxelFM fba41a3, DinoVisionTransformer",
        lambda state, _: _three(state) and "rope_embed.periods" in state, _TIMM,
        published={"norm_eps": 1e-5, "activation": "gelu"}, rotary=Rotary("neighbours", periods="rope_embed.periods"),
        dropped=(*_TOKENS, *_HEADS_OFF),
    ),
    Layout(
        "3dino", "AICONSlab/3DINO 85bd443, DinoVisionTransformer3d",
        lambda state, _: _three(state) and {"pos_embed", "blocks.0.ls1.gamma"} <= state.keys(), _TIMM, published=_VIT,
        heads=_HEADS, axes="xyz", dropped=_HEADS_OFF,
    ),
    Layout(
        "dinov3", "facebookresearch/dinov3 6876159, DinoVisionTransformer",
        lambda state, _: "rope_embed.periods" in state and not _three(state), _TIMM,
        published={"norm_eps": 1e-5, "activation": "gelu"}, rotary=Rotary("halves", periods="rope_embed.periods"),
        dropped=(*_TOKENS, *_HEADS_OFF), input=_IMAGENET,
    ),
    Layout(
        "timm-dinov3", "timm 1.0.31, Eva",
        lambda state, _: {"cls_token", "reg_token", "blocks.0.gamma_1"} <= state.keys() and "pos_embed" not in state,
        _TIMM,
        published={"norm_eps": 1e-5, "activation": "gelu"}, heads={384: 6, 768: 12, 1024: 16, 1280: 20, 4096: 32},
        rotary=Rotary("halves", base=100.0), dropped=(*_TOKENS, *_HEADS_OFF), input=_IMAGENET,
    ),
    Layout(
        "mae", "facebookresearch/mae efb2a80, MaskedAutoencoderViT",
        lambda state, _: "decoder_embed.weight" in state, _TIMM, published=_VIT, heads=_HEADS,
        dropped=(r"^decoder_", r"^mask_token$"), input=_IMAGENET,
    ),
    Layout(
        "mocov3", "facebookresearch/moco-v3 c349e6e, VisionTransformerMoCo",
        lambda state, prefix: "pos_embed" in state and ("base_encoder." in prefix or "momentum_encoder." in prefix),
        _TIMM, published=_VIT, heads={384: 12, 768: 12}, dropped=_HEADS_OFF, input=_IMAGENET,
    ),
    Layout(
        "dinov2", "facebookresearch/dinov2 b8931f7, DinoVisionTransformer",
        lambda state, _: {"mask_token", "pos_embed", "blocks.0.ls1.gamma"} <= state.keys(), _TIMM, published=_VIT,
        heads={384: 6, 768: 12, 1024: 16, 1536: 24}, dropped=_HEADS_OFF, input=_IMAGENET,
    ),
    Layout(
        "timm-siglip", "timm 1.0.31, VisionTransformer",
        lambda state, _: {"pos_embed", "blocks.0.attn.qkv.weight"} <= state.keys()
        and not {"cls_token", "blocks.0.gamma_1"} & state.keys(), _TIMM,
        published={"norm_eps": 1e-6}, heads={768: 12, 832: 13, 896: 14, 1024: 16, 1152: 16},
        dropped=_HEADS_OFF, input="RGB from 0 to 1, minus 0.5, over 0.5",
    ),
    Layout(
        "vit", "timm 1.0.31, VisionTransformer; facebookresearch/dino 7c446df",
        # Gains named gamma_1 are of timm's Eva and Beit, whose rotary positions no tensor shows.
        lambda state, _: {"pos_embed", "cls_token", "blocks.0.attn.qkv.weight"} <= state.keys()
        and "blocks.0.gamma_1" not in state, _TIMM, published=_VIT,
        heads=_HEADS, dropped=_HEADS_OFF,
    ),
    Layout(
        "transformers-dinov3", "transformers 5.24.0, DINOv3ViTModel",
        lambda state, _: "embeddings.patch_embeddings.weight" in state, _TRANSFORMERS,
        rotary=Rotary("halves", base=100.0), heads={384: 6, 768: 12, 1024: 16, 1280: 20, 4096: 32},
        dropped=(*_HEADS_OFF, r"^rope_embeddings\."), input=_IMAGENET,
    ),
    Layout(
        "transformers-siglip", "transformers 5.24.0, SiglipVisionModel",
        lambda state, _: "embeddings.position_embedding.weight" in state, _TRANSFORMERS,
        dropped=(r"^head\.", r"^embeddings\.position_ids$"), input="RGB from 0 to 1, minus 0.5, over 0.5",
    ),
    Layout(
        "transformers", "transformers 5.24.0, ViTModel, DeiTModel, ViTMAEModel, Dinov2Model, Dinov2WithRegistersModel",
        lambda state, _: "embeddings.position_embeddings" in state, _TRANSFORMERS, dropped=_HEADS_OFF,
    ),
    Layout(
        "torchvision-vit", "torchvision 0.29.1, VisionTransformer",
        lambda state, _: "encoder.layers.encoder_layer_0.ln_1.weight" in state, _TORCHVISION, published=_VIT,
        heads={768: 12, 1024: 16, 1280: 16}, input=_IMAGENET,
    ),
)  # fmt: skip
