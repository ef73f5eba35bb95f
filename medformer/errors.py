"""What goes wrong in a command and how it is said: one line."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

__all__ = ["Parser", "UserError", "complain", "exit_code"]


class UserError(Exception):
    """Something that the user can put right: printed as one line, without a traceback. Code 2: usage, 1: data."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code


def complain(message: str) -> None:
    """One line on stderr."""
    print(f"error: {message}", file=sys.stderr, flush=True)


def exit_code(command: Callable[[], int], stopped: str = "") -> int:
    """What `command` returns; after a UserError, which is printed, its code; after Ctrl-C 130, saying `stopped`.

    Warnings are one line too, without the place in the code they come from.
    """
    usual, warnings.formatwarning = warnings.formatwarning, lambda message, *_, **__: f"warning: {message}\n"
    try:
        return command()
    except UserError as error:
        complain(str(error))
        return error.code
    except KeyboardInterrupt:
        if stopped:
            complain(stopped)
        return 130
    finally:
        warnings.formatwarning = usual


class Parser(argparse.ArgumentParser):
    """Raises UserError, and names the flag that lists the others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists all flags", 2)
