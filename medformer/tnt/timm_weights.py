"""timm's TNT, its weights and sizes: `tnt_s_patch16_224`, `tnt_s_legacy_patch16_224`, `tnt_b_patch16_224`."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from medformer.tnt.config import TNTConfig, TNTLevel
from medformer.tnt.model import TNT

__all__ = ["tnt_base", "tnt_from_timm", "tnt_small"]


def tnt_small(*, legacy: bool = True, classes: int = 1000, in_channels: int = 3, attention: str = "softmax") -> TNT:
    """TNT-S for images of about 224 x 224: inner width 24, outer 384. Source: Han et al. 2021, table 2.

    Args:
        legacy: as published and as timm's `tnt_s_legacy_patch16_224` (23,755,336 parameters with 1000 classes); False
            as timm's `tnt_s_patch16_224`, which convolves within a patch and normalises whole windows.
        classes: outputs of the head; 0 for none.
        in_channels: of the image.
        attention: of the outer level.
    """
    return TNT(_config(24, 384, 12, 4, 6, legacy, classes, in_channels, attention))


def tnt_base(*, legacy: bool = True, classes: int = 1000, in_channels: int = 3, attention: str = "softmax") -> TNT:
    """TNT-B: inner width 40, outer 640 (65,406,600 parameters with 1000 classes); arguments as for `tnt_small`."""
    return TNT(_config(40, 640, 12, 4, 10, legacy, classes, in_channels, attention))


def _config(
    inner: int, outer: int, depth: int, inner_heads: int, outer_heads: int, legacy: bool, classes: int,
    in_channels: int, attention: str, grid: int = 14, window: int = 4, qkv_bias: bool = False,
) -> TNTConfig:  # fmt: skip
    pixels = TNTLevel(width=inner, depth=depth, heads=inner_heads, kernel=7, stride=4, padding=3)
    patches = TNTLevel(width=outer, depth=depth, heads=outer_heads, kernel=window, stride=window)
    return TNTConfig(
        levels=(pixels, patches), dims=2, in_channels=in_channels, attention=attention,  # type: ignore[arg-type]
        projection="token" if legacy else "window", isolate=not legacy, position_grid=grid, classes=classes,
        qkv_bias=qkv_bias, norm_eps=1e-5,
    )  # fmt: skip


def tnt_from_timm(state: Mapping[str, Tensor], *, num_heads_inner: int = 4, num_heads_outer: int | None = None) -> TNT:
    """The same model with the weights of a timm TNT (`timm_model.state_dict()`); outputs agree.

    Args:
        state: of any size, legacy or not, patches four times the first stride.
        num_heads_inner: which the weights do not tell.
        num_heads_outer: None: heads of 64 channels.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; names all of them.
    """
    needed = ("patch_pos", "pixel_pos", "blocks.0.proj.weight", "pixel_embed.proj.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"tnt_from_timm: {', '.join(missing)} missing; give state_dict() of a timm TNT")
    outer, inner = state["patch_pos"].shape[2], state["pixel_pos"].shape[1]
    tokens = state["patch_pos"].shape[1] - 1
    grid = round(tokens**0.5)
    if grid * grid != tokens:
        raise ValueError(f"tnt_from_timm: patch_pos holds {tokens} patches; they must form a square")
    config = _config(
        inner, outer, 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        num_heads_inner, num_heads_outer or max(1, outer // 64), "blocks.0.norm2_proj.weight" not in state,
        state["head.weight"].shape[0] if "head.weight" in state else 0, state["pixel_embed.proj.weight"].shape[1],
        "softmax", grid, state["pixel_pos"].shape[2], "blocks.0.attn_in.qk.bias" in state,
    )  # fmt: skip
    model = TNT(config)
    found = {_name(name): tensor for name, tensor in _merged(state).items()}
    found["position.patches"] = state["patch_pos"][0, 1:].unflatten(0, (grid, grid))
    found["position.cls"] = state["patch_pos"][0, 0]
    found["class_token"] = state["cls_token"].flatten()
    found["positions.0"] = state["pixel_pos"][0].flatten(1).t()
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is unknown" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has shape {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected.keys() & found.keys()
        if found[name].shape != expected[name].shape
    ]
    if problems:
        raise ValueError(f"tnt_from_timm: {'; '.join(sorted(problems))}")
    model.load_state_dict(found)
    return model


def _merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without positions and tokens, and with timm's qk and v as one."""
    result = {}
    for name, tensor in state.items():
        if name in ("patch_pos", "pixel_pos", "cls_token") or ".v." in name:
            continue
        if ".qk." in name:
            tensor = torch.cat([tensor, state[name.replace(".qk.", ".v.")]])
        result[name.replace(".qk.", ".qkv.")] = tensor
    return result


_RENAMED = [
    (r"^pixel_embed\.proj\.", "conv."),
    (r"^(norm1|norm2)_proj\.", r"stems.0.\1."),
    (r"^proj\.", "stems.0.proj."),
    (r"^blocks\.(\d+)\.", r"stages.\1."),
    (r"\.norm_in\.", ".inner.0.0.norm1."),
    (r"\.attn_in\.", ".inner.0.0."),
    (r"\.norm_mlp_in\.", ".inner.0.0.norm2."),
    (r"\.mlp_in\.", ".inner.0.0.mlp."),
    (r"\.(norm1|norm2)_proj\.", r".fusions.0.\1."),
    (r"^(stages\.\d+)\.proj\.", r"\1.fusions.0.proj."),
    (r"\.norm_out\.", ".outer.norm1."),
    (r"\.attn_out\.", ".outer.attention."),
    (r"\.norm_mlp\.", ".outer.norm2."),
    (r"^(stages\.\d+)\.mlp\.", r"\1.outer.mlp."),
]


def _name(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name
