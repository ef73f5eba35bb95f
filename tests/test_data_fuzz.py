"""Damaged and made-up input: every reader and parser ends with its own error or a volume, soon, and never otherwise."""

from __future__ import annotations

import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medformer.data import ScanError, Volume, read_volume
from medformer.data.datasets import bimcv_covid19, chexpert, lidc_idri, medmnist, rsna_ich, siim_covid19
from medformer.data.safe_xml import parse_xml
from medformer.data.tables import parse_literal, read_sheet, read_table
from tests.dataset_files import annotation, sheet
from tests.dicom_files import write_enhanced, write_slice
from tests.test_data_frames import write_mosaic

SLOW_S = 5.0
LIMITS = settings(max_examples=40, deadline=None, derandomize=True)
DATA = np.random.default_rng(0).integers(-900, 900, (4, 5, 6)).astype(np.int16)


def _dicom(path: Path) -> None:
    write_slice(path, 0, np.zeros(3))


def _enhanced(path: Path) -> None:
    write_enhanced(path, [0, 2, 4])


def _mosaic(path: Path) -> None:
    write_mosaic(path, 4)


def _nifti(path: Path) -> None:
    nib.save(nib.Nifti1Image(DATA.T, np.diag([1, 2, 3, 1.0])), path)


def _saved(path: Path) -> None:
    Volume(voxels=DATA, affine=np.eye(4), modality="CT", units="HU", notes=("n",), source="x", valid=DATA > -800).save(
        path
    )


def _png(path: Path) -> None:
    Image.fromarray(DATA[0].astype(np.uint16)).save(path)


def _eight_bits(path: Path) -> None:
    Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)).save(path)


def _tiff(path: Path) -> None:
    Image.fromarray(DATA[0].astype(np.uint16)).save(path, compression="tiff_lzw")


def _npy(path: Path) -> None:
    np.save(path, DATA)


