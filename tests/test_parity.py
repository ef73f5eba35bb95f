"""Training does what it did: the losses of 100 steps are those that `tests/parity/` holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import parity


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    parity.make_scans(folder)
    return folder


@pytest.mark.parametrize("variant", parity.VARIANTS)
@pytest.mark.parametrize("method", parity.METHODS)
def test_losses_are_those_that_were_written(lives: Any, scans: Path, tmp_path: Path, method: str, variant: str) -> None:
    """Bit for bit on the machine that wrote them, else to 1e-4; `python tests/parity.py --write` makes them anew."""
    written = json.loads((parity.FILES / f"{method}.json").read_text())
    found = parity.losses(lives, method, variant, scans, tmp_path / "run")
    same_machine = written["machine"] == parity.machine()
    assert parity.furthest(found, written["losses"][variant]) <= (0.0 if same_machine else 1e-4)


@pytest.mark.parametrize("method", parity.METHODS)
def test_what_was_written_learns_and_the_variants_agree(method: str) -> None:
    losses = json.loads((parity.FILES / f"{method}.json").read_text())["losses"]
    assert set(losses) == set(parity.VARIANTS)
    whole = losses["one process"]
    assert len(whole) == parity.STEPS
    assert max(whole) > 1.1 * min(whole)
    assert losses["resumed at 50"] == whole
    assert all(parity.furthest(other, whole) < 1e-4 for other in losses.values())
