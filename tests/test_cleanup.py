"""misc/dataset_folder_cleanup.py: it plans first, overwrites nothing, survives any kill and can be undone."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from medformer.data.datasets import siim_covid19
from medformer.data.datasets.joins import DataSetWarning
from tests.dataset_downloads import siim_kaggle
from tests.test_data_planar import write_image

SCRIPT = Path(__file__).parents[1] / "misc" / "dataset_folder_cleanup.py"
IMAGES = {"train/s1/a/i1.dcm": b"one", "train/s2/b/i2.dcm": b"two" * 400, "test/s3/c/i3.dcm": b"three"}
MODES = ["hard", "sym", "copy", "move"]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dataset_folder_cleanup", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cleanup = load()


def make(root: Path, images: dict[str, bytes] = IMAGES) -> Path:
    for name, data in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make(tmp_path / "siim")


def files(folder: Path) -> dict[str, bytes]:
    """Content of every image below, without the tool's own papers."""
    own = {cleanup.JOURNAL, cleanup.INDEX}
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in own
    }


def flat(images: dict[str, bytes] = IMAGES) -> dict[str, bytes]:
    return {f"{n.split('/')[0]}/{n.split('/')[-1]}": d for n, d in images.items()}


def out_of(root: Path, mode: str) -> Path:
    return root if mode == "move" else root.with_name("siim-flat")


def run(root: Path, mode: str, *more: str) -> int:
    return cleanup.main([str(root), "--mode", mode, "--apply", *more])


