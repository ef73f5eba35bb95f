"""Pairs, NRRD, MetaImage, .npy, PNG, JPEG and fastMRI files: values, places and what is refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medformer.data import ScanError, Volume, find_scans, read_volume
from medformer.data.fastmri import magnitude
from medformer.data.safe_xml import parse_xml

DATA = np.random.default_rng(0).integers(-1000, 2000, (4, 5, 6)).astype(np.int16)
AFFINE = np.array([[-2.0, 0.1, 0, 30], [0.05, 1.5, 0.2, -20], [0, -0.2, 3.0, 10], [0, 0, 0, 1]])


class TestPairs:
    @pytest.mark.parametrize("second", [False, True])
    @pytest.mark.parametrize("asked", ["a.hdr", "a.img"])
    def test_either_file_names_the_pair(self, tmp_path: Path, asked: str, second: bool) -> None:
        kind = nib.nifti2.Nifti2Pair if second else nib.Nifti1Pair
        nib.save(kind(DATA.T, AFFINE), tmp_path / "a.img")
        volume = read_volume(tmp_path / asked, canonical=False)
        np.testing.assert_array_equal(volume.voxels, DATA)
        np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
        assert [s.name for s in find_scans(tmp_path).scans] == ["a"]

    def test_a_lost_half_is_named(self, tmp_path: Path) -> None:
        nib.save(nib.Nifti1Pair(DATA.T, AFFINE), tmp_path / "a.img")
        (tmp_path / "a.img").unlink()
        with pytest.raises(ScanError, match=r"a\.hdr: header of a pair whose \.img file is not next to it"):
            read_volume(tmp_path / "a.hdr")

    def test_a_cut_image_is_refused(self, tmp_path: Path) -> None:
        nib.save(nib.Nifti1Pair(DATA.T, AFFINE), tmp_path / "a.img")
        (tmp_path / "a.img").write_bytes((tmp_path / "a.img").read_bytes()[:-1])
        with pytest.raises(ScanError, match="cut off"):
            read_volume(tmp_path / "a.hdr")


class TestGzip:
    def test_a_cut_4d_file_is_refused_though_the_frame_asked_for_is_whole(self, tmp_path: Path) -> None:
        frames = np.random.default_rng(0).integers(0, 1000, (8, 8, 8, 6)).astype(np.int16)
        nib.save(nib.Nifti1Image(frames, np.eye(4)), tmp_path / "a.nii.gz")
        np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz", frame=1).voxels, frames[..., 1].T)
        data = (tmp_path / "a.nii.gz").read_bytes()
        raw = gzip.decompress(data)
        for broken in (data[:-9], data[: len(data) // 2], gzip.compress(raw[:-100])):
            (tmp_path / "a.nii.gz").write_bytes(broken)
            with pytest.raises(ScanError, match="cut off"):
                read_volume(tmp_path / "a.nii.gz", frame=0)

    def test_an_altered_byte_fails_the_checksum(self, tmp_path: Path) -> None:
        nib.save(nib.Nifti1Image(DATA.T, AFFINE), tmp_path / "a.nii.gz")
        data = bytearray((tmp_path / "a.nii.gz").read_bytes())
        data[-6] ^= 1
        (tmp_path / "a.nii.gz").write_bytes(bytes(data))
        with pytest.raises(ScanError, match="damaged"):
            read_volume(tmp_path / "a.nii.gz")


class TestSaving:
    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    def test_mask_modality_units_and_notes_survive(self, tmp_path: Path, suffix: str) -> None:
        valid = np.random.default_rng(1).random(DATA.shape) > 0.2
        volume = Volume(
            voxels=DATA, affine=AFFINE, modality="PT", units="arbitrary", notes=("a note",), source="x", valid=valid,
            provenance={"tags": {"Manufacturer": "ACME"}},
        )  # fmt: skip
        again = read_volume(volume.save(tmp_path / f"a{suffix}"), canonical=False)
        np.testing.assert_array_equal(again.valid, valid)
        np.testing.assert_array_equal(again.voxels, DATA)
        assert (again.modality, again.units, again.notes) == ("PT", "arbitrary", ("a note",))
        assert again.provenance["tags"] == {"Manufacturer": "ACME"}
        turned = read_volume(tmp_path / f"a{suffix}")
        np.testing.assert_array_equal(turned.valid, volume.canonical().valid)
        np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / f"a{suffix}").dataobj), DATA.T)

    def test_a_damaged_note_is_passed_over_and_said(self, tmp_path: Path) -> None:
        volume = Volume(voxels=DATA, affine=AFFINE, modality="PT", units="arbitrary", notes=(), source="x")
        path = volume.save(tmp_path / "a.nii")
        path.write_bytes(path.read_bytes().replace(b'"modality"', b'"modalitx"'))
        assert "damaged" in read_volume(path).notes[0]


class TestItk:
    sitk = pytest.importorskip("SimpleITK")

    def image(self):
        image = self.sitk.GetImageFromArray(DATA)
        image.SetSpacing((0.7, 0.8, 2.5))
        image.SetOrigin((-10.0, 20.0, -30.0))
        image.SetDirection((0.0, 0.0, 1.0, -1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
        return image

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd"])
    def test_every_voxel_lies_where_itk_puts_it(self, tmp_path: Path, suffix: str, packed: bool) -> None:
        image = self.image()
        self.sitk.WriteImage(image, str(tmp_path / f"a{suffix}"), packed)
        volume = read_volume(tmp_path / f"a{suffix}", canonical=False)
        np.testing.assert_array_equal(volume.voxels, DATA)
        assert volume.voxels.dtype == np.int16
        for index in ((0, 0, 0), (5, 4, 3), (1, 2, 3)):
            there = np.array(image.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
            np.testing.assert_allclose((volume.affine @ [*index, 1])[:3], there, atol=1e-9)
        found = find_scans(tmp_path).scans
        assert [(s.name, s.kind, s.shape) for s in found] == [("a", "itk", (4, 5, 6))]

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd"])
    def test_every_cut_is_refused(self, tmp_path: Path, suffix: str, packed: bool) -> None:
        self.sitk.WriteImage(self.image(), str(tmp_path / f"a{suffix}"), packed)
        voxels = next((p for p in tmp_path.iterdir() if p.suffix in {".raw", ".zraw"}), tmp_path / f"a{suffix}")
        data = voxels.read_bytes()
        for kept in (0.99, 0.7, 0.4):
            voxels.write_bytes(data[: int(kept * len(data))])
            with pytest.raises(ScanError):
                read_volume(tmp_path / f"a{suffix}")

    @pytest.mark.parametrize("target", ["../secret.raw", "/etc/passwd", "LIST", "missing.raw"])
    def test_voxels_are_taken_from_beside_the_header_only(self, tmp_path: Path, target: str) -> None:
        (tmp_path / "secret.raw").write_bytes(bytes(240))
        (tmp_path / "sub").mkdir()
        self.sitk.WriteImage(self.image(), str(tmp_path / "sub" / "a.mhd"))
        text = (tmp_path / "sub" / "a.mhd").read_text().replace("a.raw", target)
        (tmp_path / "sub" / "a.mhd").write_text(text)
        with pytest.raises(ScanError, match=r"ElementDataFile|not here"):
            read_volume(tmp_path / "sub" / "a.mhd")

    def test_detached_and_oversized_nrrd_are_refused(self, tmp_path: Path) -> None:
        head = "NRRD0004\ntype: short\ndimension: 3\nsizes: {}\nencoding: raw\nendian: little\n{}\n"
        (tmp_path / "a.nrrd").write_text(head.format("4 5 6", "data file: /etc/passwd\n"))
        with pytest.raises(ScanError, match="other files"):
            read_volume(tmp_path / "a.nrrd")
        (tmp_path / "b.nrrd").write_text(head.format("40000 50000 60000", ""))
        with pytest.raises(ScanError, match="bytes declared"):
            read_volume(tmp_path / "b.nrrd")


class TestPlain:
    def test_npy_is_read_as_stored_and_has_no_place(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", DATA)
        volume = read_volume(tmp_path / "a.npy")
        np.testing.assert_array_equal(volume.voxels, DATA)
        assert (volume.geometry, volume.spacing_mm) == ("none", (1.0, 1.0, 1.0))
        np.save(tmp_path / "f.npy", np.asfortranarray(DATA.astype(">f8")))
        np.testing.assert_array_equal(read_volume(tmp_path / "f.npy").voxels, DATA.astype(np.float32))

    def test_objects_cuts_and_made_up_sizes_are_refused(self, tmp_path: Path) -> None:
        np.save(tmp_path / "o.npy", np.array([{"a": 1}, None]), allow_pickle=True)
        with pytest.raises(ScanError, match="pickled objects are never read"):
            read_volume(tmp_path / "o.npy")
        np.save(tmp_path / "a.npy", DATA)
        data = (tmp_path / "a.npy").read_bytes()
        (tmp_path / "a.npy").write_bytes(data[:-1])
        with pytest.raises(ScanError, match="cut off or made up"):
            read_volume(tmp_path / "a.npy")
        (tmp_path / "a.npy").write_bytes(data.replace(b"(4, 5, 6)", b"(4e9,5,6)"))
        with pytest.raises(ScanError):
            read_volume(tmp_path / "a.npy")

    @pytest.mark.parametrize(("dtype", "suffix"), [(np.uint8, ".png"), (np.uint16, ".png"), (np.uint8, ".jpg")])
    def test_pictures_keep_their_depth(self, tmp_path: Path, dtype: type, suffix: str) -> None:
        values = np.linspace(0, np.iinfo(dtype).max, 64 * 48).reshape(64, 48).astype(dtype)
        Image.fromarray(values).save(tmp_path / f"a{suffix}", **({"quality": 100} if suffix == ".jpg" else {}))
        voxels = read_volume(tmp_path / f"a{suffix}").voxels
        assert voxels.shape == (1, 64, 48)
        assert voxels.dtype == dtype
        np.testing.assert_allclose(voxels[0].astype(int), values.astype(int), atol=1 if suffix == ".jpg" else 0)

    def test_colour_pictures_are_refused_unless_grey_in_truth(self, tmp_path: Path) -> None:
        values = np.random.default_rng(0).integers(0, 256, (8, 9, 3)).astype(np.uint8)
        Image.fromarray(values).save(tmp_path / "a.png")
        with pytest.raises(ScanError, match="colour='grey'"):
            read_volume(tmp_path / "a.png")
        assert read_volume(tmp_path / "a.png", colour="grey").voxels.shape == (1, 8, 9)
        Image.fromarray(values[..., :1].repeat(3, -1)).save(tmp_path / "b.png")
        np.testing.assert_array_equal(read_volume(tmp_path / "b.png").voxels[0], values[..., 0])

    def test_cut_and_made_up_pictures_are_refused(self, tmp_path: Path) -> None:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)).save(tmp_path / "a.png")
        data = (tmp_path / "a.png").read_bytes()
        (tmp_path / "a.png").write_bytes(data[:-400])
        with pytest.raises(ScanError, match="cut off or damaged"):
            read_volume(tmp_path / "a.png")
        (tmp_path / "a.png").write_bytes(data[:16] + (2**16).to_bytes(4, "big") * 2 + data[24:])
        with pytest.raises(ScanError):
            read_volume(tmp_path / "a.png")


HEADER = """<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding><reconSpace>
<matrixSize><x>{x}</x><y>{y}</y><z>1</z></matrixSize><fieldOfView_mm><x>140</x><y>150</y><z>4.5</z></fieldOfView_mm>
</reconSpace></encoding></ismrmrdHeader>"""


class TestFastMri:
    h5py = pytest.importorskip("h5py")

    def write(
        self, path: Path, coils: int = 0, reconstruction: bool = False, header: str | None = HEADER
    ) -> np.ndarray:
        """k-space of known slices, 20 x 12 with the readout twice oversampled; the middle 10 x 12 is the image."""
        rng = np.random.default_rng(0)
        full = rng.random((3, 20, 12))
        sensitivity = np.ones((1, 1, 1, 1)) if not coils else rng.random((1, coils, 20, 12)) + 0.5
        sensitivity = sensitivity / np.sqrt((sensitivity**2).sum(1, keepdims=True))
        phase = np.exp(1j * rng.random(full.shape))
        kspace = (full * phase)[:, None] * sensitivity
        kspace = np.fft.ifftshift(kspace, axes=(-2, -1))
        kspace = np.fft.fftshift(np.fft.fft2(kspace, norm="ortho"), axes=(-2, -1)).astype(np.complex64)
        with self.h5py.File(path, "w") as file:
            file["kspace"] = kspace if coils else kspace[:, 0]
            if header is not None:
                file["ismrmrd_header"] = header.format(x=10, y=12).encode()
            if reconstruction:
                file["reconstruction_rss"] = (full[:, 5:15] * 2).astype(np.float32)
            file.attrs["patient_id"], file.attrs["acquisition"] = "secret-id", "CORPD_FBK"
        return full[:, 5:15]

    @pytest.mark.parametrize("coils", [0, 4])
    def test_k_space_becomes_the_magnitude_it_was_made_of(self, tmp_path: Path, coils: int) -> None:
        expected = self.write(tmp_path / "a.h5", coils)
        volume = read_volume(tmp_path / "a.h5")
        np.testing.assert_allclose(volume.voxels, expected, atol=1e-5)
        assert volume.spacing_mm == pytest.approx((4.5, 14.0, 12.5))
        assert (volume.modality, volume.geometry) == ("MR", "spacing")
        assert "secret" not in str(volume.provenance)
        (scan,) = find_scans(tmp_path).scans
        assert (scan.kind, scan.shape, scan.spacing_mm) == ("fastmri", (3, 10, 12), pytest.approx((4.5, 14.0, 12.5)))

    def test_the_reference_reconstruction_is_preferred(self, tmp_path: Path) -> None:
        expected = self.write(tmp_path / "a.h5", reconstruction=True)
        np.testing.assert_allclose(read_volume(tmp_path / "a.h5").voxels, 2 * expected, atol=1e-5)

    def test_without_header_there_is_no_spacing(self, tmp_path: Path) -> None:
        self.write(tmp_path / "a.h5", header=None)
        volume = read_volume(tmp_path / "a.h5")
        assert volume.geometry == "none"
        assert "no voxel size" in volume.notes[0]

    def test_external_data_entities_and_cuts_are_refused(self, tmp_path: Path) -> None:
        self.write(tmp_path / "a.h5", header='<!DOCTYPE x [<!ENTITY a "b">]><ismrmrdHeader>&a;</ismrmrdHeader>')
        with pytest.raises(ScanError, match="entities"):
            read_volume(tmp_path / "a.h5")
        self.write(tmp_path / "b.h5")
        with self.h5py.File(tmp_path / "c.h5", "w") as file:
            file["kspace"] = self.h5py.ExternalLink("b.h5", "/kspace")
        with pytest.raises(ScanError, match="kspace"):
            read_volume(tmp_path / "c.h5")
        data = (tmp_path / "b.h5").read_bytes()
        (tmp_path / "b.h5").write_bytes(data[: len(data) // 2])
        with pytest.raises(ScanError):
            read_volume(tmp_path / "b.h5")

    def test_magnitude_crops_around_the_middle(self) -> None:
        kspace = np.zeros((1, 9, 8), np.complex64)
        kspace[0, 4, 4] = 1
        assert magnitude(kspace, (5, 4)).shape == (1, 5, 4)
        np.testing.assert_allclose(magnitude(kspace, (99, 99)), 1 / np.sqrt(72), rtol=1e-6)


def test_xml_entities_are_refused_in_any_encoding() -> None:
    for encoding in ("utf-8", "utf-16"):
        text = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'
        with pytest.raises(ScanError, match="document type or entities"):
            parse_xml(text.encode(encoding), "x")
    with pytest.raises(ScanError, match="does not parse"):
        parse_xml(b"<a>", "x")
    assert parse_xml(b'<a xmlns="u"><b/></a>', "x")[0].tag == "b"
