"""Weights and config in one safetensors file, and a model card next to it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from medformer.card import write_card
from medformer.channels import channel_names, name_channels
from medformer.models import CONFIGS, Model, ModelConfig, as_saved, build

__all__ = ["load", "save"]

CONFIG_KEY = "medformer_config"
KIND_KEY = "medformer_model"
CHANNELS_KEY = "medformer_channels"  # what several are called, in their order
BEFORE_KEY = "medformer_image_gpt"  # where an Image-GPT's config was before one mechanism served all models
FINETUNED = "Finetuned"  # a backbone with its head, by medformer finetune
HUB = "hf:"


def save(model: Model, path: str | os.PathLike[str], *, card: bool = True) -> None:
    """Write the weights (in their own dtype) and the config to one safetensors file.

    The file appears under its name only when it is complete: it is written next to it, flushed to the disk and
    renamed, so that a crash or a full disk leaves the previous file as it was.

    Args:
        model: a `Backbone`, `ResNet`, `TNT` or `ImageGPT`, or one that went through `torch.compile`.
        path: file to write, usually `*.safetensors`; its folder must exist.
        card: also write `<name>.md`, what the model is and how to load it, with gaps for what only you know. A file of
            that name is left as it is.

    Raises:
        TypeError: `model` is another kind.
        OSError: the file cannot be written.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, Model):
        raise TypeError(f"medformer.save: {type(model).__name__} is not a {' or '.join(CONFIGS)}; save its backbone")
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt", KIND_KEY: type(model).__name__, CONFIG_KEY: json.dumps(as_saved(model.config))}
    if names := channel_names(model):
        metadata[CHANNELS_KEY] = json.dumps(names)
    content = safetensors.torch.save(tensors, metadata=metadata)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        reason = f"medformer.save: {error.strerror}; free space or choose another path, an older file is as it was"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself reaches the disk with its folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    if card:
        write_card(model, path)


def load(path: str | os.PathLike[str], *, strict: bool = True) -> Any:
    """Rebuild a model from a file that `save` wrote, on the CPU, in the dtype it was saved in.

    Gives a `Model`; or, of a file that `medformer finetune` wrote, a `medformer.answers.model.Finetuned`, the backbone
    with its head and classes, for `medformer.predict`.

    Leaves torch's random generator as it was.

    Args:
        path: file to read; or `hf:owner/name` for `model.safetensors` of a repository of the Hugging Face hub
            (`hf:owner/name/other.safetensors` for another file), which needs the huggingface_hub package. Nothing
            else touches the network.
        strict: raise on a file whose tensors differ from the model in name or shape. False keeps the start
            value of every tensor that does not fit and warns once with their list.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a medformer checkpoint, an unknown or impossible config, or (strict) tensors that do
            not fit.
    """
    path = _from_hub(path) if isinstance(path, str) and path.startswith(HUB) else Path(path)
    if not path.is_file():
        hint = "; a model of the Hugging Face hub is named hf:owner/name" if str(path).count("/") == 1 else ""
        raise FileNotFoundError(f"medformer.load: {path} is not a file{hint}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if BEFORE_KEY in metadata:
                metadata |= {KIND_KEY: "ImageGPT", CONFIG_KEY: metadata[BEFORE_KEY]}
            if CONFIG_KEY not in metadata:
                raise ValueError(
                    f"medformer.load: {path} is a safetensors file without a medformer config; "
                    "medformer.save writes one"
                )
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"medformer.load: {path} is damaged or not a safetensors file ({error})") from error
    kind = metadata.get(KIND_KEY, "Backbone")  # files of before there was another
    if kind == FINETUNED:
        # By name: heads are of the evaluation's room, which loads models itself.
        answers = importlib.import_module("medformer.answers.model")
        if (config := answers.backbone_kind(metadata)) is None:
            raise ValueError(f"medformer.load: {path} has a backbone of another version of medformer")
        return answers.from_tensors(tensors, metadata, _config_from(metadata[CONFIG_KEY], path, config), path)
    if kind not in CONFIGS:
        raise ValueError(f"medformer.load: {path} holds a {kind}; medformer.load reads {', '.join(CONFIGS)}")
    with torch.random.fork_rng(devices=[]):
        model = build(_config_from(metadata[CONFIG_KEY], path, CONFIGS[kind]))

    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    problems += [f"{name} is unknown" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        found, wanted = tuple(tensors[name].shape), tuple(expected[name].shape)
        if found != wanted:
            problems.append(f"{name} has shape {found} instead of {wanted}")
            del tensors[name]
    if problems:
        message = f"medformer.load: {path} does not fit its config: {'; '.join(sorted(problems))}"
        if strict:
            raise ValueError(f"{message}. strict=False loads the rest")
        warnings.warn(f"{message}. These were left at their start values or ignored", stacklevel=2)
    # assign keeps the dtype of the file; strict is decided above, with shapes included.
    model.load_state_dict(tensors, strict=False, assign=True)
    if CHANNELS_KEY in metadata:
        name_channels(model, json.loads(metadata[CHANNELS_KEY]))
    return model


def _from_hub(name: str) -> Path:
    """The local copy of `hf:owner/name[/file]`, fetched by huggingface_hub where it has none."""
    owner, _, rest = name.removeprefix(HUB).partition("/")
    repository, _, file = rest.partition("/")
    if not owner or not repository:
        raise ValueError(f"medformer.load: {name} must be hf:owner/name or hf:owner/name/file.safetensors")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ValueError(f"medformer.load: {name} needs the huggingface_hub package; pip install huggingface_hub")
    from huggingface_hub import hf_hub_download

    with fetching("medformer.load", name):
        return Path(hf_hub_download(f"{owner}/{repository}", file or "model.safetensors"))


@contextmanager
def fetching(caller: str, name: str) -> Iterator[None]:
    """ValueError, in one line, for whatever huggingface_hub and its network library raise inside."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{caller}: {name} cannot be fetched ({type(error).__name__}: {said}); check the name, the connection and "
            "the token, or give a file"
        ) from error


def _config_from(text: str, path: Path, kind: type) -> ModelConfig:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"medformer.load: the config in {path} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"medformer.load: the config in {path} must be a JSON object")
    unknown = sorted(values.keys() - {field.name for field in fields(kind)})
    if unknown:
        raise ValueError(
            f"medformer.load: the config in {path} has unknown fields {', '.join(unknown)}; "
            "it was written by another version of medformer"
        )
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"medformer.load: the config in {path} is impossible: {error}") from error