class TestPlan:
    def test_nothing_happens_without_apply(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for mode in MODES:
            assert cleanup.main([str(root), "--mode", mode]) == 0
        assert sorted(p.name for p in root.parent.iterdir()) == ["siim"]
        assert files(root) == IMAGES
        assert "3 images to place" in capsys.readouterr().out

    def test_another_data_set_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        make(tmp_path / "other", {"train/patient/study/series/i.dcm": b"x", "train/a/b.jpg": b"x"})
        assert run(tmp_path / "other", "hard") == 2
        assert "this is not the SIIM data set" in capsys.readouterr().err
        assert run(tmp_path, "hard") == 2
        assert capsys.readouterr().err.count("\n") == 1

    def test_root_is_argument_then_new_then_old_variable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in "abc":
            make(tmp_path / name / "siim_covid19")
        monkeypatch.setenv("MEDFORMER_DATA", str(tmp_path / "b"))
        monkeypatch.setenv("TENSOR_RELOADED_DATADIR", str(tmp_path / "c"))
        assert cleanup.find_root(str(tmp_path / "a")).parent.name == "a"
        assert cleanup.find_root(None).parent.name == "b"
        monkeypatch.delenv("MEDFORMER_DATA")
        assert cleanup.find_root(None).parent.name == "c"
        monkeypatch.delenv("TENSOR_RELOADED_DATADIR")
        with pytest.raises(cleanup.Refused, match="MEDFORMER_DATA is not set; TENSOR_RELOADED_DATADIR is not set"):
            cleanup.find_root(None)

    def test_it_runs_with_python_alone(self, root: Path) -> None:
        done = subprocess.run([sys.executable, "-I", "-S", str(SCRIPT), str(root)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


class TestApply:
    @pytest.mark.parametrize("mode", MODES)
    def test_trees_become_flat_and_a_second_run_does_nothing(
        self, root: Path, mode: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(root, mode) == 0
        assert files(out_of(root, mode)) == flat()
        if mode == "move":
            assert not any(p.is_dir() for part in ("train", "test") for p in (root / part).iterdir())
        else:
            assert files(root) == IMAGES
        journal = (out_of(root, mode) / cleanup.JOURNAL).read_bytes()
        capsys.readouterr()
        assert run(root, mode) == 0
        assert "0 images placed" in (out := capsys.readouterr().out) or "nothing to do" in out
        assert (out_of(root, mode) / cleanup.JOURNAL).read_bytes() == journal

    @pytest.mark.parametrize("mode", MODES)
    def test_label_tables_go_along_and_come_back(
        self, root: Path, mode: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tables = {"train_image_level.csv": b"id,boxes\n", "sample_submission.csv": b"id\n"}
        make(root, tables)
        assert run(root, mode, "--out", str(root.with_name("siim-flat"))) == 0
        out = capsys.readouterr().out
        assert "2 label tables go along; train_study_level.csv not next to train/" in out
        assert "3 images placed, 2 label tables" in out
        assert files(root.with_name("siim-flat")) == flat() | tables
        assert cleanup.main(["undo", str(root.with_name("siim-flat") / cleanup.JOURNAL)]) == 0
        assert files(root) == IMAGES | tables
        assert files(root.with_name("siim-flat")) == {}

    @pytest.mark.parametrize("policy", ["hash-suffix", "study-prefix"])
    def test_the_adapter_reads_what_was_made_as_it_read_the_source(self, tmp_path: Path, policy: str) -> None:
        root = siim_kaggle(tmp_path) / "siim-covid19-detection"
        twin = root / "train" / "000c9c05fd14" / "e555410bd2cd" / "65761e66de9f.dcm"  # one name in two studies
        twin.parent.mkdir(parents=True)
        write_image(twin, np.arange(30, dtype=np.uint16).reshape(6, 5)[::-1])
        assert run(root, "copy", "--on-collision", policy, "--out", str(tmp_path / "elsewhere")) == 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataSetWarning)
            before, after = (siim_covid19.scan(folder) for folder in (root, tmp_path / "elsewhere"))
        facts = [sorted((r.study, r.split, str(r.labels), str(r.boxes)) for r in found) for found in (before, after)]
        assert facts[0] == facts[1]
        assert len(before) == 3

    @pytest.mark.parametrize("mode", MODES)
    def test_the_index_keeps_what_flat_folders_lose(self, root: Path, mode: str) -> None:
        run(root, mode)
        with open(out_of(root, mode) / cleanup.INDEX, newline="") as file:
            rows = list(csv.DictReader(file))
        assert {(r["part"], r["image"]): (r["study"], r["series"]) for r in rows} == {
            ("train", "i1.dcm"): ("s1", "a"),
            ("train", "i2.dcm"): ("s2", "b"),
            ("test", "i3.dcm"): ("s3", "c"),
        }

    @pytest.mark.parametrize("mode", MODES)
    def test_undo_restores_every_file_and_folder(self, root: Path, mode: str) -> None:
        run(root, mode)
        out = out_of(root, mode)
        assert cleanup.main(["undo", str(out / cleanup.JOURNAL)]) == 0
        assert files(root) == IMAGES
        assert [p.name for p in out.iterdir() if p.is_file()] == [cleanup.JOURNAL]
        assert run(root, mode) == 0  # and again
        assert files(out) == flat()

    @pytest.mark.parametrize("mode", MODES)
    def test_nothing_is_overwritten(self, root: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
        out = out_of(root, mode)
        (out / "train").mkdir(parents=True, exist_ok=True)
        (out / "train" / "i2.dcm").write_bytes(b"somebody else's")
        before = files(root)
        assert run(root, mode) == 1
        assert "exist already, the first train/i2.dcm; nothing was done" in capsys.readouterr().err
        assert (out / "train" / "i2.dcm").read_bytes() == b"somebody else's"
        assert files(root) == before

    def test_equal_content_already_there_is_skipped(self, root: Path) -> None:
        out = out_of(root, "copy")
        make(out, {"train/i1.dcm": b"one"})
        assert run(root, "copy") == 0
        assert files(out) == flat()

    def test_links_and_strange_files_are_left_alone(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (root / "train" / "s1" / "a" / "link.dcm").symlink_to("/etc/passwd")
        (root / "train" / "outside").symlink_to("/etc")
        (root / "train" / "s1" / "notes.txt").write_text("mine")
        assert run(root, "move") == 0
        assert (root / "train" / "s1" / "notes.txt").read_text() == "mine"
        assert (root / "train" / "s1" / "a" / "link.dcm").is_symlink()
        assert "3 files left alone" in capsys.readouterr().out

    def test_undo_leaves_what_was_changed_since(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run(root, "copy")
        (out_of(root, "copy") / "train" / "i1.dcm").write_bytes(b"edited")
        assert cleanup.main(["undo", str(out_of(root, "copy") / cleanup.JOURNAL)]) == 1
        assert "2 taken back; 1 are not what they were and stay" in capsys.readouterr().err
        assert (out_of(root, "copy") / "train" / "i1.dcm").read_bytes() == b"edited"

    def test_another_disk_means_copy_check_and_only_then_delete(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.link

        def link(src: Path, dst: Path, **options: bool) -> None:
            if ".partial" not in str(src):
                raise OSError(18, "cross-device")
            real(src, dst, **options)

        monkeypatch.setattr(os, "link", link)
        assert run(root, "move") == 0
        assert files(root) == flat()

    def test_a_file_system_without_links_can_still_copy(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def link(*_: object, **__: object) -> None:
            raise OSError(1, "no links here")

        monkeypatch.setattr(os, "link", link)
        assert run(root, "hard") == 1
        assert run(root.rename(root.with_name("siim2")), "copy") == 0
        assert files(root.with_name("siim2-flat")) == flat()


class TestCollisions:
    TWICE = IMAGES | {"train/s9/z/I1.dcm": b"another"}

    def test_names_that_differ_in_case_alone_collide(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        root = make(tmp_path / "siim", self.TWICE)
        assert run(root, "hard") == 1
        assert "nothing was done: use --on-collision" in capsys.readouterr().err
        assert not out_of(root, "hard").exists()

    @pytest.mark.parametrize("policy", ["hash-suffix", "study-prefix"])
    def test_both_get_names_of_their_own_on_request(self, tmp_path: Path, policy: str) -> None:
        root = make(tmp_path / "siim", self.TWICE)
        assert run(root, "hard", "--on-collision", policy) == 0
        placed = files(out_of(root, "hard"))
        assert sorted(placed.values()) == sorted(self.TWICE.values())
        assert len({name.casefold() for name in placed}) == 4

    def test_equal_images_are_placed_once(self, tmp_path: Path) -> None:
        root = make(tmp_path / "siim", {"train/s1/a/i.dcm": b"same", "train/s2/a/i.dcm": b"same"})
        assert run(root, "copy", "--on-collision", "hash-suffix") == 0
        assert list(files(out_of(root, "copy")).values()) == [b"same"]

    def test_names_windows_cannot_hold_are_changed(self, tmp_path: Path) -> None:
        root = make(tmp_path / "siim", {"train/s1/a/nul.dcm": b"x"})
        assert run(root, "copy") == 0
        assert list(files(out_of(root, "copy"))) == ["train/_nul.dcm"]


CALLS = ("link", "unlink", "replace", "fsync", "symlink", "mkdir", "rmdir")


def killed(root: Path, mode: str, at: int, before: bool) -> bool:
    """Run in a process that dies, as by kill -9, right before or after its at-th change of the disk. False: none."""
    child = os.fork()
    if child == 0:
        count = 0

        def watch(real):  # type: ignore[no-untyped-def]
            def call(*args: object, **options: object) -> object:
                nonlocal count
                count += 1
                mine = count
                if mine == at and before:
                    os._exit(9)
                try:
                    return real(*args, **options)
                finally:
                    if mine == at:
                        os._exit(9)

            return call

        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        for name in CALLS:
            setattr(os, name, watch(getattr(os, name)))
        os._exit(run(root, mode))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in {0, 9}
    return os.waitstatus_to_exitcode(status) == 9


@pytest.mark.filterwarnings("ignore:This process")
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_kill_at_any_point_loses_nothing_and_can_go_on_or_back(tmp_path: Path, mode: str, before: bool) -> None:
    at = 0
    while True:
        at += 1
        forward, back = make(tmp_path / f"{at}f" / "siim"), make(tmp_path / f"{at}b" / "siim")
        if not killed(forward, mode, at, before):
            break
        contents = {*files(forward).values(), *files(out_of(forward, mode)).values()}
        assert contents >= set(IMAGES.values()), at  # nothing is lost at any moment
        assert run(forward, mode) == 0
        assert files(out_of(forward, mode)) == flat(), at
        assert killed(back, mode, at, before)
        journal = out_of(back, mode) / cleanup.JOURNAL
        if journal.exists() and b"plan" in journal.read_bytes():
            assert cleanup.main(["undo", str(journal)]) == 0
        assert files(back) == IMAGES, at
    assert at > 10


def test_a_torn_last_line_is_passed_over(root: Path) -> None:
    run(root, "copy")
    journal = out_of(root, "copy") / cleanup.JOURNAL
    journal.write_bytes(journal.read_bytes() + b'{"act": "begin", "src": "/tm')
    assert run(root, "copy") == 0
    assert run(root, "copy") == 0
    assert cleanup.main(["undo", str(journal)]) == 0
    assert files(root) == IMAGES
