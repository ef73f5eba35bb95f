"""What configurations check when they are made: messages name the configuration, the field, its value and the rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

__all__ = ["check", "check_choice", "check_number", "check_switches", "check_whole", "is_whole"]


def check(config: Any, holds: bool, message: str) -> None:
    """ValueError with the name of `config` in front of `message`, unless it `holds`."""
    if not holds:
        raise ValueError(f"{type(config).__name__}: {message}")


def is_whole(value: object, least: int) -> bool:
    """A whole number of at least `least`; True and 2.0 are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_whole(config: Any, least: int, *names: str) -> None:
    """The fields hold whole numbers of at least `least`."""
    for name in names:
        value = getattr(config, name)
        check(config, is_whole(value, least), f"{name}={value!r} must be a whole number of at least {least}")


def check_number(config: Any, name: str, rule: str, holds: Callable[[float], bool]) -> None:
    """The field holds a finite number for which `rule`, in words, `holds`."""
    value = getattr(config, name)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    check(config, number and holds(value), f"{name}={value!r} must {rule}")


def check_choice(config: Any, name: str, choices: tuple[Any, ...]) -> None:
    """The field holds one of `choices`, of the same type: 2.0 is not 2."""
    value = getattr(config, name)
    known = any(type(value) is type(choice) and value == choice for choice in choices)
    check(config, known, f"{name}={value!r} must be one of {', '.join(map(str, choices))}")


def check_switches(config: Any, *names: str) -> None:
    """The fields hold True or False."""
    for name in names:
        value = getattr(config, name)
        check(config, isinstance(value, bool), f"{name}={value!r} must be True or False")
