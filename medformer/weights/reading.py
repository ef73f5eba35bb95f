"""Weights as they lie: a file, a folder with its config, a state dict or a module; the encoder inside its wrappings.

One rule peels what trainers wrap around an encoder (`module.`, `_orig_mod.`, `teacher.backbone.`, EMA copies, nested
dictionaries, chunks of blocks): nested dictionaries are joined by dots, and whatever stands in front of a tensor that
every encoder of a layout has, such as `patch_embed.proj.weight`, is the prefix of that encoder. What lies outside the
prefix (projection heads, students, optimisers) is left out and listed.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from medformer.checkpoint import fetching

__all__ = ["Source", "Weights", "open_weights"]

Source = str | os.PathLike[str] | Mapping[str, Any] | nn.Module

# A tensor that each layout has once, at the root of its encoder.
_ROOTS = (
    "patch_embed.proj.weight",
    "patch_embed_3D.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.weight",
    "embeddings.patch_embedding.weight",
    "conv_proj.weight",
    "layer4.0.conv1.weight",
    "7.0.conv1.weight",
)
# Of several encoders in one file the first of these that a prefix names: what its authors publish and export.
_PREFERRED = ("teacher", "ema", "target", "base_encoder", "encoder_q")
_LAST = ("student", "online", "momentum", "encoder_k")
# Put by torch into the middle of names.
_INSIDE = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_CHUNK = re.compile(r"^blocks\.\d+\.(\d+\.)")
# Harmless data that trainers pickle next to tensors.
_REBUILD = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(1).__reduce__()[0]}
_SAFE: list[Any] = [argparse.Namespace, np.dtype, np.ndarray, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]
_SAFE += [(fn, f"numpy.{core}.multiarray.{name}") for name, fn in _REBUILD.items() for core in ("core", "_core")]


@dataclass(frozen=True)
class Weights:
    """The tensors of one encoder, under the names that its own code gives them."""

    state: dict[str, Tensor]
    config: dict[str, Any]
    """config.json next to the file (transformers, timm), or empty."""
    prefix: str
    """What stood in front of the names."""
    left_out: list[str] = field(default_factory=list)
    """Tensors that are not of this encoder."""


def open_weights(
    caller: str, source: Source, *, config: Mapping[str, Any] | str | os.PathLike[str] | None, prefix: str | None
) -> Weights:
    """Read and peel.

    Args:
        caller: function named in errors.
        source: a file, a folder, `hf:owner/name`, a state dict or a module.
        config: the model's config.json, as a file or a dictionary; None: the one next to the weights, if any.
        prefix: of the encoder's names, where the file holds several that nothing tells apart.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, not tensors, code instead of data, no encoder of a known layout, or several.
    """
    found, beside = _read(caller, source)
    if isinstance(config, str | os.PathLike):
        beside = _json(caller, Path(config))
    elif config is not None:
        beside = dict(config)
    flat: dict[str, Tensor] = {}
    _flatten(found, "", flat)
    if not flat:
        raise ValueError(f"{caller}: {_named(source)} holds no tensors; give a state dict or a file of weights")
    flat = {_INSIDE.sub("", name): tensor for name, tensor in flat.items()}
    chosen = _prefix(caller, flat, prefix)
    inside = {name.removeprefix(chosen): t for name, t in flat.items() if name.startswith(chosen)}
    outside = sorted(name for name in flat if not name.startswith(chosen))
    if any(_CHUNK.match(name) for name in inside):  # DINOv2's chunks of blocks, numbered through
        inside = {_CHUNK.sub(r"blocks.\1", name): tensor for name, tensor in inside.items()}
    return Weights(inside, beside, chosen, outside)


def _named(source: Source) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else f"the {type(source).__name__}"


def _read(caller: str, source: Source) -> tuple[Any, dict[str, Any]]:
    if isinstance(source, nn.Module):
        return source.state_dict(), _config_of(source)
    if isinstance(source, Mapping):
        return source, {}
    if isinstance(source, str) and source.startswith("hf:"):
        return _read(caller, _from_hub(caller, source))
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"{caller}: source of type {type(source).__name__} must be a path, a state dict or a module")
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    beside = _json(caller, folder / "config.json") if (folder / "config.json").is_file() else {}
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin")) or sorted(path.glob("*.pth"))
        if not files:
            raise FileNotFoundError(f"{caller}: {path} holds no .safetensors, .bin or .pth; name the file of weights")
        parts = len(files) > 1 and not all(re.search(r"-\d+-of-\d+\.", file.name) for file in files)
        if parts:
            raise ValueError(f"{caller}: {path} holds {', '.join(f.name for f in files[:4])}; name one of them")
        merged: dict[str, Any] = {}
        for file in files:
            merged |= _tensors(caller, file)
        return merged, beside
    if not path.is_file():
        raise FileNotFoundError(f"{caller}: weights {path} are not a file")
    return _tensors(caller, path), beside


def _config_of(module: nn.Module) -> dict[str, Any]:
    """What a module of transformers or timm knows about itself and its tensors do not say."""
    config = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        return config.to_dict()  # type: ignore[union-attr]
    heads = {part.num_heads for part in module.modules() if isinstance(getattr(part, "num_heads", None), int)}
    eps = {part.eps for part in module.modules() if isinstance(part, nn.LayerNorm)}
    known: dict[str, Any] = {"num_attention_heads": heads.pop()} if len(heads) == 1 else {}
    known |= {"layer_norm_eps": eps.pop()} if len(eps) == 1 else {}
    blurred = [name for name, part in module.named_modules() if name.endswith(".aa") and not _is_identity(part)]
    return known | {"architecture": "resnet with anti-aliasing (aa)" if blurred else type(module).__name__}


def _is_identity(part: nn.Module) -> bool:
    return isinstance(part, nn.Identity)


def _tensors(caller: str, path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(_SAFE):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"objects of its own ({named[1]})" if named else "more than tensors"
        raise ValueError(
            f"{caller}: weights {path} hold {what}, and unpickling those runs code, which is refused; save the state "
            "dict alone, with torch.save(model.state_dict(), ...) or safetensors"
        ) from None
    except (safetensors.SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{caller}: weights {path} are damaged or of another format ({reason})") from error


def _json(caller: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{caller}: config {path} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{caller}: config {path} must be a JSON object")
    return found


def _from_hub(caller: str, name: str) -> Path:
    owner, _, rest = name.removeprefix("hf:").partition("/")
    repository, _, file = rest.partition("/")
    if not owner or not repository:
        raise ValueError(f"{caller}: {name} must be hf:owner/name or hf:owner/name/file")
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise ValueError(f"{caller}: {name} needs huggingface_hub; pip install 'medformer[hub]'") from None
    repository = f"{owner}/{repository}"
    with fetching(caller, name):
        if huggingface_hub.file_exists(repository, "config.json"):
            huggingface_hub.hf_hub_download(repository, "config.json")
        return Path(huggingface_hub.hf_hub_download(repository, file or "model.safetensors"))


def _flatten(found: Any, prefix: str, into: dict[str, Tensor]) -> None:
    if isinstance(found, nn.Module):
        found = found.state_dict()
    if not isinstance(found, Mapping):
        return
    for name, value in found.items():
        if isinstance(value, Tensor):
            into[f"{prefix}{name}"] = value
        else:
            _flatten(value, f"{prefix}{name}.", into)


def _prefix(caller: str, flat: Mapping[str, Tensor], given: str | None) -> str:
    found = sorted({n[: len(n) - len(root)] for n in flat for root in _ROOTS if n == root or n.endswith(f".{root}")})
    if given is not None:
        given = given if not given or given.endswith(".") else f"{given}."
        if given not in found:
            raise ValueError(f"{caller}: prefix={given!r} leads to no encoder; there are {found or 'none'}")
        return given
    if not found:
        held = ", ".join(sorted(flat)[:4])
        raise ValueError(f"{caller}: {_foreign(flat)}; the tensors are {held}, ...")
    order = {p: _rank(p) for p in found}
    best = [p for p in found if order[p] == min(order.values())]
    if len(best) > 1:
        raise ValueError(f"{caller}: the file holds several encoders, {', '.join(best)}; choose with prefix=")
    return best[0]


def _rank(prefix: str) -> int:
    def has(word: str) -> bool:
        return re.search(rf"(^|[._]){word}([._]|$)", prefix) is not None

    first = [rank for rank, word in enumerate(_PREFERRED) if has(word)]
    return first[0] if first else len(_PREFERRED) + any(map(has, _LAST))


def _foreign(flat: Mapping[str, Tensor]) -> str:
    """Why weights without a known root are not read."""
    known = (
        (r"\.stages\.\d+\.(blocks\.)?\d+\.(blocks\.\d+\.)?conv1\.conv\.weight$|stages\.0\.blocks\.0\.conv1\.conv\.weight$",
         "these are a residual U-Net encoder of nnU-Net (OpenMind's ResEnc-L): instance norms and leaky ReLU, no "
         "network of medformer; train them with nnssl or nnU-Net"),
        (r"eva\.blocks\.0\.|down_projection\.proj\.",
         "these are Primus (OpenMind, FlexiCT's and anatomix's decoders): norms inside its MLPs, rotary and learned "
         "positions together, no network of medformer; use dynamic-network-architectures"),
        (r"^(model\.)?(model\.)?\d+\.(conv\.)?weight$",
         "these are a plain convolutional network numbered by layers (anatomix's U-Net), no network of medformer"),
        (r"relative_position_bias_table", "these are a Swin transformer, no network of medformer"),
    )  # fmt: skip
    for pattern, reason in known:
        if any(re.search(pattern, name) for name in flat):
            return reason
    return f"the weights have none of {', '.join(_ROOTS[:3])}, ... and are of no known layout"
