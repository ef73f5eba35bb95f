"""The documents: their Python runs, the commands they name exist with these flags, and their links lead somewhere."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import re
import runpy
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

import settings
from medformer.commands import ABOUT

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "ssl/README.md", *ROOT.glob(".github/*.md"), *ROOT.glob("misc/**/*.md")])
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What stands for a value in a command, and a value that parses.
STAND_INS = {"METHOD": "dino", "SIZE": "mini", "STEPS": "10", "N": "1", "R": "1", "S": "0", "FAMILY": "tnt", "...": ""}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """Line number and text of the fenced blocks in one of these languages; "" is none."""
    text = page.read_text()
    found = [match for match in FENCE.finditer(text) if match[1] in languages]
    return [(text.count("\n", 0, match.start(2)) + 1, match[2]) for match in found]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page in order, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": page.stem}
    for line, text in blocks(page, "python"):
        code = compile("\n" * (line - 1) + text, str(page), "exec")  # tracebacks show the page's own lines
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="swap_attention")
            try:
                exec(code, names)
            except Exception:
                pytest.fail(f"{name_of(page)}, block at line {line}:\n{traceback.format_exc()}")


def test_every_fenced_block_has_a_language_that_is_checked() -> None:
    """Otherwise ```py or ```python3 would never run."""
    known = {"", "bash", "python", "text", "toml", "yaml", "json"}
    assert [
        (name_of(page), m[1]) for page in PAGES for m in FENCE.finditer(page.read_text()) if m[1] not in known
    ] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == ROOT / "misc/docs"], ids=name_of)
def test_a_document_starts_with_something_to_run(page: Path) -> None:
    title, _, start = page.read_text().partition("\n")
    assert title.startswith("# ")
    assert re.match(r"```(python|bash)?\n", start.lstrip()), start[:200]


def statements(script: str) -> Iterator[list[str]]:
    """Words of each command of a shell script; a string of several lines is a script too."""
    pending = ""
    for line in script.replace("\\\n", " ").splitlines():
        pending += line + "\n"
        reader = shlex.shlex(re.sub(r"\$[\w@]+|\$\{\w+\}", "VALUE", pending), posix=True, punctuation_chars=True)
        reader.whitespace_split = True
        try:
            words = [*reader]
        except ValueError:  # a quote that a later line closes
            continue
        pending = ""
        for word in words:
            if "\n" in word:
                yield from statements(word)
        for is_operator, group in itertools.groupby(words, lambda word: not word.strip("();<>|&")):
            if not is_operator:
                yield [*itertools.dropwhile(re.compile(r"[A-Z_]+=").match, group)]  # environment variables
    assert not pending, f"a quote is not closed: {pending}"


def commands(page: Path) -> Iterator[list[str]]:
    """Words of every command in the shell blocks and in `backticks`, placeholders filled in."""
    scripts = [block for _, block in blocks(page, "", "bash")]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", page.read_text()))]
    scripts += [span for span in spans if re.match(r"([A-Z_]+=\S+ )*(medformer|python|torchrun|pytest|\.ci/)", span)]
    for script in scripts:
        for words in statements(script):
            if len(words) > 1 or (words and words[0].startswith(".ci/")):
                yield [word for w in words if (word := STAND_INS.get(w, w))]


def program(words: list[str]) -> tuple[list[str], list[str]] | None:
    """File or module to ask (and its subcommand), and the arguments; None for a command that is not ours."""
    if words[0] == "medformer" and re.fullmatch(r"[a-z]+", words[1]):
        assert words[1] in ABOUT, f"medformer {words[1]} does not exist"
        return words[:2], words[2:]
    if words[0] == "torchrun":
        own = next(i for i, word in enumerate(words) if word in ("ssl/train.py", "pretrain", "finetune"))
        return ["medformer", "finetune" if words[own] == "finetune" else "pretrain"], words[own + 1 :]
    if words[0] == "exec":
        words = words[1:]
    if words[0].startswith(".ci/"):
        return [words[0]], []
    if words[:2] == ["python", "-m"] and words[2].startswith("medformer"):
        return words[2:4], words[4:]
    if words[0] == "python" and words[1] != "-m":
        return [words[1]], words[2:]
    return None


@functools.cache
def flags_of(*ask: str) -> frozenset[str]:
    """The flags that a program's `--help` lists, of all of them where it has `--help-all`."""
    for flag in ("--help-all", "--help"):
        shown = io.StringIO()
        with (
            contextlib.redirect_stdout(shown),
            contextlib.redirect_stderr(io.StringIO()),
            mock.patch.object(sys, "argv", [*ask, flag]),
            mock.patch.dict(os.environ, {"COLUMNS": "1000"}),
        ):
            try:
                run = runpy.run_path if ask[0].endswith(".py") else runpy.run_module
                run(str(ROOT / ask[0]) if ask[0].endswith(".py") else ask[0], run_name="__main__")
            except SystemExit as ended:
                if not ended.code:
                    return frozenset(re.findall(r"(?<![\w-])--?[a-zA-Z][\w.-]*", shown.getvalue()))
    pytest.fail(f"{' '.join(ask)} --help fails")


def wrong_with(words: list[str]) -> str | None:
    """What the program named in a command would say about its arguments before it starts to work."""
    found = program(words)
    if found is None:
        files = [word for word in words[1:] if words[0] == "pytest" and word.endswith(".py")]
        return next((f"no file {file}" for file in files if not (ROOT / file).is_file()), None)
    ask, arguments = found
    if "/" in ask[0] and not (ROOT / ask[0]).is_file():
        return f"no file {ask[0]}"
    if ask in (["ssl/train.py"], ["medformer", "pretrain"]):
        if "--help" in arguments:
            return None
        try:
            settings.parse([word for word in arguments if word not in ("PLAIN", "VIEWS", "[dino|byol|igpt]", "VALUE")])
        except Exception as error:
            return str(error)
        return None
    flags = [word.split("=")[0] for word in arguments if re.match(r"--?[a-zA-Z]", word)]
    if not flags:
        return None
    unknown = sorted({*flags} - flags_of(*ask))
    return f"no flag {', '.join(unknown)}" if unknown else None


# The log names the commands of its day.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "LOG.md"], ids=name_of)
def test_commands_of_a_page_exist_with_their_flags(page: Path) -> None:
    problems = {" ".join(words): wrong for words in commands(page) if (wrong := wrong_with(words))}
    assert problems == {}


def anchors(page: Path) -> set[str]:
    """Those that GitHub makes of headings."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_to_files_and_headings(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    dead = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        if "://" not in link and (not target.exists() or (anchor and anchor not in anchors(target))):
            dead.append(link)
    assert dead == []
