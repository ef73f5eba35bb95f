"""The page: what is packed into it, what a browser draws from it, and the server that takes scans."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import medformer
from medformer.data import make_phantom, read_volume, write_dicom_series
from medformer.errors import UserError
from medformer.page import command, page, serve
from tests.pages import BALL, SHAPE, a_model, a_run, launched, unpacked


def test_the_page_holds_what_the_model_says(folder: Path) -> None:
    model = a_model()
    volume = read_volume(folder / "scan.nii.gz")
    scan = page.Viewer(model, folder / "backbone.safetensors").scan(volume, "scan")
    voxels = unpacked(scan["voxels"], "<i2").reshape(scan["shape"]) * scan["slope"] + scan["middle"]
    np.testing.assert_allclose(voxels, volume.voxels, atol=scan["slope"])
    with torch.no_grad():
        x = torch.from_numpy(medformer.data.normalise(volume))[None, None]
        features, rows = model.forward_features(x), model.attention_map(x)[0].flatten(1)
    assert tuple(scan["grid"]) == features.grid
    head = unpacked(scan["heads"][1]["values"], "u1") / 255
    low, high = (v / rows.shape[1] for v in scan["heads"][1]["range"])
    assert low == pytest.approx(float(rows[1].median()), abs=1e-3 * low)  # the half that takes least stays clear
    np.testing.assert_allclose(low + head * (high - low), rows[1].clamp(low, high), atol=(high - low) / 400)
    codes = unpacked(scan["tokens"], "i1").reshape(-1, scan["rank"]).astype(float)
    tokens = F.normalize(features.patches[0].double(), dim=1)
    assert np.abs(codes @ codes[7] * scan["scale"] - (tokens @ tokens[7]).numpy()).max() <= max(
        0.03, 1.5 * scan["error"]
    )
    assert scan["error"] < 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_run(tmp_path_factory.mktemp("page"))


LEVELS = [{"width": 12, "heads": 2, "depth": 1, "kernel": k, "stride": 2} for k in (4, 2)]
NETWORKS: dict[str, tuple[Any, str, list[int], int]] = {
    "resnet": (medformer.ResNetConfig(depth=10, base_width=32, output_stride=8), "3D ResNet-10, width 256", [8] * 3, 0),
    "tnt": (medformer.TNTConfig(levels=LEVELS), "3D TNT of width 12 in 12, 1 stages of 2 heads", [4] * 3, 3),
    "stem": (
        medformer.BackboneConfig(
            width=24, depth=1, heads=2, stem="resnet18", stem_stages=1, patch_size=1, patch_stride=1, patch_padding=0
        ),
        "3D, width 24, 1 blocks of 2 heads",
        [4] * 3,
        3,
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_network_has_a_page(folder: Path, tmp_path: Path, kind: str) -> None:
    config, name, stride, maps = NETWORKS[kind]
    torch.manual_seed(0)
    model = medformer.build(config).eval()
    scan = page.Viewer(model, folder / "backbone.safetensors").scan(read_volume(folder / "scan.nii.gz"), "scan")
    assert scan["stride"] == stride
    assert tuple(scan["grid"]) == model.grid_of(SHAPE)
    assert len(scan["heads"]) == maps
    # As the page finds the token under the ball.
    first = [(reach - 1) / 2 - padding for reach, padding in zip(scan["kernel"], scan["padding"], strict=True)]
    token = [round((v - f) / s) for v, f, s in zip(BALL, first, stride, strict=True)]
    middle = [t * s + f for t, s, f in zip(token, stride, first, strict=True)]
    assert all(abs(m - b) <= s / 2 for m, b, s in zip(middle, BALL, stride, strict=True))
    medformer.save(model, tmp_path / "backbone.safetensors")
    out = tmp_path / "page.html"
    arguments = [str(tmp_path), str(folder / "scan.nii.gz"), "--cases", str(folder / "cases"), "--out", str(out)]
    assert command.main(arguments) == 0
    assert name in out.read_text()


@pytest.mark.parametrize("rank_for", [1000, 24])
def test_compressed_tokens_keep_their_cosines(rank_for: int) -> None:
    torch.manual_seed(0)
    tokens = F.normalize(torch.randn(400, 8) @ torch.randn(8, 96) + 0.01 * torch.randn(400, 96), dim=1).double()
    codes, scale, error, share = page.compress(tokens, 400 * rank_for)
    kept = torch.from_numpy(codes).double() @ torch.from_numpy(codes).double().T * scale
    assert codes.shape[1] == min(rank_for, 64)
    assert (kept - tokens @ tokens.T).abs().max() < 0.06
    assert error <= (kept - tokens @ tokens.T).abs().max() + 1e-12
    assert 0.99 < share <= 1 + 1e-9


def test_a_scan_of_128_cubed_fits_in_20_mb(tmp_path: Path) -> None:
    """Noise, which packs worst; 32,768 tokens."""
    voxels = np.random.default_rng(0).normal(0, 300, (128, 128, 128)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "large.nii")
    viewer = page.Viewer(a_model(depth=1, num_features=64), tmp_path / "m.safetensors")
    size = page.write_page(viewer, [tmp_path / "large.nii"], tmp_path / "page.html")
    assert size == (tmp_path / "page.html").stat().st_size < 20e6
    assert "128, 128, 128" in (tmp_path / "page.html").read_text()


def test_larger_scans_are_averaged_by_whole_factors() -> None:
    voxels = np.arange(4 * 6 * 10, dtype=np.float32).reshape(4, 6, 10)
    small, factors = page.reduce(voxels, 60)
    assert np.prod(small.shape) <= 60
    assert small.shape == tuple(-(-n // f) for n, f in zip(voxels.shape, factors, strict=True))
    z, y, x = factors
    assert small[0, 0, 0] == pytest.approx(voxels[:z, :y, :x].mean())


def test_nothing_in_the_page_asks_the_network(folder: Path) -> None:
    viewer = page.Viewer(a_model(), folder / "backbone.safetensors")
    text = page.render(viewer, [viewer.scan(read_volume(folder / "scan.nii.gz"), "</script><b>{{data}}")])
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in text
    assert "connect-src 'none'" in text
    assert text.count("</script>") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{root}/none.safetensors", "x"], "none.safetensors is not a file"),
        (["{root}", "{root}/none.nii"], "none.nii: no such file or folder"),
        (["{root}"], "give at least one scan, or --serve"),
        (["{root}", "{root}/metrics.jsonl"], "metrics.jsonl"),
        (["{root}", "{root}/scan.nii.gz", "--probe", "{root}/backbone.safetensors"], "not a probe.safetensors"),
        (["{root}", "{root}/scan.nii.gz", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command.main([a.format(root=folder) for a in arguments] + ["--out", str(tmp_path / "p.html")]) in (1, 2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "p.html").exists()


# ---- the server ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[int, str]]:
    """Port and token of a server that takes up to 1 MB."""
    viewer = page.Viewer(a_model(), folder / "backbone.safetensors")
    running = serve.make_server(viewer, [], 0, limit=10**6)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running.server_address[1], running.token
    running.shutdown()
    running.server_close()
    thread.join()


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_server_takes_nifti_and_a_zip_of_dicom(folder: Path, server: tuple[int, str], tmp_path: Path) -> None:
    port, key = server
    body = (folder / "scan.nii.gz").read_bytes()
    status, text = ask(port, "POST", "/scan", body, X_Medformer=key, X_Name="one.nii.gz")
    assert status == 200
    assert json.loads(text)["shape"] == list(SHAPE)
    write_dicom_series(make_phantom(0, shape=(10, 24, 24)), tmp_path / "series")
    body = Path(shutil.make_archive(str(tmp_path / "series"), "zip", tmp_path / "series")).read_bytes()
    status, text = ask(port, "POST", "/scan", body, X_Medformer=key, X_Name="series.zip")
    assert status == 200
    assert json.loads(text)["shape"] == [10, 24, 24]
    assert json.loads(text)["units"] == "HU"


def test_the_server_refuses_what_is_bad_or_foreign(server: tuple[int, str], tmp_path: Path) -> None:
    port, key = server
    assert ask(port, "POST", "/scan", b"x", X_Medformer="guess", X_Name="a.nii")[0] == 403
    assert ask(port, "GET", "/", Host=f"evil.example:{port}")[0] == 403
    assert ask(port, "GET", f"/etc/passwd?token={key}")[0] == 404
    assert ask(port, "POST", "/scan", b"MZ", X_Medformer=key, X_Name="a.exe")[0] == 415
    many = str(10**6 + 1)
    assert ask(port, "POST", "/scan", b"", X_Medformer=key, X_Name="a.nii", Content_Length=many)[0] == 413
    status, text = ask(port, "POST", "/scan", b"no scan at all", X_Medformer=key, X_Name="..%2F..%2Fa.nii")
    assert status == 422
    assert "\n" not in text
    assert "/" not in text
    status, text = ask(port, "POST", "/scan", b"PK\x03\x04 cut off", X_Medformer=key, X_Name="a.zip")
    assert status == 422
    assert "a.zip" in text


def test_the_server_listens_on_this_machine_only(folder: Path) -> None:
    running = serve.make_server(page.Viewer(a_model(), folder / "backbone.safetensors"), [], 0)
    assert running.server_address[0] == "127.0.0.1"
    running.server_close()


# ---- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from launched()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A tab that fails the test on any error of the page's script and on any request but to the page itself."""
    opened = browser.new_page(viewport={"width": 1300, "height": 900})
    troubles: list[str] = []
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    mine = ("file:", "data:", "http://127.0.0.1")
    opened.on("request", lambda request: None if request.url.startswith(mine) else troubles.append(request.url))
    yield opened
    opened.close()
    assert troubles == []


