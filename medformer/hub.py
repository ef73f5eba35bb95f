"""Models of the Hugging Face hub, through the mixin of huggingface_hub: a folder or repository a model.

A folder holds `model.safetensors` (weights and configuration, what `medformer.save` writes), `config.json` (the
configuration alone, for whoever searches the hub) and `README.md` (the card). Only `from_pretrained` of a repository
and `push_to_hub` use the network.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from medformer.card import card_of
from medformer.checkpoint import load, save
from medformer.models import Model, as_saved

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]

_FILE = "model.safetensors"


def save_pretrained(model: Model, folder: str | os.PathLike[str]) -> Path:
    """Write a folder that the hub takes and `from_pretrained` reads; a `README.md` that is there stays.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed; pip install 'medformer[hub]'.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    _mixin()(model).save_pretrained(folder)
    return Path(folder)


def from_pretrained(
    name: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None, local_files_only: bool = False,
) -> Model:  # fmt: skip
    """The model of a folder, or of the repository `owner/name`.

    Args:
        name: folder that exists, or repository.
        revision: branch, tag or commit.
        token: of the hub, for private repositories.
        cache_dir: where downloads are kept.
        local_files_only: never use the network.

    Raises:
        FileNotFoundError: a folder without `model.safetensors`.
        ValueError: as `medformer.load`.
        ModuleNotFoundError: huggingface_hub is not installed; pip install 'medformer[hub]'.
    """
    options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    return _mixin().from_pretrained(os.fspath(name), **options).model


def push_to_hub(
    model: Model, name: str, *, private: bool | None = None, token: str | bool | None = None, message: str = "Weights",
    branch: str | None = None,
) -> str:  # fmt: skip
    """Upload a model to the repository `owner/name`, which is made if it is not there; its address.

    Args:
        model: to upload, with its card.
        name: repository.
        private: of a repository that is made; None: as the account has it.
        token: of the hub; None: that of `hf auth login`.
        message: of the commit.
        branch: to push to; None: main.
    """
    model = getattr(model, "_orig_mod", model)
    return str(_mixin()(model).push_to_hub(name, private=private, token=token, commit_message=message, branch=branch))


def _mixin() -> Any:
    try:
        from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("medformer: the hub needs huggingface_hub; pip install 'medformer[hub]'") from error

    class Shared(ModelHubMixin, library_name="medformer", tags=["medical-imaging"]):
        def __init__(self, model: Model) -> None:
            self.model = model

        def _save_pretrained(self, save_directory: Path) -> None:
            save(self.model, save_directory / _FILE, card=False)
            about = {"medformer_model": type(self.model).__name__, **as_saved(self.model.config)}
            (save_directory / "config.json").write_text(json.dumps(about, indent=2))

        def generate_model_card(self, *args: Any, **options: Any) -> Any:
            return ModelCard(card_of(self.model, _FILE))

        @classmethod
        def _from_pretrained(cls, *, model_id: str, local_files_only: bool, token: Any, **options: Any) -> Any:
            folder = Path(model_id)
            if folder.is_dir():
                return cls(load(folder / _FILE))
            known = {name: options[name] for name in ("revision", "cache_dir", "force_download") if name in options}
            return cls(load(hf_hub_download(model_id, _FILE, token=token, local_files_only=local_files_only, **known)))

    return Shared
