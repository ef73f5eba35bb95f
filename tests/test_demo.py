"""The page of `medformer export --format web`: the same answers in a browser, offline, as in Python."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medformer.answers.model import Finetuned, save_finetuned
from medformer.answers.predict import predict
from medformer.commands import main
from medformer.data import make_phantom, read_volume
from medformer.data.cases import read_one
from medformer.errors import UserError
from medformer.page import demo
from tests.pages import a_finetuned, launched

WAIT = 60_000  # ms


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra export")
    try:
        return demo._packed(tmp_path_factory.mktemp("npm"))
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from launched()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CT on turned axes, an oblique MR-like scan, pictures in grey and colour, and what is none of these."""
    root = tmp_path_factory.mktemp("files")
    scan = make_phantom(3, shape=(20, 30, 26), spacing_mm=(4.0, 3.0, 3.5))
    turned = scan.voxels[::-1].transpose(1, 0, 2)  # (y, z, x): the file's axes run right, down, front
    columns = scan.affine[:3, :3].T
    affine = np.eye(4)
    affine[:3, :3] = np.stack([columns[0], -columns[2], columns[1]], 1)
    affine[:3, 3] = scan.affine[:3, 3] + columns[2] * (len(scan.voxels) - 1)
    nib.save(nib.Nifti1Image(np.ascontiguousarray(turned.T), affine), root / "ct.nii.gz")
    rng, tilt = np.random.default_rng(0), 0.3
    smooth = rng.gamma(2, 60, (18, 22, 25)).astype(np.float32)
    oblique = np.array([[2 * np.cos(tilt), -2 * np.sin(tilt), 0, -9], [2 * np.sin(tilt), 2 * np.cos(tilt), 0, 4],
                        [0, 0, -2.5, 30], [0, 0, 0, 1]])  # fmt: skip
    image = nib.Nifti1Image(smooth.T, oblique)
    image.set_qform(oblique, 1)
    image.set_sform(None, 0)
    nib.save(image, root / "mr.nii")
    Image.fromarray(rng.integers(0, 255, (40, 52)).astype(np.uint8)).save(root / "grey.png")
    Image.fromarray(rng.integers(0, 255, (33, 20, 3)).astype(np.uint8)).save(root / "colour.png")
    (root / "bad.nii").write_bytes(b"no scan" * 100)
    return root