def _zip(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        _dicom(Path(folder) / "a.dcm")
        archive.write(Path(folder) / "a.dcm", "a.dcm")


def _itk(path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    sitk.WriteImage(sitk.GetImageFromArray(DATA), str(path))


def _hdf5(path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file["kspace"] = np.zeros((2, 8, 6), np.complex64)
        file["reconstruction_esc"] = np.ones((2, 4, 4), np.float32)
        file.attrs["acquisition"] = "AXT2"


MAKERS: dict[str, Callable[[Path], None]] = {
    "a.dcm": _dicom, "e.dcm": _enhanced, "m.dcm": _mosaic, "a.nii": _nifti, "a.nii.gz": _nifti, "s.nii": _saved,
    "a.png": _png, "a.jpg": _eight_bits, "a.tif": _tiff, "a.bmp": _eight_bits, "a.npy": _npy, "a.zip": _zip,
    "a.mha": _itk, "a.nrrd": _itk, "a.h5": _hdf5,
}  # fmt: skip


@cache
def whole(name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        MAKERS[name](Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def soon(call: Callable[[], object]) -> object:
    """The result or the ScanError; anything else is a failure, as is taking long."""
    start = time.process_time()
    try:
        result: object = call()
    except ScanError as error:
        result = error
    assert "\n" not in (str(result) if isinstance(result, ScanError) else "")
    assert time.process_time() - start < SLOW_S
    return result


def read(name: str, data: bytes) -> object:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        return soon(lambda: read_volume(path))


@pytest.mark.parametrize("name", MAKERS)
@LIMITS
@given(st.data())
def test_altered_bytes_end_in_an_error_or_a_volume(name: str, data: st.DataObject) -> None:
    content = bytearray(whole(name))
    # Headers are where the decisions are: half of the changes go there.
    places = st.one_of(st.integers(0, len(content) - 1), st.integers(0, min(700, len(content) - 1)))
    for at, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=8)):
        content[at] = value
    result = read(name, bytes(content))
    assert isinstance(result, ScanError | Volume)
    if isinstance(result, Volume):
        assert result.voxels.nbytes <= 2**26
        assert np.isfinite(result.affine).all()


@pytest.mark.parametrize("name", MAKERS)
@LIMITS
@given(st.data())
def test_a_cut_file_is_never_a_volume(name: str, data: st.DataObject) -> None:
    content = whole(name)
    # The last byte or two may be padding, or follow the last pixel of a picture; a TIFF may end in an empty pointer.
    spare = {".png": 24, ".jpg": 24, ".tif": 5}.get(Path(name).suffix, 2)
    end = data.draw(st.integers(0, len(content) - spare))
    assert isinstance(read(name, content[:end]), ScanError)


@LIMITS
@given(st.sampled_from(sorted(MAKERS)), st.binary(max_size=2000), st.integers(0, 400))
def test_any_bytes_behind_a_true_beginning_are_survived(name: str, tail: bytes, kept: int) -> None:
    assert isinstance(read(name, whole(name)[:kept] + tail), ScanError | Volume)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def parse(place: Path, name: str, data: bytes, call: Callable[[Path], object]) -> None:
    path = place / name
    path.write_bytes(data)
    soon(lambda: call(path))
    os.unlink(path)


TEXT = st.text(st.characters(codec="utf-8"), max_size=300)
CELLS = st.one_of(TEXT, st.sampled_from(["ID_1_any", "0", "1", "", "[", "{'x': 1}", "\0", '"', "=cmd()", "a" * 999]))
ROWS = st.lists(st.lists(CELLS, max_size=6), max_size=8)


@LIMITS
@given(ROWS)
def test_tables_of_anything_end_in_rows_or_an_error(place: Path, rows: list[list[str]]) -> None:
    for header, call in (
        ("ID,Label", rsna_ich.read_labels),
        ("a,b", lambda p: list(read_table(p, ["a"]))),
        ("participant,age", bimcv_covid19.read_people),
    ):
        text = "\n".join([header, *(",".join(row) for row in rows)])
        parse(place, "t.csv", text.encode("utf-8", "surrogatepass"), call)


@LIMITS
@given(ROWS)
def test_siim_and_chexpert_tables_of_anything(place: Path, rows: list[list[str]]) -> None:
    for name, header, call in (
        ("train_image_level.csv", "id,boxes,label,StudyInstanceUID", siim_covid19.read_images),
        ("train_study_level.csv", _header("id", *siim_covid19.CLASSES), siim_covid19.read_studies),
        ("train.csv", _header("Path", *chexpert.FINDINGS), _chexpert),
    ):
        text = "\n".join([header, *(",".join(row) for row in rows)])
        parse(place, name, text.encode("utf-8", "surrogatepass"), call)


def _header(*names: str) -> str:
    return ",".join(names)


def _chexpert(path: Path) -> object:
    (path.parent / "train" / "patient1").mkdir(parents=True, exist_ok=True)
    return chexpert.scan(path.parent)


@LIMITS
@given(st.binary(max_size=600), st.integers(0, 500))
def test_xml_and_workbooks_of_anything(place: Path, junk: bytes, at: int) -> None:
    good = annotation("1.2", [[(5, 5, 3)]]).encode()
    parse(place, "a.xml", good[:at] + junk + good[at:], lidc_idri.read_annotations)
    parse(place, "b.xml", junk, lambda p: parse_xml(p.read_bytes(), "b.xml"))
    book = sheet(place / "good.xlsx", [["a", "b"], ["x", 1]]).read_bytes()
    parse(place, "a.xlsx", book[:at] + junk + book[at:], lambda p: list(read_sheet(p)))
    cells = b"<worksheet><sheetData><row><c r='A1' t='s'><v>" + junk[:20] + b"</v></c></row></sheetData></worksheet>"
    with zipfile.ZipFile(place / "c.xlsx", "w") as archive:
        archive.writestr("xl/worksheets/sheet1.xml", cells)
    soon(lambda: list(read_sheet(place / "c.xlsx")))


@LIMITS
@given(st.one_of(TEXT, st.text("[](){}'\",:0123456789-+.eEx ", max_size=3000)))
def test_literals_and_sidecars_of_anything(place: Path, text: str) -> None:
    soon(lambda: parse_literal(text, "cell"))
    soon(lambda: bimcv_covid19.states_of(text, "cell"))
    (place / "a.json").write_text(text, encoding="utf-8")
    assert isinstance(bimcv_covid19.read_sidecar(place / "a.png"), dict)


@LIMITS
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6))
def test_altered_archives_of_arrays(place: Path, changes: list[tuple[int, int]]) -> None:
    path = place / "x.npz"
    np.savez_compressed(path, train_images=np.zeros((2, 5, 5), np.uint8), train_labels=np.zeros((2, 1), np.uint8))
    content = bytearray(path.read_bytes())
    for at, value in changes:
        content[at % len(content)] = value
    path.write_bytes(bytes(content))
    medmnist.load.cache_clear()
    soon(lambda: medmnist.scan(place))
    path.unlink()
