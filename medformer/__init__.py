"""Backbones for 3D and 2D medical images. See README.md.

The names are those of api.py. They are loaded when the first of them is used, for they bring PyTorch along (2 s of
processor time and 0.6 GiB), which processes that only read headers and commands that only look at files do not need.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medformer.api import *  # noqa: F403

# Functions in a module of their own name: `medformer.embed` is the function.
_NAMESAKES = {"describe", "embed", "export", "footprint"}
# Of rooms that use these names themselves.
_ELSEWHERE = {"finetune": "medformer.answers.finetune", "predict": "medformer.answers.predict"}


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name in _ELSEWHERE:
            return getattr(importlib.import_module(_ELSEWHERE[name]), name)
        api = importlib.import_module("medformer.api")
        if name != "__all__" and name not in api.__all__:
            try:
                return importlib.import_module(f"{self.__name__}.{name}")  # its modules, as after any import of theirs
            except ModuleNotFoundError as error:
                if error.name != f"{self.__name__}.{name}":
                    raise
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(api, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _NAMESAKES and isinstance(value, ModuleType):  # what importing medformer/embed.py does
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__getattr__("__all__"), *_ELSEWHERE})


sys.modules[__name__].__class__ = _Package
