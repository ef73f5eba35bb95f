"""One reader of pictures: the same values for training, evaluation, page and scans, whatever the mode and the depth."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

import screen
from medformer.data import ScanError, Volume, find_scans, normalise, read_volume
from medformer.data.cases import network_input, read_case
from medformer.data.datasets import medmnist
from medformer.data.pictures import find_pictures, luma, read_mask, read_picture
from medformer.data.store.arrays import open_array
from medformer.data.store.images import store_images
from medformer.errors import UserError
from medformer.evaluation import tasks
from medformer.page import cases, page
from roots import DataConfig, prepare_images
from views import ViewsConfig

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (12, 17)).astype(np.uint8)
WIDE = (np.arange(12 * 17).reshape(12, 17) * 321).astype(np.uint16)  # all different, 0 to 65163
RGB = RNG.integers(0, 256, (12, 17, 3)).astype(np.uint8)
ALPHA = RNG.integers(0, 256, (12, 17, 1)).astype(np.uint8)
BITS = GREY > 127
PALETTE = RNG.integers(0, 256, (256, 3)).astype(np.uint8)
LUMA = np.asarray(Image.fromarray(RGB).convert("L"))


def _paletted() -> Image.Image:
    image = Image.fromarray(GREY).convert("P")
    image.putpalette(PALETTE.tobytes())
    image.putdata(GREY.ravel().tolist())
    return image


def _of(values: np.ndarray, **options: object) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(values).save(path, **options)


def _big_endian(path: Path) -> None:
    Image.frombytes("I;16B", WIDE.shape[::-1], WIDE.astype(">u2").tobytes()).save(path)


def _cmyk(path: Path) -> None:
    Image.fromarray(RGB).convert("CMYK").save(path)


def _ycbcr(path: Path) -> None:
    Image.fromarray(RGB).convert("YCbCr").save(path, compression="tiff_lzw")


# name: how it is written, and the values that all must see; None: those that Pillow has after it turned them to RGB.
MODES: dict[str, tuple[Callable[[Path], None], np.ndarray | None]] = {
    "grey.png": (_of(GREY), GREY),
    "grey.bmp": (_of(GREY), GREY),
    "grey.tif": (_of(GREY), GREY),
    "lzw.tiff": (_of(GREY, compression="tiff_lzw"), GREY),
    "wide.png": (_of(WIDE), WIDE),
    "wide.tif": (_of(WIDE), WIDE),
    "big.tif": (_big_endian, WIDE),
    "inverted.tif": (_of(WIDE, tiffinfo={262: 0}), 65535 - WIDE),
    "integers.tif": (_of(WIDE.astype(np.int32)), WIDE),
    "signed.tif": (_of(WIDE.astype(np.int32) - 9000), WIDE.astype(np.int32) - 9000),
    "floats.tif": (_of(WIDE.astype(np.float32) / 7), WIDE.astype(np.float32) / 7),
    "bits.png": (_of(BITS), BITS * np.uint8(255)),
    "bits.tif": (_of(BITS), BITS * np.uint8(255)),
    "palette.png": (lambda path: _paletted().save(path), luma(PALETTE[GREY])),
    "clear.png": (lambda path: _paletted().save(path, transparency=3), luma(PALETTE[GREY])),
    "alpha.png": (_of(np.concatenate([GREY[..., None], ALPHA], -1)), GREY),
    "rgb.png": (_of(RGB), LUMA),
    "rgb.bmp": (_of(RGB), LUMA),
    "rgb.tif": (_of(RGB), LUMA),
    "rgba.png": (_of(np.concatenate([RGB, ALPHA], -1)), LUMA),
    "grey.jpg": (_of(GREY), None),
    "rgb.jpg": (_of(RGB), None),
    "cmyk.jpg": (_cmyk, None),
    "ycbcr.tif": (_ycbcr, None),
}


def _trained(folder: Path, cache: Path) -> dict[str, np.ndarray]:
    stored, skipped = store_images(folder, cache, 0)
    assert not skipped
    return {scan.name: np.asarray(open_array(scan.path), np.float32) for scan in stored}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """One folder a mode, and what training stores of each."""
    root = tmp_path_factory.mktemp("modes")
    for name, (write, _) in MODES.items():
        place = root / "all" / name.replace(".", "_")
        place.mkdir(parents=True)
        write(place / name)
    return root / "all", _trained(root / "all", root / "cache")


def as_evaluated(path: Path) -> tuple[Volume, torch.Tensor]:
    """A picture as evaluation reads it, and what a network gets of it."""
    (volume,) = case = read_case([path], 2)
    assert volume is not None
    return volume, torch.from_numpy(network_input(case, 2)).half()


@pytest.mark.parametrize("name", MODES)
def test_every_caller_sees_the_same_values(name: str, folders: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, trained = folders
    path = root / name.replace(".", "_") / name
    expected = MODES[name][1]
    expected = luma(np.asarray(Image.open(path).convert("RGB"))) if expected is None else expected
    values, _ = read_picture(path)
    np.testing.assert_array_equal(values, expected)
    assert values.dtype == expected.dtype
    volume = read_volume(path, colour="grey")
    np.testing.assert_array_equal(volume.voxels[0], values)
    assert volume.voxels.dtype == values.dtype
    np.testing.assert_array_equal(page.load_scan(path, 2).voxels, volume.voxels)
    evaluated, image = as_evaluated(path)
    assert evaluated.notes[: len(read_picture(path)[1])] == read_picture(path)[1]
    np.testing.assert_array_equal(evaluated.voxels[0], values)
    scaled = torch.from_numpy(normalise(volume)).half()
    assert torch.equal(image, scaled)
    np.testing.assert_array_equal(trained[f"{path.parent.name}/{path.stem}"], scaled.numpy())
    (found,) = find_scans(path.parent, images=True).scans
    assert found.shape == (1, *values.shape)


def test_sixteen_bits_keep_all_their_values_in_evaluation(folders: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, _ = folders
    evaluated, image = as_evaluated(root / "wide_png" / "wide.png")
    assert len(np.unique(evaluated.voxels)) == WIDE.size
    assert len(np.unique(image)) > WIDE.size * 0.8  # the brightest and darkest are clipped


def test_what_was_changed_in_pictures_is_said_once_with_counts(tmp_path: Path) -> None:
    clear, grey = Image.fromarray(np.concatenate([GREY[..., None], ALPHA], -1)), Image.fromarray(GREY)
    (tmp_path / "scans").mkdir()
    for i in range(3):
        clear.save(tmp_path / "scans" / f"clear{i}.png")
        grey.save(tmp_path / "scans" / f"grey{i}.png")
    exif = Image.Exif()
    exif[274] = 3
    grey.save(tmp_path / "scans" / "turned.jpg", exif=exif)
    lines = [
        "3 of 7 {}: transparency ignored: the stored values stay",
        "1 of 7 {}: turned upright (EXIF orientation 3)",
    ]
    views, said = ViewsConfig(global_size=(1, 4, 4), local_views=0), []
    for _ in range(2):  # from the cache too
        prepared = prepare_images(DataConfig(root=str(tmp_path / "scans")), views, tmp_path / "cache", 0)
        said.clear()
        screen.describe(prepared, False, said.append)
        assert [line for line in said if " of 7 " in line] == [line.format("scans") for line in lines]
    names = sorted((tmp_path / "scans").iterdir())
    table = ["path,label,split"] + [f"scans/{p.name},{i % 2},{('train', 'test')[i > 3]}" for i, p in enumerate(names)]
    (tmp_path / "task.csv").write_text("\n".join(table))
    notes = tasks.read_task(tmp_path / "task.csv", 2, None, 0, list).notes
    assert [line for line in notes if " of 7 " in line] == [line.format("images") for line in lines]


def test_luma_is_that_of_pillow_at_8_bits_and_its_256_fold_at_16() -> None:
    colours = RNG.integers(0, 256, (300, 300, 3)).astype(np.uint8)
    eight = luma(colours)
    np.testing.assert_array_equal(eight, np.asarray(Image.fromarray(colours).convert("L")))
    wide = luma(colours.astype(np.uint16) * 257)
    assert wide.dtype == np.uint16
    assert np.abs(wide / 257 - eight).max() <= 0.51
    np.testing.assert_allclose(luma(colours / 255), eight / 255, atol=0.51 / 255)
    ends = np.array([0, 1, 65534, 65535], np.uint16)
    np.testing.assert_array_equal(luma(np.stack([ends] * 3, -1)), ends)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_colour_arrays_are_turned_grey_as_files_are(dtype: type, tmp_path: Path) -> None:
    stack = RNG.integers(0, 256, (4, 12, 17, 3)).astype(dtype)
    labels = np.array([[0], [1], [0], [1]])
    arrays = {f"{s}_images": stack for s in ("train", "val", "test")} | {
        f"{s}_labels": labels for s in ("train", "val", "test")
    }
    np.savez(tmp_path / "set.npz", **arrays)
    grey = luma(stack)
    expected = [tasks._normal(image, "x") for image in grey]
    trained = _trained(tmp_path / "set.npz", tmp_path / "cache")
    task = tasks.read_task(tmp_path / "set.npz", 2, None, 0, list)
    for i, image in enumerate(expected):
        np.testing.assert_array_equal(trained[f"set/{i}"], image.numpy())
        assert torch.equal(task.images[i], image)
        np.testing.assert_array_equal(cases._picture(stack[i]).voxels[0], grey[i])
    records = [r for r in medmnist.scan(tmp_path) if r.split == "train"]
    np.testing.assert_array_equal(medmnist.read(records[1]).voxels[0], grey[1])


@pytest.mark.parametrize("form", ["EPS", "GIF", "PPM", "WEBP", "PDF"])
def test_other_formats_named_png_are_refused_and_start_no_program(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "EPS":
        (tmp_path / "a.png").write_bytes(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
        )
    else:
        Image.fromarray(RGB).save(tmp_path / "a.png", format=form)

    def started(*_args: object, **_options: object) -> None:
        raise AssertionError("a program was started")

    for place, name in ((subprocess, "Popen"), (os, "system"), (os, "posix_spawn")):
        monkeypatch.setattr(place, name, started)
    (tmp_path / "t.csv").write_text("path,label\na.png,x\na.png,y\n")
    calls: list[Callable[[], object]] = [
        lambda: read_picture(tmp_path / "a.png"),
        lambda: read_mask(tmp_path / "a.png"),
        lambda: read_volume(tmp_path / "a.png"),
        lambda: page.load_scan(tmp_path / "a.png", 2),
        lambda: tasks.read_task(tmp_path / "t.csv", 2, None, 0, list),
    ]
    for call in calls:
        with pytest.raises((ScanError, UserError), match=r"a\.png") as refused:
            call()
        assert "\n" not in str(refused.value)
    stored, skipped = store_images(tmp_path, tmp_path / "cache", 0)
    assert not stored
    assert "no PNG, JPEG, TIFF or BMP picture" in dict(skipped)["a"]


def test_exif_orientation_is_applied_whatever_the_format(tmp_path: Path) -> None:
    turned = {1: GREY, 2: GREY[:, ::-1], 3: GREY[::-1, ::-1], 4: GREY[::-1], 5: GREY.T, 6: np.rot90(GREY, -1),
              7: np.rot90(GREY, 2).T, 8: np.rot90(GREY)}  # fmt: skip
    for turn, expected in turned.items():
        exif = Image.Exif()
        exif[274] = turn
        for name in ("a.png", "a.tif"):
            Image.fromarray(GREY).save(tmp_path / name, exif=exif)
            values, notes = read_picture(tmp_path / name)
            np.testing.assert_array_equal(values, expected)
            assert ("turned upright" in str(notes)) == (turn > 1)
        Image.fromarray(GREY).save(tmp_path / "a.jpg", exif=exif)
        assert read_picture(tmp_path / "a.jpg")[0].shape == expected.shape
        shapes = {scan.name: scan.shape for scan in find_scans(tmp_path, images=True).scans}
        assert set(shapes.values()) == {(1, *expected.shape)}


def test_what_is_not_kept_is_noted(folders: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    root, _ = folders
    for name in ("alpha", "rgba", "clear"):
        assert "transparency ignored" in str(read_picture(root / f"{name}_png" / f"{name}.png")[1])
    assert "BT.601" in str(read_volume(root / "rgb_png" / "rgb.png", colour="grey").notes)
    assert read_picture(root / "grey_png" / "grey.png")[1] == ()
    frames = [Image.fromarray(GREY), Image.fromarray(GREY[::-1].copy())]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    assert "first of 2 frames" in str(read_picture(tmp_path / "moving.png")[1])


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    pages = [Image.fromarray(WIDE), Image.fromarray(WIDE[::-1].copy()), Image.fromarray(WIDE // 2)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    return tmp_path / "stack.tif"


def test_each_page_of_a_tiff_is_a_picture_with_a_name(stack: Path, tmp_path: Path) -> None:
    assert [p.name for p in find_pictures(tmp_path)] == ["stack.tif#1", "stack.tif#2", "stack.tif#3"]
    np.testing.assert_array_equal(read_picture(f"{stack}#2")[0], WIDE[::-1])
    np.testing.assert_array_equal(read_volume(f"{stack}#2").voxels[0], WIDE[::-1])
    np.testing.assert_array_equal(page.load_scan(Path(f"{stack}#3"), 2).voxels[0], WIDE // 2)
    assert set(_trained(tmp_path, tmp_path / "cache")) == {"stack#1", "stack#2", "stack#3"}
    (tmp_path / "t.csv").write_text(
        "path,label,split\n" + "".join(f"stack.tif#{n},{n % 2},{s}\n" for s in ("train", "val", "test") for n in (1, 2))
    )
    task = tasks.read_task(tmp_path / "t.csv", 2, None, 0, list)
    assert len(set(task.hashes)) == 2
    assert set(task.hashes) < tasks.hashes_of(tmp_path, list)


def test_a_page_that_is_not_named_or_not_there_is_refused(stack: Path, tmp_path: Path) -> None:
    for path in (stack, f"{stack}#4"):
        with pytest.raises(ScanError, match=r"stack\.tif.*3 page\(s\).*stack\.tif#1 to #3"):
            read_volume(path)
    Image.fromarray(GREY).save(tmp_path / "one.tif")
    Image.fromarray(GREY).save(tmp_path / "one.png")
    with pytest.raises(ScanError, match=r"name it one\.tif"):
        read_picture(tmp_path / "one.tif#1")
    with pytest.raises(ScanError, match=r"only a TIFF has pages; name it one\.png"):
        read_picture(tmp_path / "one.png#1")
    index = find_scans(tmp_path, images=True)
    assert {scan.name for scan in index.scans} == {"one#1", "one#2"}
    assert "3 page(s)" in next(s.reason for s in index.skipped if s.refused)


def test_thumbnails_in_a_tiff_are_left_out_with_a_note(tmp_path: Path) -> None:
    with TiffImagePlugin.AppendingTiffWriter(str(tmp_path / "a.tif"), True) as file:
        for values, subfile in ((GREY, 0), (GREY[::2, ::2], 1)):
            Image.fromarray(values).save(file, format="TIFF", tiffinfo={254: subfile})
            file.newFrame()
    assert [p.name for p in find_pictures(tmp_path)] == ["a.tif"]
    values, notes = read_picture(tmp_path / "a.tif")
    np.testing.assert_array_equal(values, GREY)
    assert "1 thumbnails or masks" in str(notes)


def test_cut_made_up_and_missing_pictures_give_one_line(tmp_path: Path) -> None:
    noise = RNG.integers(0, 256, (64, 64)).astype(np.uint8)
    for name in ("a.png", "a.jpg", "a.tif", "a.bmp"):
        Image.fromarray(noise).save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(ScanError, match=name) as refused:
            read_picture(tmp_path / name)
        assert "\n" not in str(refused.value)
    huge = (tmp_path / "huge.bmp", tmp_path / "bomb.png")
    Image.fromarray(noise).save(huge[0])
    data = huge[0].read_bytes()
    huge[0].write_bytes(data[:18] + (8192).to_bytes(4, "little") * 2 + data[26:])
    Image.fromarray(noise).save(huge[1])
    data = huge[1].read_bytes()
    huge[1].write_bytes(data[:16] + (2**15).to_bytes(4, "big") * 2 + data[24:])
    for path in huge:
        with pytest.raises(ScanError, match=rf"{path.name}: "):
            read_picture(path)
    with pytest.raises(ScanError, match=r"gone\.png: cannot be opened \(No such file"):
        read_picture(tmp_path / "gone.png")


def test_a_damaged_picture_beside_a_scan_is_no_scan(tmp_path: Path) -> None:
    (tmp_path / "broken.tif").write_bytes(b"II*\0" + b"\xff" * 200)
    Image.fromarray(GREY).save(tmp_path / "good.png")
    assert [s.name for s in find_scans(tmp_path, images=True).scans] == ["good"]
    with pytest.raises(ScanError, match=r"no NIfTI or DICOM"):
        find_scans(tmp_path)


@pytest.mark.parametrize("kind", ["RGB", "LA", "I;16;colour"])
def test_what_pillow_would_cut_to_8_bits_is_refused(kind: str, tmp_path: Path) -> None:
    # A PNG of 16 bits and a colour type of 2 (RGB), 4 (grey with opacity) or 6, which Pillow cannot write.
    import struct
    import zlib

    channels, number = {"RGB": (3, 2), "LA": (2, 4), "I;16;colour": (4, 6)}[kind]
    row = b"\0" + RNG.integers(0, 256, 5 * channels * 2).astype(np.uint8).tobytes()
    parts = ((b"IHDR", struct.pack(">IIBBBBB", 5, 4, 16, number, 0, 0, 0)), (b"IDAT", zlib.compress(row * 4)))
    chunks = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in (*parts, (b"IEND", b""))
    ]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    for call in (read_picture, read_volume):
        with pytest.raises(ScanError, match="16-bit colour"):
            call(tmp_path / "a.png")


def test_masks_are_read_as_the_numbers_stored(tmp_path: Path) -> None:
    _paletted().save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "palette.png"), GREY)
    Image.fromarray(BITS).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "bits.png"), BITS.astype(np.uint8))
    Image.fromarray(WIDE).save(tmp_path / "wide.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "wide.png"), WIDE)
    Image.fromarray(RGB).save(tmp_path / "rgb.png")
    with pytest.raises(ScanError, match="one number a pixel"):
        read_mask(tmp_path / "rgb.png")


def test_a_cache_of_the_first_reader_is_made_anew(tmp_path: Path) -> None:
    import hashlib

    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.png"
    Image.fromarray(GREY).save(path)
    stat = path.stat()
    old = hashlib.sha256(f"images 1|{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:24]
    (tmp_path / "cache" / f"images-{old}").mkdir(parents=True)
    (tmp_path / "cache" / f"images-{old}" / "index.json").write_text(json.dumps({"good": [], "bad": []}))
    stored, _ = store_images(tmp_path / "in", tmp_path / "cache", 0)
    assert [scan.name for scan in stored] == ["a"]
