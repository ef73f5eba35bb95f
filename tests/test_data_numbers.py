"""Every number of every header set to what is none: a refusal of one line or a finite volume, and never a false one."""

from __future__ import annotations

import gzip
import re
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import FileDataset

from medformer.data import ScanError, find_scans, read_volume
from medformer.data.volumes import odd_values
from tests.dicom_files import write_enhanced, write_slice

DATA = np.random.default_rng(0).integers(-900, 900, (4, 5, 6)).astype(np.int16)
FLOATS = (np.nan, np.inf, -np.inf, -1.0, 0.0, 3e38, -3e38, 1e-40, 0.5)
WHOLE = (-1, 0, 1, 2**15 - 1, -(2**15))
TEXTS = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e300",
    "-1e300",
    "1e-300",
    "99999999999999999999",
    "5000 5000 5000",
    "",
    "x",
)
META = {
    "ObjectType": "Image", "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False", "TransformMatrix": "1 0 0 0 1 0 0 0 1", "Offset": "10 20 30", "HeaderSize": "0",
    "ElementSpacing": "1 2 3", "DimSize": "6 5 4", "ElementType": "MET_SHORT", "ElementDataFile": "LOCAL",
}  # fmt: skip
NRRD = {
    "type": "short", "dimension": "3", "space": "left-posterior-superior", "sizes": "6 5 4",
    "space directions": "(1,0,0) (0,2,0) (0,0,3)", "endian": "little", "encoding": "raw", "byte skip": "0",
    "space origin": "(10,20,30)",
}  # fmt: skip


def meta(path: Path, **changed: str | None) -> Path:
    fields = {k: v for k, v in (META | changed).items() if v is not None}
    fields["ElementDataFile"] = fields.pop("ElementDataFile")  # the last line of a header
    path.write_bytes("".join(f"{k} = {v}\n" for k, v in fields.items()).encode() + DATA.tobytes())
    return path


def nrrd(path: Path, **changed: str | None) -> Path:
    changed = {k.replace("_", " "): v for k, v in changed.items()}
    fields = {k: v for k, v in (NRRD | changed).items() if v is not None}
    lines = "".join(f"{k}: {v}\n" for k, v in fields.items())
    path.write_bytes(f"NRRD0004\n{lines}\n".encode() + DATA.tobytes())
    return path