def asked(browser: Any, model: Finetuned, names: list[Path], folder: Path, runtime: Path) -> Any:
    """The page of a model, offline, with files dropped on it and all answered; fails for any request but its own."""
    save_finetuned(model, folder / "model.safetensors")
    flags = ["--format", "web", "--out", str(folder / "web"), "--runtime", str(runtime)]
    assert main(["export", str(folder / "model.safetensors"), *flags]) == 0
    opened = browser.new_context(offline=True, viewport={"width": 1400, "height": 900}).new_page()
    troubles: list[str] = []
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    mine = ("file:", "data:", "blob:")
    opened.on("request", lambda request: None if request.url.startswith(mine) else troubles.append(request.url))
    opened.goto((folder / "web" / "index.html").as_uri())
    opened.set_input_files("#file", names)
    opened.locator("#count", has_text=f"of {len(names)} scans answered").wait_for(timeout=WAIT)
    for _ in range(200):
        if opened.evaluate("rows.every((row) => !row.waits)"):
            break
        opened.wait_for_timeout(WAIT // 200)
    assert troubles == []
    return opened


def test_a_classifier_of_pictures_says_the_same(browser: Any, files: Path, tmp_path: Path, runtime: Path) -> None:
    model = a_finetuned("classes", ("a", "b"), dims=2)
    names = [files / "grey.png", files / "colour.png", files / "mr.nii"]
    page = asked(browser, model, names, tmp_path, runtime)
    rows = page.evaluate("rows.map((row) => [row.name, data.scans[row.scan]?.answer.classes, row.problem])")
    for path, (name, classes, _) in zip(names[:2], rows, strict=False):
        said = predict(model, read_one(path, 2)).probabilities
        assert said is not None
        assert name == path.name
        assert {n: share for n, share, _ in classes} == pytest.approx(
            dict(zip("ab", said.tolist(), strict=True)), abs=2e-4
        )
    assert rows[2][2] == "mr.nii: the network takes pictures, .png or .jpg"
    assert "0.5 [0.4, 0.6]" in page.text_content("#answers")
    assert page.locator("#asks").is_hidden()


def test_a_number_of_scans_is_the_same(browser: Any, files: Path, tmp_path: Path, runtime: Path) -> None:
    model = a_finetuned("regression", ("age",))
    names = [files / "ct.nii.gz", files / "mr.nii", files / "bad.nii"]
    page = asked(browser, model, names, tmp_path, runtime)
    found = page.evaluate("rows.map((row) => data.scans[row.scan]?.answer.value ?? row.problem)")
    for path, value in zip(names[:2], found, strict=False):
        assert value == pytest.approx(predict(model, read_volume(path, canonical=False)).value, abs=2e-3)
    assert "bad.nii: no NIfTI-1 file" in found[2]


def test_a_mask_is_the_same_and_is_saved_on_the_files_own_grid(
    browser: Any, files: Path, tmp_path: Path, runtime: Path
) -> None:
    model = a_finetuned("segmentation", ("one", "two"))
    model.about = replace(model.about, spacing_mm=((1.0, 1.0, 1.0),) * 3)
    names = [files / "ct.nii.gz", files / "mr.nii"]
    page = asked(browser, model, names, tmp_path, runtime)
    for number, path in enumerate(names):
        volume = read_volume(path, canonical=False)
        said = predict(model, volume)
        assert said.labels is not None
        page.locator("#rows button").nth(number).click()
        page.locator("#name", has_text=path.name).wait_for()
        answer = page.evaluate("data.scans[state.scan].answer")
        ml = [part["ml"] for part in answer["structures"]]
        assert ml == pytest.approx(list((said.volumes_ml or {}).values()), rel=5e-3)
        assert answer["warnings"] == list(said.warnings)
        with page.expect_download() as waiting:
            page.locator("button", has_text="save the mask").click()
        saved = tmp_path / f"{number}.nii"
        saved.write_bytes(Path(waiting.value.path()).read_bytes())
        made: Any = nib.load(saved)
        np.testing.assert_allclose(made.affine, volume.affine, atol=1e-5)
        assert (said.labels == np.asarray(made.dataobj).T).mean() > 0.999
        assert len(np.unique(said.labels)) > 1


def test_the_policy_forbids_every_request(files: Path, tmp_path: Path, runtime: Path) -> None:
    model = a_finetuned("classes", ("</script>", "b"), dims=2)
    page = demo.write_demo(model, tmp_path / "run" / "model.safetensors", tmp_path / "web", runtime=runtime).read_text()
    policy = page.split('http-equiv="Content-Security-Policy"')[1].split('">')[0]
    for rule in ("default-src 'none'", "connect-src 'none'", "form-action 'none'", "script-src 'sha256-"):
        assert rule in policy
    assert "unsafe-eval'" not in policy.replace("wasm-unsafe-eval'", "")
    assert "script-src 'unsafe-inline'" not in policy
    assert {p.name for p in (tmp_path / "web").iterdir()} == {
        "index.html", "model.onnx", "onnxruntime-LICENSE", "onnxruntime-ThirdPartyNotices.txt"
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["missing", "no archive", "another package", "no npm", "npm fails"])
def test_a_runtime_that_cannot_be_had_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    save_finetuned(a_finetuned("classes", ("a", "b"), dims=2), tmp_path / "model.safetensors")
    given = tmp_path / "package.tgz"
    words = {"missing": "no such file", "no archive": "no package", "another package": "no package",
             "no npm": "is not installed", "npm fails": "failed (no network)"}[kind]  # fmt: skip
    if kind == "no archive":
        given.write_bytes(b"x" * 600)
    if kind == "another package":
        with tarfile.open(given, "w:gz") as archive:
            archive.add(tmp_path / "model.safetensors", "package/index.js")
    monkeypatch.setattr(demo.shutil, "which", lambda _: None if kind == "no npm" else "npm")
    failed = subprocess.CompletedProcess([], 1, "", "no\nnetwork")
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: failed)
    flags = [] if "npm" in kind else ["--runtime", str(given)]
    code = main(
        ["export", str(tmp_path / "model.safetensors"), "--format", "web", "--out", str(tmp_path / "w"), *flags]
    )
    said = capsys.readouterr().err.strip()
    assert code in (1, 2)
    assert len(said.splitlines()) == 1
    assert words in said
    assert demo.RUNTIME in said or kind == "missing"
    assert not list((tmp_path / "w").iterdir())


def test_only_what_the_page_can_ask_is_exported(tmp_path: Path) -> None:
    model = a_finetuned("classes", ("a", "b"), dims=2)
    model.about = replace(model.about, channels=("t1", "t2"))
    with pytest.raises(UserError, match="takes 2 channels a case; the web page asks models of one"):
        demo.write_demo(model, tmp_path / "model.safetensors", tmp_path / "web")
    assert not (tmp_path / "web").exists()
