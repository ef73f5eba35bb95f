"""`--help` for a command of many flags: those that people set, by topic; `--help-all` shows the rest."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Mapping

__all__ = ["ALL", "short_help"]

ALL = "--help-all"
_WIDE, _COLUMN = 100, 31


def short_help(parser: argparse.ArgumentParser, topics: Mapping[str, Mapping[str, str]]) -> str:
    """A page of the flags in `topics`: {heading: {flag without its dashes: what stands for its value}}.

    The text of a flag is the first sentence of its help, then its default.
    """
    actions = {action.dest: action for action in parser._actions}
    lines = [f"usage: {parser.usage}", "", *textwrap.wrap(parser.description or "", _WIDE)]
    for heading, flags in topics.items():
        lines += ["", f"{heading}:"]
        for name, value in flags.items():
            action = actions[name]
            shown = f"--{name} {value}".rstrip() if action.option_strings else value
            about = re.split(r"(?<=\.)\s", " ".join((action.help or "").split()), maxsplit=1)[0]
            default = parser.get_default(name)
            about += "" if default in (None, argparse.SUPPRESS, []) or default is False else f" [{_text(default)}]"
            if len(shown) > _COLUMN - 4:
                lines.append(f"  {shown}")
                shown = ""
            first = f"  {shown:<{_COLUMN - 2}}"
            lines += textwrap.wrap(about, _WIDE, initial_indent=first, subsequent_indent=" " * _COLUMN)
    count = sum(bool(action.option_strings) for action in actions.values())
    return "\n".join([*lines, "", *textwrap.wrap(f"{ALL} explains all {count} flags. {parser.epilog or ''}", _WIDE)])


def _text(default: object) -> str:
    whole = isinstance(default, list | tuple) and all(isinstance(part, int) for part in default)
    return ("x" if whole else ",").join(map(str, default)) if isinstance(default, list | tuple) else str(default)
