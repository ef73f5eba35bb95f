"""Vision transformers: tensors of a `Layout` into those of a `Backbone`, and the configuration that follows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from medformer.backbone import Backbone, BackboneConfig
from medformer.weights.fitting import built, filled, fit_kernel
from medformer.weights.layouts import Layout
from medformer.weights.origin import Origin
from medformer.weights.reading import Weights

__all__ = ["load"]

_ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu",
}  # fmt: skip
_ADVICE = {
    "heads": "attention heads, 12 for a ViT-B",
    "norm_eps": "1e-6 in most ViTs, 1e-12 in transformers' ViTModel",
    "activation": "'gelu', 'gelu_tanh' or 'quick_gelu'",
}


def load(
    caller: str, weights: Weights, layout: Layout, *, dims: int | None, in_channels: int | None, axes: str,
    strict: bool, given: dict[str, Any],
) -> Backbone:  # fmt: skip
    """The backbone. `given` holds fields of `BackboneConfig`, which win over the file's config and the layout."""
    state, left_out = _renamed(weights.state, layout)
    kernel = state["patch_embed.conv.weight"]
    own_dims, width = kernel.ndim - 2, kernel.shape[0]
    dims = dims or own_dims
    if dims < own_dims:
        raise ValueError(f"{caller}: the weights are of volumes (kernel {tuple(kernel.shape)}); dims={dims} must be 3")
    _refuse_other_blocks(caller, state)
    state = _joined(caller, state)
    depth = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1)
    if "blocks.0.mlp.fc2.weight" not in state or depth < 1:
        raise ValueError(f"{caller}: layout {layout.name} has blocks.0.mlp.fc2.weight and the weights do not")
    hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
    gated = state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * hidden
    settings, sources = _settings(caller, weights, layout, state, width, depth, own_dims, gated, given)
    heads = settings["heads"]
    for name in ("class_token", "register_tokens", "dist_token", "mask_token"):
        if name in state:
            state[name] = state[name].reshape(-1, width)
    tokens = [state.pop(name) for name in ("dist_token", "register_tokens") if name in state]
    if tokens:
        state["register_tokens"] = torch.cat(tokens)
    for name in ("class_token", "mask_token"):
        if name in state:
            state[name] = state[name][0]
    registers, class_token = len(state.get("register_tokens", ())), "class_token" in state

    order = axes == "zyx" and layout.axes == "xyz" and own_dims == 3
    options: dict[str, Any] = {
        "dims": dims, "in_channels": in_channels or (kernel.shape[1] if dims == own_dims else 1), "width": width,
        "depth": depth, "patch_padding": 0, "mlp": "gated" if gated else "dense",
        "mlp_ratio": _ratio(caller, hidden, width, gated), "attention": "softmax", "registers": registers,
        "class_token": class_token, "mask_token": "mask_token" in state,
        "qk_norm": "blocks.0.attention.q_norm.weight" in state, "position": "none",
        "layer_scale": 1e-5 if "blocks.0.scale1" in state else None,
        "classes": state["head.weight"].shape[0] if "head.weight" in state else 0, **settings,
    }  # fmt: skip
    patch = tuple(kernel.shape[2:])
    patch = patch[::-1] if order else patch
    patch = patch if dims == own_dims else (patch[0], *patch)
    options["patch_size"] = options["patch_stride"] = patch[0] if len(set(patch)) == 1 else patch
    if order:
        kernel = kernel.permute(0, 1, 4, 3, 2)
    table = None
    if "pos_embed" in state:
        given_grid = given.get("position_grid")
        table = _table(caller, state, width, own_dims, given_grid, [int(class_token), registers])
        table = table.permute(2, 1, 0, 3) if order else table
        if dims > own_dims:
            table = table.expand(table.shape[0], *table.shape)
        grid = tuple(table.shape[:-1])
        options |= {"position": "learned", "position_grid": grid[0] if len(set(grid)) == 1 else grid}
    if layout.rotary is not None:
        if dims > own_dims:
            raise ValueError(
                f"{caller}: dims=3 has no place in layout {layout.name}, whose rotary positions know two axes; use "
                "dims=2 on slices (medformer.SliceEncoder)"
            )
        options |= {"position": "rotary", "rotary_coordinates": "unit"}
        _turn(state, layout.rotary.pairs, heads, width, own_dims, order)
    options |= given
    if options.get("position") != "learned":
        options["position_grid"] = None
    if options.get("position") != "rotary":
        options |= {"rotary_coordinates": "index", "rotary_periods": 100.0}
    model = built(Backbone, BackboneConfig(**options))
    if model.config.position == "learned" and table is not None:
        state["position.patches"] = table
        if class_token:
            state["position.cls"] = state.pop("position_of_class", torch.zeros(width))
    state.pop("position_of_class", None)
    state["patch_embed.conv.weight"] = fit_kernel(kernel, model.patch_embed.conv.weight)
    if "patch_embed.conv.bias" not in state:
        state["patch_embed.conv.bias"] = torch.zeros(width)
    filled(caller, model, state, strict, _hint(state, model))
    model.origin = Origin(
        layout=layout.name, compared_with=layout.source, prefix=weights.prefix,
        left_out=tuple(sorted(left_out + weights.left_out)), settings=sources,
        axes="zyx, turned from its own xyz" if order else layout.axes, input=layout.input,
    )  # fmt: skip
    return model