_PIXELS = """([plane, u, v]) => {
    const c = document.getElementById(plane), context = c.getContext("2d");
    const all = u === null, x = Math.floor(u * c.width), y = Math.floor(v * c.height);
    const d = all ? context.getImageData(0, 0, c.width, c.height).data : context.getImageData(x, y, 1, 1).data;
    const s = [0, 0, 0];
    for (let i = 0; i < d.length; i++) if (i % 4 < 3) s[i % 4] += d[i];
    return s.map((value) => 4 * value / d.length);
}"""


def pixel(tab: Any, plane: str, at: tuple[float, float]) -> list[float]:
    """RGB of a canvas at shares (across, down) of its size."""
    return tab.evaluate(_PIXELS, [plane, *at])


def mean_colour(tab: Any, plane: str) -> list[float]:
    return tab.evaluate(_PIXELS, [plane, None, None])


def slices(tab: Any) -> list[int]:
    return tab.evaluate("window.medformer.state.at")


def test_a_browser_draws_and_obeys(folder: Path, tmp_path: Path, tab: Any) -> None:
    out = tmp_path / "page.html"
    flags = ["--probe", str(folder / "probe.safetensors"), "--cases", str(folder / "cases"), "--out", str(out)]
    assert command.main([str(folder), str(folder / "scan.nii.gz"), *flags]) == 0
    tab.goto(out.as_uri())
    tab.wait_for_selector("#axial")

    # Slices, where the ball is and nowhere else; the patient's right is on the left, the front above, the head above.
    z, y, x = BALL
    tab.select_option("#overlay", "none")
    tab.fill("#centre", "500")
    tab.fill("#width", "1000")
    tab.keyboard.press("Tab")
    tab.focus("#axial")
    for _ in range(z - SHAPE[0] // 2):
        tab.keyboard.press("ArrowUp")
    assert slices(tab)[0] == z
    here = ((SHAPE[2] - x - 0.3) / SHAPE[2], (SHAPE[1] - y - 0.3) / SHAPE[1])
    assert min(pixel(tab, "axial", here)) > 220
    mirrored = (1 - here[0], here[1])
    assert max(pixel(tab, "axial", mirrored)) < 100
    assert max(pixel(tab, "axial", (here[0], 1 - here[1]))) < 100
    tab.keyboard.press("2")
    for _ in range(SHAPE[1] // 2 - y):
        tab.keyboard.press("ArrowDown")
    assert min(pixel(tab, "coronal", (here[0], (SHAPE[0] - z - 0.3) / SHAPE[0]))) > 220
    tab.hover("#sagittal")
    tab.mouse.wheel(0, -300)
    assert slices(tab)[2] == SHAPE[2] // 2 + 1
    ratio = tab.evaluate("(() => { const c = document.getElementById('coronal'); return c.height / c.width })()")
    assert ratio == pytest.approx(SHAPE[0] * 2.0 / SHAPE[2], rel=0.05)  # slices are 2 mm apart, pixels 1

    # Window and level: narrow around the noise makes it visible; a drag changes the width.
    before = mean_colour(tab, "axial")
    tab.fill("#centre", "100")
    tab.fill("#width", "20")
    tab.keyboard.press("Tab")
    assert mean_colour(tab, "axial")[0] > before[0] + 40
    box = tab.locator("#axial").bounding_box()
    tab.mouse.move(box["x"] + 20, box["y"] + 20)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 120, box["y"] + 20, steps=4)
    tab.mouse.up()
    assert tab.evaluate("window.medformer.state.width") > 25
    tab.focus("#axial")
    tab.keyboard.press("r")

    # Overlays: attention and colours change the picture, by as much as the slider says; opacity 0 is the plain scan.
    plain = mean_colour(tab, "axial")
    seen = {}
    for key in ("head0", "head2", "pca"):
        tab.select_option("#overlay", key)
        seen[key] = mean_colour(tab, "axial")
        assert np.abs(np.subtract(seen[key], plain)).max() > 3
    assert seen["head0"] != seen["head2"]
    tab.evaluate(
        "(() => { const o = document.getElementById('opacity'); o.value = 0; o.dispatchEvent(new Event('input')) })()"
    )
    np.testing.assert_allclose(mean_colour(tab, "axial"), plain, atol=0.5)
    tab.focus("#axial")
    for _ in range(20):
        tab.keyboard.press("]")
    assert tab.evaluate("window.medformer.state.opacity") == pytest.approx(1)

    # A click on the ball: its token, its similarity to all others as the model has it.
    box = tab.locator("#axial").bounding_box()
    tab.mouse.click(box["x"] + here[0] * box["width"], box["y"] + here[1] * box["height"])
    assert slices(tab) == list(BALL)
    token = tab.evaluate("window.medformer.state.token")
    with torch.no_grad():
        volume = read_volume(folder / "scan.nii.gz")
        features = a_model().forward_features(torch.from_numpy(medformer.data.normalise(volume))[None, None])
    assert token == [round((v - 1.5) / 4) for v in BALL]  # a patch of 8 every 4 from -2: its middle is at 4 i + 1.5
    tokens = F.normalize(features.patches[0], dim=1)
    mine = tokens @ tokens[int(np.ravel_multi_index(token, features.grid))]
    drawn = tab.evaluate("Array.from(window.medformer.state.similar)")
    assert np.abs(np.subtract(drawn, mine.numpy())).max() < 0.06
    assert "similarity to token" in tab.text_content("#place")
    tab.focus("#axial")
    tab.keyboard.press("Escape")
    assert tab.input_value("#overlay") == "pca"

    # The side: the probe's answer and the cases, as text and never as markup; the curve.
    assert tab.text_content("#answers h2") == "Answer: <b>organs"
    assert set(tab.locator("#answers .bar span").all_text_contents()) == {"liver", "<img src=x>"}
    assert sum(float(t.rstrip("%")) for t in tab.locator("#answers .bar b").all_text_contents()) == pytest.approx(
        100, abs=0.2
    )
    captions = tab.locator("#nearest figcaption").all_text_contents()
    assert {c.split()[1] for c in captions} == {"case1", "case2"}
    assert all(-1 <= float(c.split()[0]) <= 1 for c in captions)
    assert tab.evaluate("[...document.querySelectorAll('#nearest img')].every((i) => i.naturalWidth > 10)")
    assert tab.locator("#series option").all_text_contents() == ["loss", "lr"]
    assert max(mean_colour(tab, "curve")) > 0.5  # transparent black where nothing is drawn
    tab.screenshot(path=str(tmp_path / "page.png"))
    assert Image.open(tmp_path / "page.png").size == (1300, 900)


def test_a_browser_shows_a_picture_upright(tmp_path: Path, tab: Any) -> None:
    pixels = np.full((32, 48), 40, np.uint8)
    pixels[4:12, 30:44] = 230  # above, right
    Image.fromarray(pixels).save(tmp_path / "image.png")
    torch.manual_seed(0)
    medformer.save(medformer.tiny_2d(width=24, depth=1, heads=2), tmp_path / "backbone.safetensors")
    assert command.main([str(tmp_path), str(tmp_path / "image.png"), "--out", str(tmp_path / "p.html")]) == 0
    tab.goto((tmp_path / "p.html").as_uri())
    tab.select_option("#overlay", "none")
    assert min(pixel(tab, "axial", (37 / 48, 8 / 32))) > 200
    assert max(pixel(tab, "axial", (10 / 48, 8 / 32))) < 100
    assert max(pixel(tab, "axial", (37 / 48, 24 / 32))) < 100
    assert tab.locator("#planes canvas").count() == 1
    tab.locator("#axial").click(position={"x": 5, "y": 5})
    assert tab.evaluate("window.medformer.state.token") == [0, 0, 0]


def test_a_scan_can_be_dropped(folder: Path, server: tuple[int, str], tab: Any, tmp_path: Path) -> None:
    tab.goto(f"http://127.0.0.1:{server[0]}/?token={server[1]}")
    tab.set_input_files("#file", folder / "scan.nii.gz")
    tab.wait_for_selector("#sagittal")
    assert tab.text_content("#name") == "scan.nii.gz"
    (tmp_path / "bad.exe").write_bytes(b"MZ")
    assert tab.locator("#problem").text_content() == ""


def test_planes_use_the_window_and_nothing_is_wider(folder: Path, tmp_path: Path, browser: Any) -> None:
    out = tmp_path / "page.html"
    scans = [str(folder / "scan.nii.gz"), str(folder / "cases" / "case1.nii")]
    assert command.main([str(folder), *scans, "--out", str(out)]) == 0
    for width, height in ((1400, 900), (1920, 1080), (700, 900)):
        opened = browser.new_page(viewport={"width": width, "height": height})
        opened.goto(out.as_uri())
        opened.wait_for_selector("#sagittal")
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        boxes = [opened.locator(f"#{name}").bounding_box() for name in ("axial", "coronal", "sagittal", "table")]
        assert all(box["x"] + box["width"] < width for box in boxes)
        if width > 900:  # on the first screen, and not small on it
            assert all(box["y"] + box["height"] < height for box in boxes)
            assert sum(box["width"] * box["height"] for box in boxes[:3]) > 0.15 * width * height
        opened.close()


def test_a_bad_scan_is_refused_in_words(server: tuple[int, str], browser: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.nii").write_bytes(b"no scan")
    opened = browser.new_page()
    opened.goto(f"http://127.0.0.1:{server[0]}/?token={server[1]}")
    opened.set_input_files("#file", tmp_path / "bad.nii")
    opened.locator("#problem", has_text=re.compile(r"^bad\.nii: ")).wait_for()
    assert opened.locator("#planes canvas").count() == 0
    opened.close()


def test_probe_and_model_must_fit(folder: Path) -> None:
    with pytest.raises(UserError, match="made for a 3D model of width 24, this one is 3D of width 48"):
        page.read_probe(folder / "probe.safetensors", a_model(width=48))
