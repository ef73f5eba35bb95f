"""X-rays, mammograms, tomosynthesis and colour: laterality, windows, inversion and flips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence

from medformer.data import ScanError, find_scans, read_volume
from tests.dicom_files import Edit, image, write_slice

NO_PLACE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")


def write_image(path: Path, pixels: np.ndarray, modality: str = "DX", edit: Edit | None = None) -> Path:
    def change(i: int, ds: FileDataset) -> None:
        for tag in (*NO_PLACE, "RescaleSlope", "RescaleIntercept", "RescaleType"):
            delattr(ds, tag)
        ds.Modality, ds.ImageType = modality, ["ORIGINAL", "PRIMARY"]
        ds.Rows, ds.Columns = pixels.shape[-3:-1] if pixels.shape[-1] == 3 else pixels.shape[-2:]
        ds.PixelData = np.ascontiguousarray(pixels).tobytes()
        if edit is not None:
            edit(i, ds)

    write_slice(path, 0, np.zeros(3), edit=change)
    return path


class TestXRay:
    def test_without_any_spacing_voxels_count_as_one_and_say_so(self, tmp_path: Path) -> None:
        volume = read_volume(write_image(tmp_path / "a.dcm", image(0)))
        np.testing.assert_array_equal(volume.voxels, image(0)[None])
        assert (volume.geometry, volume.modality, volume.units) == ("none", "DX", "arbitrary")
        assert volume.notes == ("no voxel size in the header",)

    def test_detector_spacing_is_brought_to_the_patient(self, tmp_path: Path) -> None:
        def edit(_: int, ds: FileDataset) -> None:
            ds.ImagerPixelSpacing, ds.EstimatedRadiographicMagnificationFactor = [0.2, 0.1], 1.25

        volume = read_volume(write_image(tmp_path / "a.dcm", image(0), edit=edit))
        assert volume.spacing_mm[1:] == pytest.approx((0.16, 0.08))
        assert volume.geometry == "spacing"
        assert "ImagerPixelSpacing / magnification 1.25" in volume.notes[0]

    @pytest.mark.parametrize("signed", [False, True])
    def test_monochrome1_is_inverted_over_the_stored_range(self, tmp_path: Path, signed: bool) -> None:
        pixels = (image(0).astype(np.int16) - (1500 if signed else 0)).astype(np.int16)

        def edit(_: int, ds: FileDataset) -> None:
            ds.PhotometricInterpretation, ds.PixelRepresentation = "MONOCHROME1", int(signed)
            ds.PixelData = (pixels.view(np.uint16) & 0x0FFF).tobytes()

        volume = read_volume(write_image(tmp_path / "a.dcm", pixels, edit=edit))
        np.testing.assert_array_equal(volume.voxels[0].astype(int), (-1 if signed else 4095) - pixels.astype(int))
        assert "MONOCHROME1 inverted over the stored range" in volume.notes

    @pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
    def test_windows_follow_the_standard(self, tmp_path: Path, function: str) -> None:
        centre, width = 1014.0, 11.0

        def edit(_: int, ds: FileDataset) -> None:
            ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = [centre, 5.0], [width, 9.0], function

        shown = read_volume(write_image(tmp_path / "a.dcm", image(0), edit=edit), voi=True).voxels[0]
        x = image(0).astype(float)
        expected = {
            "LINEAR": np.clip((x - (centre - 0.5)) / (width - 1) + 0.5, 0, 1),
            "LINEAR_EXACT": np.clip((x - centre) / width + 0.5, 0, 1),
            "SIGMOID": 1 / (1 + np.exp(-4 * (x - centre) / width)),
        }[function]
        np.testing.assert_allclose(shown, expected, atol=1e-6)

    def test_a_table_of_display_values_is_applied_before_the_inversion(self, tmp_path: Path) -> None:
        table = (np.arange(4096) ** 2 // 4096).astype(np.uint16)

        def edit(_: int, ds: FileDataset) -> None:
            item = Dataset()
            item.add_new("LUTDescriptor", "US", [4096, 0, 12])
            item.add_new("LUTData", "OW", table.tobytes())
            ds.VOILUTSequence, ds.PhotometricInterpretation = Sequence([item]), "MONOCHROME1"

        shown = read_volume(write_image(tmp_path / "a.dcm", image(0), edit=edit), voi=True).voxels[0]
        np.testing.assert_allclose(shown, 1 - table[image(0)] / 4095, atol=1e-6)

    def test_padding_is_masked_before_any_statistics(self, tmp_path: Path) -> None:
        def edit(_: int, ds: FileDataset) -> None:
            ds.PixelPaddingValue, ds.PixelPaddingRangeLimit = 1000, 1009

        path = write_image(tmp_path / "a.dcm", image(0), edit=edit)
        volume = read_volume(path)
        assert volume.valid is not None
        np.testing.assert_array_equal(~volume.valid[0], image(0) <= 1009)
        shown = read_volume(path, voi=True).voxels[0]
        assert shown[image(0) == 1010] == 0  # the darkest measured value, not the padding, is black

    def test_images_are_indexed_on_request_only(self, tmp_path: Path) -> None:
        write_image(tmp_path / "a.dcm", image(0))
        with pytest.raises(ScanError, match=r"a 2D image \(DX\)"):
            find_scans(tmp_path)
        (scan,) = find_scans(tmp_path, images=True).scans
        assert (scan.name, scan.kind, scan.shape, scan.spacing_mm) == ("a", "image", (1, 6, 5), None)
        np.testing.assert_array_equal(scan.read().voxels, read_volume(tmp_path).voxels)


def breast(side: str, top: str = "up") -> np.ndarray:
    """Tissue against one side, an axilla in the upper corner."""
    rows, columns = np.indices((40, 30))
    picture = np.where((columns / 18) ** 2 + ((rows - 22) / 16) ** 2 < 1, 900, 10)
    picture[:6, :8] = 500
    picture = picture[:, ::-1] if side == "right" else picture
    return (picture[::-1] if top == "down" else picture).astype(np.uint16)


class TestMammography:
    @pytest.mark.parametrize(
        ("side", "top", "orientation", "laterality"),
        [
            ("left", "up", ["A", "F"], "L"),
            ("right", "up", ["P", "F"], "R"),
            ("left", "down", ["A", "H"], "L"),
            ("right", "down", ["P", "H"], "R"),
            ("right", "up", ["P", "L"], "R"),
            ("left", "up", ["A", "R"], "L"),
            ("left", "down", ["A", "L"], "L"),
            ("right", "up", ["P", "FR"], "R"),
            ("right", "up", None, "R"),
            ("right", "up", ["A", "F"], "R"),  # wrong in the header: the tissue is believed
        ],
    )
    def test_every_picture_ends_with_the_chest_wall_left_and_the_axilla_up(
        self, tmp_path: Path, side: str, top: str, orientation: list[str] | None, laterality: str
    ) -> None:
        def edit(_: int, ds: FileDataset) -> None:
            ds.ImageLaterality = laterality
            if orientation is not None:
                ds.PatientOrientation = orientation

        path = write_image(tmp_path / "a.dcm", breast(side, top), "MG", edit)
        volume = read_volume(path)
        np.testing.assert_array_equal(volume.voxels[0], breast("left"))
        np.testing.assert_array_equal(read_volume(path, canonical=False).voxels[0], breast(side, top))
        assert volume.provenance["tags"]["laterality"] == laterality
        assert any("flipped" in note for note in volume.notes) == ((side, top) != ("left", "up"))

    def test_padding_is_flipped_along(self, tmp_path: Path) -> None:
        def edit(_: int, ds: FileDataset) -> None:
            ds.PatientOrientation, ds.PixelPaddingValue = ["P", "F"], 10

        volume = read_volume(write_image(tmp_path / "a.dcm", breast("right"), "MG", edit))
        assert volume.valid is not None
        np.testing.assert_array_equal(volume.valid[0], breast("left") != 10)

    @pytest.mark.parametrize(
        ("code", "position", "view"),
        [
            ("399162004", None, "CC"), ("R-10226", None, "MLO"), ("399368009", "CC", "MLO"), (None, "ML", "ML"),
            ("unknown", "LMO", "LMO"), (None, None, None),
        ],
    )  # fmt: skip
    def test_view_comes_from_its_code_then_from_its_name(
        self, tmp_path: Path, code: str | None, position: str | None, view: str | None
    ) -> None:
        def edit(_: int, ds: FileDataset) -> None:
            if code is not None:
                item = Dataset()
                item.CodeValue, item.CodingSchemeDesignator = code, "SCT"
                ds.ViewCodeSequence = Sequence([item])
            if position is not None:
                ds.ViewPosition = position

        tags = read_volume(write_image(tmp_path / "a.dcm", breast("left"), "MG", edit)).provenance["tags"]
        assert tags.get("view") == view

    def test_what_a_reader_must_know_is_noted(self, tmp_path: Path) -> None:
        def edit(_: int, ds: FileDataset) -> None:
            ds.PresentationIntentType, ds.BreastImplantPresent, ds.BurnedInAnnotation = "FOR PROCESSING", "YES", "YES"

        notes = " ".join(read_volume(write_image(tmp_path / "a.dcm", breast("left"), "MG", edit)).notes)
        assert all(word in notes for word in ("raw detector values", "implant", "BurnedInAnnotation"))

    def test_tomosynthesis_without_places_is_stacked_by_its_own_spacing(self, tmp_path: Path) -> None:
        frames = np.stack([breast("right") + i for i in range(4)])

        def edit(_: int, ds: FileDataset) -> None:
            ds.SOPClassUID, ds.NumberOfFrames = "1.2.840.10008.5.1.4.1.1.13.1.3", 4
            ds.PatientOrientation, ds.PixelSpacing, ds.SpacingBetweenSlices = ["P", "F"], [0.1, 0.1], 1.5

        volume = read_volume(write_image(tmp_path / "a.dcm", frames, "MG", edit))
        np.testing.assert_array_equal(volume.voxels, np.stack([breast("left") + i for i in range(4)]))
        assert volume.spacing_mm == pytest.approx((1.5, 0.1, 0.1))
        assert "4 frames stacked 1.5 mm apart" in volume.notes

    def test_laterality_of_tomosynthesis_is_in_its_frames(self, tmp_path: Path) -> None:
        def edit(_: int, ds: FileDataset) -> None:
            anatomy, shared = Dataset(), Dataset()
            anatomy.FrameLaterality = "R"
            shared.FrameAnatomySequence = Sequence([anatomy])
            place, plane, size = Dataset(), Dataset(), Dataset()
            place.ImagePositionPatient, size.PixelSpacing = [0, 0, 0], [0.1, 0.1]
            plane.ImageOrientationPatient = [0, -1, 0, 0, 0, -1]
            shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([plane]), Sequence([size])
            ds.SharedFunctionalGroupsSequence = Sequence([shared])
            groups = []
            for i in range(2):
                group, place = Dataset(), Dataset()
                place.ImagePositionPatient = [float(i), 0, 0]
                group.PlanePositionSequence = Sequence([place])
                groups.append(group)
            ds.PerFrameFunctionalGroupsSequence, ds.NumberOfFrames = Sequence(groups), 2

        volume = read_volume(write_image(tmp_path / "a.dcm", np.stack([breast("left")] * 2), "MG", edit))
        assert volume.geometry == "patient"
        assert volume.spacing_mm == pytest.approx((0.1, 0.1, 1.0))
        assert volume.provenance["tags"]["laterality"] == "R"


class TestColour:
    def rgb(self, grey: bool) -> np.ndarray:
        values = np.random.default_rng(0).integers(0, 256, (6, 5, 3)).astype(np.uint8)
        return values[..., :1].repeat(3, -1) if grey else values

    def write(self, path: Path, grey: bool) -> Path:
        def edit(_: int, ds: FileDataset) -> None:
            ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
            ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7

        return write_image(path, self.rgb(grey), "US", edit)

    def test_colour_is_refused_or_weighed_on_request(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a.dcm", grey=False)
        with pytest.raises(ScanError, match="colour='grey'"):
            read_volume(path)
        volume = read_volume(path, colour="grey")
        expected = np.round(self.rgb(False) @ np.array([0.299, 0.587, 0.114]))
        np.testing.assert_array_equal(volume.voxels[0], expected)
        assert any("BT.601" in note for note in volume.notes)

    def test_grey_stored_as_colour_is_kept_exactly(self, tmp_path: Path) -> None:
        volume = read_volume(self.write(tmp_path / "a.dcm", grey=True))
        np.testing.assert_array_equal(volume.voxels[0], self.rgb(True)[..., 0])

    @pytest.mark.parametrize("name", ["examples_palette", "examples_ybr_color", "SC_ybr_full_422_uncompressed"])
    def test_other_colour_spaces_are_refused_by_name(self, name: str) -> None:
        source = get_testdata_file(f"{name}.dcm", download=False)
        if source is None:
            pytest.skip(f"pydicom ships no {name} here")
        with pytest.raises(ScanError, match=name):
            read_volume(str(source))

    def test_palette_agrees_with_its_table(self, tmp_path: Path) -> None:
        palette = np.array([[0, 0, 0], [255, 0, 0], [10, 200, 30], [7, 7, 7]], np.uint8)
        codes = np.random.default_rng(0).integers(0, 4, (6, 5)).astype(np.uint8)

        def edit(_: int, ds: FileDataset) -> None:
            ds.PhotometricInterpretation, ds.BitsAllocated, ds.BitsStored, ds.HighBit = "PALETTE COLOR", 8, 8, 7
            for channel, name in enumerate(("Red", "Green", "Blue")):
                ds.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [4, 0, 8])
                ds.add_new(f"{name}PaletteColorLookupTableData", "OW", palette[:, channel].tobytes())

        volume = read_volume(write_image(tmp_path / "a.dcm", codes, "US", edit), colour="grey")
        np.testing.assert_array_equal(volume.voxels[0], np.round(palette[codes] @ np.array([0.299, 0.587, 0.114])))