def _renamed(found: Mapping[str, Tensor], layout: Layout) -> tuple[dict[str, Tensor], list[str]]:
    """Under our names, without what is no part of the encoder."""
    state, left_out = {}, []
    has_pool = any(name.startswith(("attn_pool.", "head_dist.", "pooler.", "pre_logits.")) for name in found)
    for name, tensor in found.items():
        pooled = has_pool and name in ("head.weight", "head.bias")  # reads what is no class token
        other = layout.name == "flexict" and name.startswith("patch_embed_2D.")
        if pooled or other or any(re.search(pattern, name) for pattern in layout.dropped):
            if name.endswith("qkv.bias_mask"):  # DINOv3 keeps a bias of keys that it multiplies by 0
                state[name.replace(".attn.", ".attention.")] = tensor
            else:
                left_out.append(name)
            continue
        for pattern, ours in layout.names:
            name = re.sub(pattern, ours, name)
        state[name] = tensor
    return state, left_out


def _refuse_other_blocks(caller: str, state: Mapping[str, Tensor]) -> None:
    reasons = {
        "norm_pre.weight": "a norm in front of the blocks (CLIP)",
        "cls_norm.weight": "another norm for the class token than for patches",
        "blocks.0.mlp.norm.weight": "a norm inside its MLPs (EVA-02)",
        "blocks.0.attention.norm.weight": "a norm inside its attention",
        "blocks.0.attention.relative_position_bias_table": "relative position biases (BEiT)",
        "rel_pos_bias.relative_position_bias_table": "relative position biases (BEiT)",
        "patch_embed.norm.weight": "a norm behind its patch embedding",
    }
    for name, reason in reasons.items():
        if name in state:
            raise ValueError(f"{caller}: the weights have {reason}, tensor {name}; no network of medformer has one")
    if "norm.weight" not in state and "fc_norm.weight" in state:
        raise ValueError(
            f"{caller}: the weights norm the mean of the tokens (fc_norm) and not the tokens; a Backbone norms tokens. "
            "Load the pretrained file that was fine-tuned, or export the model with global_pool='token'"
        )


