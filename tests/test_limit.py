"""A cache with a limit: the least recently used goes first, and nothing that a run uses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medformer.data.store.limit import Use, _entries
from medformer.data.store.pieces import Pieces, digest
from medformer.errors import UserError
from medformer.files import byte_count
from roots import DataConfig, Prepared, prepare
from views import ViewsConfig

VIEWS = ViewsConfig(global_size=(8, 8, 8), local_size=(4, 4, 4), local_views=1)


def scans(root: Path, *seeds: int) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in seeds:
        voxels = np.random.default_rng(i).normal(100, 30, (16, 14, 12)).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), root / f"scan{i}.nii")
    return root


def ready(root: Path, cache: Path, use: Use | None = None) -> Prepared:
    return prepare(DataConfig(root=str(root), held_out=0), VIEWS, cache, 0, use=use)


def age(cache: Path, prepared: Prepared, days: int) -> None:
    for scan in prepared.train:
        sidecar = cache / f"{Path(scan.path).name.split('.')[0]}.json"
        then = sidecar.stat().st_mtime - 86400 * days
        os.utime(sidecar, (then, then))


def there(prepared: Prepared) -> list[bool]:
    return [Path(scan.path).exists() for scan in prepared.train]


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    old, older = ready(scans(tmp_path / "a", 0, 1), cache), ready(scans(tmp_path / "b", 2, 3), cache)
    age(cache, old, 1)
    age(cache, older, 2)
    use = Use(cache)
    size, entries = use.size()
    use.close()
    assert entries == 4
    use = Use(cache, limit=size + 100)
    new = ready(scans(tmp_path / "c", 4), cache, use)
    assert (sorted(there(older)), there(old), there(new)) == ([False, True], [True, True], [True])
    assert use.size()[0] <= size + 100
    use.close()
    assert not [path for path in cache.rglob("*") if path.name.startswith(".gone")]
    assert list((cache / ".uses").iterdir()) == []
    again = ready(tmp_path / "b", cache)  # what went is made anew
    assert again.train == older.train


def test_pieces_of_remote_stores_go_before_entries(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    ours = ready(scans(tmp_path / "a", 0, 1), cache)
    use = Use(cache)
    entries = use.size()[0]
    pieces = Pieces(cache, lambda: 10**6)
    for i in range(64):
        data = np.random.default_rng(i).bytes(500)
        pieces.put(digest(data), data)
    assert use.size() == (entries + 32_000, 2)
    use.close()
    use = Use(cache, limit=2 * entries)
    ready(scans(tmp_path / "b", 2), cache, use)
    assert there(ours) == [True, True]
    assert entries < use.size()[0] <= 2 * entries
    use.close()


def test_looking_an_entry_up_counts_as_use(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    a, b = ready(scans(tmp_path / "a", 0), cache), ready(scans(tmp_path / "b", 1), cache)
    age(cache, a, 2)
    age(cache, b, 1)
    use = Use(cache)
    ready(tmp_path / "a", cache, use)
    use.close()
    use = Use(cache, limit=int(1.1 * Use(cache).size()[0]))
    ready(scans(tmp_path / "c", 2), cache, use)
    assert (there(a), there(b)) == ([True], [False])


def test_a_run_that_needs_more_than_the_limit_is_told(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    use = Use(cache, limit=10_000)
    with pytest.raises(UserError, match=r"--data.cache_limit 10 kB: what runs use of .* raise the limit"):
        ready(scans(tmp_path / "a", *range(4)), cache, use)
    use.close()


OTHER = """
import sys, time
from pathlib import Path
from medformer.data.store.limit import Use
use = Use(Path(sys.argv[1]))
for name in sys.argv[2:]:
    use.note(name)
print("noted", flush=True)
time.sleep(60)
"""


def test_what_another_process_uses_stays_until_it_is_gone(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    theirs = ready(scans(tmp_path / "a", 0, 1), cache)
    age(cache, theirs, 5)
    names = [Path(scan.path).name.split(".")[0] for scan in theirs.train]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", OTHER, str(cache), *names]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "noted\n"
        use = Use(cache)
        limit = int(1.2 * use.size()[0])
        use.close()
        use = Use(cache, limit=limit)
        with pytest.raises(UserError, match="what runs use of"):
            ready(scans(tmp_path / "b", 2), cache, use)
        assert there(theirs) == [True, True]
        other.kill()
    ready(tmp_path / "b", cache, use)  # its entry is there already
    use.added(next(iter((tmp_path / "b").iterdir())).stem)
    ready(scans(tmp_path / "c", 3), cache, use)
    assert sorted(there(theirs)) == [False, False]
    use.close()


def test_an_entry_noted_while_it_is_being_removed_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    found = ready(scans(tmp_path / "a", 0), cache)
    name = Path(found.train[0].path).name.split(".")[0]
    mine, other = Use(cache, limit=1), Use(cache)
    (entry,) = _entries(cache)
    real = Use._taken
    monkeypatch.setattr(Use, "_taken", lambda self: (other.note(name), real(self))[1])
    assert not mine._remove(entry)
    assert ready(tmp_path / "a", cache).train == found.train
    assert there(found) == [True]


@pytest.mark.parametrize("limit", ["1 GB", "200GiB", "2.5 tb", "1000000"])
def test_limits_as_people_write_them(limit: str) -> None:
    assert DataConfig(cache_limit=limit).cache_limit == limit
    assert byte_count(limit) >= 1_000_000


@pytest.mark.parametrize("limit", ["a lot", "-1 GB", "1 GBit", ""])
def test_no_size_is_no_limit(limit: str) -> None:
    with pytest.raises(ValueError, match=r"--data.cache_limit .* must be bytes, or text such as"):
        DataConfig(cache_limit=limit)


def test_the_trainer_says_what_is_stored(trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer(tmp_path / "run", "--steps=1", "--data.cache_limit=1 GB") == 0
    said = capsys.readouterr().out
    assert "for these 4 in" in said
    assert "of 1 GB for all 4 entries there" in said