def check(path: Path, what: object) -> None:
    """A volume that is finite and plausible, or a foreseen refusal; no warning on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            volume, refused = read_volume(path), ""
        except ScanError as error:
            volume, refused = None, str(error)
    assert "please report" not in refused, (what, refused)
    assert "\n" not in refused, what
    if volume is None:
        return
    assert np.isfinite(volume.affine).all(), what
    assert np.isfinite(volume.voxels).all(), what
    assert max(volume.spacing_mm) <= 1e4, what


def nifti_fields(second: bool) -> Iterator[tuple[str, int, str]]:
    """Name, offset and struct format of every number in the header."""
    kind = nib.Nifti2Header if second else nib.Nifti1Header
    for name, (dtype, offset, *_) in (kind().template_dtype.fields or {}).items():
        base, count = (dtype.base, int(np.prod(dtype.shape))) if dtype.shape else (dtype, 1)
        for i in range(count if base.kind in "if" else 0):
            form = {"i1": "b", "i2": "h", "i4": "i", "i8": "q", "f4": "f", "f8": "d"}[base.str[1:]]
            yield f"{name}[{i}]", offset + i * base.itemsize, f"<{form}"


@pytest.mark.parametrize("second", [False, True])
def test_every_number_of_a_nifti_header(tmp_path: Path, second: bool) -> None:
    path = tmp_path / "a.nii"
    nib.save((nib.Nifti2Image if second else nib.Nifti1Image)(DATA.T, np.diag([1, 2, 3, 1.0])), path)
    good = path.read_bytes()
    for name, offset, form in nifti_fields(second):
        for value in FLOATS if form[1] in "fd" else WHOLE:
            if form[1] != "b" or -128 <= value < 128:
                path.write_bytes(good[:offset] + struct.pack(form, value) + good[offset + struct.calcsize(form) :])
                check(path, (name, value))


@pytest.mark.parametrize(("write", "fields", "suffix"), [(meta, META, ".mha"), (nrrd, NRRD, ".nrrd")])
def test_every_number_of_a_text_header(tmp_path: Path, write, fields: dict[str, str], suffix: str) -> None:
    for key, value in fields.items():
        numbers = list(re.finditer(r"[\d.]+", value)) or [None]
        for text in TEXTS:
            for found in numbers[:4]:
                new = text if found is None else value[: found.start()] + text + value[found.end() :]
                check(write(tmp_path / f"a{suffix}", **{key.replace(" ", "_"): new}), (key, new))


GEOMETRY = (
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices",
    "RescaleSlope", "RescaleIntercept",
)  # fmt: skip
SIZES = ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel")


def test_every_number_that_places_a_dicom_slice(tmp_path: Path) -> None:
    def edit(i: int, ds: FileDataset) -> None:
        ds.SpacingBetweenSlices = "2"
        values = [str(v) for v in (ds[tag].value if ds[tag].VM > 1 else [ds[tag].value])]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds._dict.pop(ds[tag].tag)
            ds.add_new(tag, "LO", [text[:16], *values[1:]])  # no check of numbers on the way out

    for tag in GEOMETRY:
        for text in TEXTS:
            write_slice(tmp_path / "a.dcm", 0, np.zeros(3), edit=edit)
            data = (tmp_path / "a.dcm").read_bytes().replace(b"LO", b"DS")
            (tmp_path / "a.dcm").write_bytes(data)
            check(tmp_path / "a.dcm", (tag, text))


def test_every_number_that_sizes_a_dicom_image(tmp_path: Path) -> None:
    for tag in SIZES:
        for value in (0, 1, 3, 7, 33, 65535):
            write_slice(tmp_path / "a.dcm", 0, np.zeros(3), edit=lambda i, ds, t=tag, v=value: setattr(ds, t, v))
            check(tmp_path / "a.dcm", (tag, value))
    for count in ("-1", "0", "99999999999", "x"):
        write_enhanced(tmp_path / "e.dcm", [0, 2, 4])
        data = (tmp_path / "e.dcm").read_bytes()
        at = data.index(b"\x28\x00\x08\x00IS")
        length = struct.unpack("<H", data[at + 6 : at + 8])[0]
        text = count.encode() + b" " * (len(count) % 2)
        data = data[: at + 6] + struct.pack("<H", len(text)) + text + data[at + 8 + length :]
        (tmp_path / "e.dcm").write_bytes(data)
        check(tmp_path / "e.dcm", ("NumberOfFrames", count))


FASTMRI = """<ismrmrdHeader><encoding><reconSpace><matrixSize><x>{}</x><y>4</y><z>1</z></matrixSize>
<fieldOfView_mm><x>{}</x><y>{}</y><z>4.5</z></fieldOfView_mm></reconSpace></encoding></ismrmrdHeader>"""


def test_every_number_of_a_fastmri_header(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    for text in TEXTS:
        for at in range(3):
            values = ["4", "140", "150"]
            values[at] = text
            with h5py.File(tmp_path / "a.h5", "w") as file:
                file["kspace"] = np.ones((2, 8, 4), np.complex64)
                file["ismrmrd_header"] = FASTMRI.format(*values).encode()
            check(tmp_path / "a.h5", values)


class TestOffset:
    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    @pytest.mark.parametrize("second", [False, True])
    @pytest.mark.parametrize("offset", [0, 1, 300])
    def test_inside_the_header_is_mended_where_the_size_shows_it(
        self, tmp_path: Path, offset: int, second: bool, suffix: str
    ) -> None:
        nib.save((nib.Nifti2Image if second else nib.Nifti1Image)(DATA.T, np.eye(4)), tmp_path / "a.nii")
        data = bytearray((tmp_path / "a.nii").read_bytes())
        struct.pack_into("<q" if second else "<f", data, 168 if second else 108, offset)
        pack = gzip.compress if suffix == ".nii.gz" else bytes
        (tmp_path / f"b{suffix}").write_bytes(pack(bytes(data)))
        volume = read_volume(tmp_path / f"b{suffix}", canonical=False)
        np.testing.assert_array_equal(volume.voxels, DATA)
        assert "lies inside the header" in volume.notes[0]
        (tmp_path / f"b{suffix}").write_bytes(pack(bytes(data) + b"12"))
        with pytest.raises(ScanError, match="lies inside the header"):
            read_volume(tmp_path / f"b{suffix}")


def test_one_bad_file_is_one_line_and_the_index_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import medformer.data.scans as module

    meta(tmp_path / "bad.mha")
    nrrd(tmp_path / "good.nrrd")

    def fail(path: str) -> None:
        raise ZeroDivisionError(path if path.endswith("bad.mha") else "")

    real = module.probe_itk
    monkeypatch.setattr(module, "probe_itk", lambda p: fail(p) if p.endswith("bad.mha") else real(p))
    index = find_scans(tmp_path)
    assert [s.name for s in index.scans] == ["good"]
    (skipped,) = index.skipped
    assert skipped.refused
    assert "ZeroDivisionError" in skipped.reason


class TestGeometry:
    @pytest.mark.parametrize(
        ("changed", "geometry"),
        [
            ({"ElementSpacing": None}, "none"), ({"ElementSpacing": None, "ElementSize": "1 2 3"}, "patient"),
            ({"TransformMatrix": None}, "spacing"), ({}, "patient"),
        ],
    )  # fmt: skip
    def test_of_metaimage_is_what_the_header_says(self, tmp_path: Path, changed, geometry: str) -> None:
        volume = read_volume(meta(tmp_path / "a.mha", **changed))
        assert volume.geometry == geometry
        assert volume.geometry == "patient" or volume.notes

    @pytest.mark.parametrize(
        ("changed", "geometry"),
        [
            ({"space_directions": None}, "none"), ({"space_directions": None, "spacings": "nan nan nan"}, "none"),
            ({"space_directions": None, "spacings": "1 2 3"}, "spacing"), ({"space": "scanner-xyz"}, "spacing"),
            ({"space": "3D-left-handed"}, "spacing"), ({"space": None, "space_dimension": "3"}, "spacing"),
            ({"space": "RAS"}, "patient"), ({}, "patient"),
        ],
    )  # fmt: skip
    def test_of_nrrd_is_what_the_header_says(self, tmp_path: Path, changed, geometry: str) -> None:
        volume = read_volume(nrrd(tmp_path / "a.nrrd", **changed))
        assert volume.geometry == geometry
        assert volume.geometry == "patient" or volume.notes

    @pytest.mark.parametrize(("unit", "mm"), [("um", 1e-3), ("micron", 1e-3), ("cm", 10.0), ("m", 1e3), ("mm", 1.0)])
    def test_units_of_length_are_brought_to_mm(self, tmp_path: Path, unit: str, mm: float) -> None:
        units = f'"{unit}" "{unit}" "{unit}"'
        for volume in (
            read_volume(nrrd(tmp_path / "a.nrrd", space_units=units)),
            read_volume(nrrd(tmp_path / "b.nrrd", space_directions=None, spacings="1 2 3", units=units)),
            read_volume(meta(tmp_path / "a.mha", DistanceUnits=unit)),
        ):
            assert volume.spacing_mm == pytest.approx((3 * mm, 2 * mm, mm))

    def test_units_that_are_no_length_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ScanError, match="one unit of length"):
            read_volume(nrrd(tmp_path / "a.nrrd", space_units='"mm" "mm" "s"'))

    @pytest.mark.parametrize("space", ["right-anterior-superior", "left-anterior-superior", "left-posterior-superior"])
    def test_of_nrrd_is_that_of_itk(self, tmp_path: Path, space: str) -> None:
        sitk = pytest.importorskip("SimpleITK")
        path = nrrd(tmp_path / "a.nrrd", space=space, space_directions="(0,1.5,0.2) (-2,0,0) (0,-0.3,3)")
        image, volume = sitk.ReadImage(str(path)), read_volume(path, canonical=False)
        np.testing.assert_array_equal(volume.voxels, sitk.GetArrayFromImage(image))
        for index in ((0, 0, 0), (5, 4, 3)):
            there = np.array(image.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
            np.testing.assert_allclose((volume.affine @ [*index, 1])[:3], there, atol=1e-6)

    @pytest.mark.parametrize("kind", ["CHAR", "UCHAR", "SHORT", "USHORT", "INT", "UINT", "LONG", "FLOAT", "DOUBLE"])
    @pytest.mark.parametrize("big", ["True", "False"])
    def test_types_and_byte_order_of_metaimage_are_those_of_itk(self, tmp_path: Path, kind: str, big: str) -> None:
        sitk = pytest.importorskip("SimpleITK")
        path = tmp_path / "a.mha"
        fields = META | {"ElementType": f"MET_{kind}", "BinaryDataByteOrderMSB": big, "DimSize": "3 2 1"}
        values = np.arange(1, 49, dtype=np.uint8)
        path.write_bytes("".join(f"{k} = {v}\n" for k, v in fields.items()).encode() + values.tobytes())
        with np.errstate(over="ignore"):
            theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        theirs = theirs if theirs.dtype.kind == "i" or theirs.dtype.kind == "u" else theirs.astype(np.float32)
        np.testing.assert_array_equal(read_volume(path, canonical=False).voxels, theirs)

    def test_a_nifti_without_codes_has_sizes_alone(self, tmp_path: Path) -> None:
        image = nib.Nifti1Image(DATA.T, None)
        image.header["pixdim"][1:4] = 2, 2, 3
        nib.save(image, tmp_path / "a.nii")
        data = bytearray((tmp_path / "a.nii").read_bytes())
        struct.pack_into("<hh", data, 252, 0, 0)
        (tmp_path / "a.nii").write_bytes(data)
        volume = read_volume(tmp_path / "a.nii")
        assert (volume.geometry, volume.spacing_mm) == ("spacing", (3, 2, 2))


class TestValues:
    @pytest.mark.parametrize("value", [1e300, -1e300, 1e30, np.inf])
    @pytest.mark.parametrize("name", ["a.nii", "a.npy", "a.mha"])
    def test_beyond_what_float32_can_square_are_refused(self, tmp_path: Path, name: str, value: float) -> None:
        data = DATA.astype(np.float64)
        data[0, 0, 0] = value
        if name == "a.nii":
            nib.save(nib.Nifti1Image(data.T, np.eye(4)), tmp_path / name)
        elif name == "a.npy":
            np.save(tmp_path / name, data)
        else:
            head = "".join(f"{k} = {v}\n" for k, v in (META | {"ElementType": "MET_DOUBLE"}).items())
            (tmp_path / name).write_bytes(head.encode() + data.tobytes())
        with pytest.raises(ScanError, match=r"at most 1e\+18 are read|NaN or infinite"):
            read_volume(tmp_path / name)

    def test_far_beyond_all_others_are_noted(self) -> None:
        values = DATA.astype(np.float32)
        assert odd_values(values) == ()
        values[0, 0, 0] = 1e12
        assert "a fill value, or damage" in odd_values(values)[0]