def _joined(caller: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values in one tensor, and both halves of gated MLPs; biases that are not there are 0."""
    state = dict(state)
    blocks = {match[1] for name in state if (match := re.match(r"(blocks\.\d+)\.", name))}
    for block in blocks:
        for kind in ("weight", "bias"):
            base = f"{block}.attention"
            parts = {p: state.pop(f"{base}.{p}.{kind}") for p in ("q", "k", "v", "kv") if f"{base}.{p}.{kind}" in state}
            if "kv" in parts:
                parts["k"], parts["v"] = parts.pop("kv").chunk(2)
            if parts:
                like = next(iter(parts.values()))
                if kind == "weight" and len(parts) < 3:
                    raise ValueError(f"{caller}: {base} holds {', '.join(parts)} of q, k, v; a block needs all")
                state[f"{base}.qkv.{kind}"] = torch.cat([parts.get(p, torch.zeros_like(like)) for p in "qkv"])
            halves = [f"{block}.mlp.{half}.{kind}" for half in ("gate", "up")]
            if all(name in state for name in halves):
                state[f"{block}.mlp.fc1.{kind}"] = torch.cat([state.pop(name) for name in halves])
            elif halves[1] in state:  # transformers' DINOv3 without a gate
                state[f"{block}.mlp.fc1.{kind}"] = state.pop(halves[1])
        mask = state.pop(f"{block}.attention.qkv.bias_mask", None)
        bias = f"{block}.attention.qkv.bias"
        weight = state.get(f"{block}.attention.qkv.weight")
        if weight is not None and bias not in state:
            state[bias] = torch.zeros(weight.shape[0])
        elif mask is not None:
            if not bool(torch.isfinite(mask).all()):
                raise ValueError(
                    f"{caller}: {block}.attn.qkv.bias_mask is not a number: the model was never initialised"
                )
            state[bias] = state[bias] * mask.to(state[bias].dtype)
    return state


def _settings(
    caller: str, weights: Weights, layout: Layout, state: dict[str, Tensor], width: int, depth: int, dims: int,
    gated: bool, given: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, str]]:  # fmt: skip
    """What decides numbers and no shape says, and where each comes from; ValueError with all that nothing says."""
    found: dict[str, tuple[Any, str]] = {
        name: (value, f"layout {layout.name}") for name, value in layout.published.items()
    }
    periods = None
    if layout.rotary is not None and layout.rotary.periods is not None:
        tensor = weights.state.get(layout.rotary.periods)
        if tensor is None:
            raise ValueError(f"{caller}: layout {layout.name} has {layout.rotary.periods} and the weights do not")
        periods = tuple(tensor.double().tolist())
        found["heads"] = (width // (2 * dims * len(periods)), f"{layout.rotary.periods}, {len(periods)} of each axis")
        found["rotary_periods"] = (periods, layout.rotary.periods)
    elif layout.rotary is not None and layout.rotary.base is not None:
        found["rotary_periods"] = (layout.rotary.base, f"layout {layout.name}")
    heads = layout.heads.get(width)
    fixed = "pos_embed" in state and "class_token" in state and not state["pos_embed"].reshape(-1, width)[0].any()
    # What shares these widths and has other heads: MoCo v3's ViT-S (12, fixed positions), timm's first ViT-S (768 wide,
    # 8 blocks, 8 heads), ViTs of 1536 that are not DINOv2's, which is gated.
    doubtful = (layout.name == "vit" and ((width == 384 and fixed) or (width, depth) == (768, 8))) or (
        width == 1536 and not gated
    )
    if heads is not None and not doubtful and "heads" not in found:
        found["heads"] = (heads, f"published models of layout {layout.name}, {width} wide")
    config = weights.config
    if "num_attention_heads" in config:
        found["heads"] = (config["num_attention_heads"], "config")
    if "layer_norm_eps" in config:
        found["norm_eps"] = (config["layer_norm_eps"], "config")
    if layout.rotary is not None and periods is None:
        theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta")
        if theta:
            found["rotary_periods"] = (float(theta), "config")
    if "hidden_act" in config and not gated:
        act = config["hidden_act"]
        if act not in _ACTIVATIONS and "activation" not in given:
            raise ValueError(f"{caller}: hidden_act={act!r} must be one of {', '.join(_ACTIVATIONS)}")
        found["activation"] = (_ACTIVATIONS.get(act), "config")
    if gated:
        if config.get("use_gated_mlp") and config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"{caller}: a gated MLP with hidden_act={config['hidden_act']!r} must be silu's (SwiGLU)")
        found.pop("activation", None)
    for name in ("heads", "norm_eps", "activation"):
        if name in given:
            found[name] = (given[name], "argument")
    missing = [n for n in ("heads", "norm_eps", "activation") if n not in found and not (gated and n == "activation")]
    if missing:
        asked = "; ".join(f"{name}= ({_ADVICE[name]})" for name in missing)
        raise ValueError(
            f"{caller}: no tensor of layout {layout.name}, {width} wide, says {', '.join(missing)}; give {asked}, or "
            "config= with the model's config.json"
        )
    heads = found["heads"][0]
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"{caller}: heads={heads!r} ({found['heads'][1]}) must divide the width {width}")
    head_width = width // heads
    if layout.rotary is not None and head_width % (2 * dims):
        raise ValueError(
            f"{caller}: heads={heads} leaves {head_width} channels to a head, which {2 * dims} must divide"
        )
    values = {name: value for name, (value, _) in found.items()}
    return values, {name: f"{value} ({where})" for name, (value, where) in found.items()}


def _ratio(caller: str, hidden: int, width: int, gated: bool) -> float:
    """`mlp_ratio` that gives `hidden` channels exactly."""
    if not gated:
        return hidden / width
    for ratio in (hidden * 1.5 / width, math.nextafter(hidden * 1.5 / width, 0)):
        if math.ceil(width * ratio * 2 / 24) * 8 == hidden:
            return ratio
    raise ValueError(f"{caller}: a gated MLP of {hidden} hidden channels must have a multiple of 8")


def _table(
    caller: str, state: dict[str, Tensor], width: int, dims: int, given: Any, prefixes: list[int]
) -> Tensor:  # fmt: skip
    """Positions of patches (*grid, C); those of the class token go to `position_of_class`, of registers into them."""
    rows = state.pop("pos_embed").reshape(-1, width)
    class_token, registers = prefixes
    choices = sorted({0, class_token, class_token + registers})
    if given is not None:
        grid = (given,) * dims if isinstance(given, int) else tuple(given)
        fits = {front: grid for front in choices if len(rows) - front == math.prod(grid)}
    else:
        sides = {front: round((len(rows) - front) ** (1 / dims)) for front in choices}
        fits = {front: (side,) * dims for front, side in sides.items() if side**dims == len(rows) - front}
        # 225 rows: 15 x 15, or 14 x 16 and a class token. Gains come with positions of patches alone (DeiT III).
        if class_token and list(fits) == [0] and "blocks.0.scale1" not in state:
            fits = {}
    if len(fits) != 1:
        shape = "square" if dims == 2 else "cube"
        raise ValueError(
            f"{caller}: pos_embed of {len(rows)} rows must be a {shape} of patches"
            f"{' and a class token' if class_token else ''}; give position_grid=, tokens of each axis"
        )
    ((front, grid),) = fits.items()
    if front and class_token:
        state["position_of_class"] = rows[0]
    if front > class_token:
        state["register_tokens"] = state["register_tokens"] + rows[class_token:front]
    return rows[front:].reshape(*grid, width)


def _turn(state: dict[str, Tensor], pairs: str, heads: int, width: int, dims: int, reverse: bool) -> None:
    """Channels of queries and keys where ours are turned: neighbours, axis after axis; scores do not change."""
    head_width = width // heads
    channels = torch.arange(head_width)
    couples = channels.view(-1, 2) if pairs == "neighbours" else channels.view(2, -1).T
    by_axis = couples.reshape(dims, -1, 2)
    order = (by_axis.flip(0) if reverse else by_axis).reshape(-1)
    for name in [name for name in state if re.search(r"\.attention\.qkv\.(weight|bias)$", name)]:
        tensor = state[name].unflatten(0, (3, heads, head_width))
        turned = torch.cat([tensor[:2, :, order], tensor[2:]])
        state[name] = turned.flatten(0, 2)
    for name in [name for name in state if re.search(r"\.attention\.[qk]_norm\.(weight|bias)$", name)]:
        state[name] = state[name][order]


def _hint(state: Mapping[str, Tensor], model: Backbone) -> str:
    """The option that helps with what is missing."""
    expected = model.state_dict().keys() - state.keys()
    if any(name.startswith("norm.") for name in expected):
        return ". The final norm is not in the file: take the file before it was fine-tuned or pooled"
    if any(".scale" in name for name in expected):
        return ". layer_scale=None builds no gains"
    if any(name.startswith("head.") for name in expected):
        return ". classes=0 builds no head"
    return ""
