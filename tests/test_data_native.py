"""Compressed streams against their headers, and the child process that decodes them."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import UID, JPEG2000Lossless, JPEGLSLossless

from medformer.data import ScanError, native, read_volume
from tests.dicom_files import write_slice

VALUES = np.random.default_rng(0).integers(0, 60000, (64, 64)).astype(np.uint16)


def j2k(values: np.ndarray = VALUES) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "JPEG2000", no_jp2=True)
    return stream.getvalue()


def compressed(path: Path, stream: bytes, syntax: UID = JPEG2000Lossless, **tags: object) -> Path:
    write_slice(path, 0, np.zeros(3))
    ds = pydicom.dcmread(path)
    ds.Rows = ds.Columns = 64
    ds.BitsStored, ds.HighBit, ds.RescaleIntercept = 16, 15, 0
    for tag, value in tags.items():
        setattr(ds, tag, value)
    ds.file_meta.TransferSyntaxUID, ds.PixelData = syntax, encapsulate([stream])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.save_as(path)
    return path


class TestStream:
    pytest.importorskip("openjpeg", reason="needs pylibjpeg-openjpeg")

    def read(self, path: Path) -> tuple[np.ndarray, str]:
        volume = read_volume(path, canonical=False)
        return volume.voxels[0], " ".join(volume.notes)

    @pytest.mark.parametrize("stored", [10, 12, 15])
    def test_more_bits_than_stored_are_kept_and_noted(self, tmp_path: Path, stored: int) -> None:
        values, notes = self.read(compressed(tmp_path / "a.dcm", j2k(), BitsStored=stored, HighBit=stored - 1))
        np.testing.assert_array_equal(values, VALUES)
        assert f"16 bits, BitsStored says {stored}: stream believed" in notes

    def test_values_that_fit_need_no_note(self, tmp_path: Path) -> None:
        path = compressed(tmp_path / "a.dcm", j2k(VALUES & 0xFFF), BitsStored=12, HighBit=11, SliceThickness=2)
        values, notes = self.read(path)
        np.testing.assert_array_equal(values, VALUES & 0xFFF)
        assert "believed" not in notes

    def test_an_overlay_in_the_unused_bits_is_masked(self, tmp_path: Path) -> None:
        path = compressed(tmp_path / "a.dcm", j2k(), BitsStored=12, HighBit=11)
        ds = pydicom.dcmread(path)
        ds.add_new((0x6000, 0x0102), "US", 15)
        ds.save_as(path)
        values, notes = self.read(path)
        np.testing.assert_array_equal(values, VALUES & 0xFFF)
        assert "masked off" in notes

    @pytest.mark.parametrize("padding", [b"\0" * 40, b"\xff" * 30, b"junk" * 100])
    def test_padding_behind_the_end_marker_is_no_damage(self, tmp_path: Path, padding: bytes) -> None:
        np.testing.assert_array_equal(self.read(compressed(tmp_path / "a.dcm", j2k() + padding))[0], VALUES)

    @pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
    def test_a_cut_stream_is_refused(self, tmp_path: Path, kept: float) -> None:
        stream = j2k()
        with pytest.raises(ScanError, match="end marker"):
            read_volume(compressed(tmp_path / "a.dcm", stream[: int(kept * len(stream))] + b"\0" * 40))

    def test_the_coding_of_the_stream_outranks_the_transfer_syntax(self, tmp_path: Path) -> None:
        pytest.importorskip("jpeg_ls")
        values, notes = self.read(compressed(tmp_path / "a.dcm", j2k(), JPEGLSLossless))
        np.testing.assert_array_equal(values, VALUES)
        assert "coded as JPEG 2000, the transfer syntax says JPEG-LS" in notes

    @pytest.mark.parametrize(("tag", "value"), [("Rows", 32), ("SamplesPerPixel", 3), ("Columns", 65)])
    def test_a_size_that_contradicts_the_stream_is_refused(self, tmp_path: Path, tag: str, value: int) -> None:
        colour = {"PhotometricInterpretation": "RGB", "PlanarConfiguration": 0} if value == 3 else {}
        with pytest.raises(ScanError, match="compressed image"):
            read_volume(compressed(tmp_path / "a.dcm", j2k(), **{tag: value}, **colour), colour="grey")


class TestHighBit:
    def write(self, path: Path, values: np.ndarray, **tags: int) -> Path:
        write_slice(path, 0, np.zeros(3))
        ds = pydicom.dcmread(path)
        for tag, value in tags.items():
            setattr(ds, tag, value)
        ds.Rows, ds.Columns, ds.PixelData = *values.shape, values.tobytes()
        ds.RescaleIntercept = 0
        ds.save_as(path)
        return path

    @pytest.mark.parametrize("high", [0, 7, 15])
    def test_another_high_bit_is_noted_where_the_values_fit(self, tmp_path: Path, high: int) -> None:
        values = VALUES & 0xFFF
        volume = read_volume(self.write(tmp_path / "a.dcm", values, HighBit=high), canonical=False)
        np.testing.assert_array_equal(volume.voxels[0], values)
        assert f"HighBit {high} with BitsStored 12: taken as 11" in volume.notes

    def test_values_at_the_other_end_of_the_word_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ScanError, match="BitsStored 12 and HighBit 15 contradict"):
            read_volume(self.write(tmp_path / "a.dcm", (VALUES & 0xFFF) << 4, HighBit=15))

    def test_signed_values_keep_their_sign(self, tmp_path: Path) -> None:
        values = np.arange(-2048, 2048, dtype=np.int16).reshape(64, 64)
        volume = read_volume(self.write(tmp_path / "a.dcm", values, HighBit=15, PixelRepresentation=1), canonical=False)
        np.testing.assert_array_equal(volume.voxels[0], values)


def _pid() -> int:
    assert native._child is not None
    return native._child.process.pid


def _in_a_fork(path: Path, other: int, answer: multiprocessing.SimpleQueue) -> None:
    equal = bool((read_volume(path, canonical=False).voxels[0] == VALUES).all())
    answer.put((equal, _pid() != other))


class TestChild:
    pytest.importorskip("openjpeg", reason="needs pylibjpeg-openjpeg")

    def test_one_child_is_kept(self, tmp_path: Path) -> None:
        path = compressed(tmp_path / "a.dcm", j2k())
        read_volume(path)
        first = _pid()
        read_volume(path)
        assert _pid() == first

    @pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
    def test_a_crash_is_the_refusal_of_one_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
    ) -> None:
        path = compressed(tmp_path / "a.dcm", j2k())
        read_volume(path)
        send = native._Child.send

        def crash(self: native._Child, *request: object) -> None:
            os.kill(self.process.pid, number)
            self.process.wait()
            send(self, *request)

        with monkeypatch.context() as patch:
            patch.setattr(native._Child, "send", crash)
            with pytest.raises(ScanError, match=rf"a\.dcm: the library that decodes it crashed \({number.name}\)"):
                read_volume(path)
        np.testing.assert_array_equal(read_volume(path, canonical=False).voxels[0], VALUES)

    def test_a_child_that_was_killed_between_two_files_is_replaced(self, tmp_path: Path) -> None:
        path = compressed(tmp_path / "a.dcm", j2k())
        read_volume(path)
        os.kill(_pid(), signal.SIGKILL)
        time.sleep(0.2)
        np.testing.assert_array_equal(read_volume(path, canonical=False).voxels[0], VALUES)

    def test_a_hang_ends_in_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = compressed(tmp_path / "a.dcm", j2k())
        read_volume(path)
        os.kill(_pid(), signal.SIGSTOP)
        monkeypatch.setattr(native, "_SECONDS", 0.5)
        with pytest.raises(ScanError, match=r"more than 1 s to decode|more than 0 s to decode"):
            read_volume(path)

    @pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="address space is limited on Linux only")
    def test_memory_has_a_limit(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        read_volume(compressed(tmp_path / "small.dcm", j2k()))  # imports are done
        values = np.random.default_rng(1).integers(0, 4000, (1024, 1024)).astype(np.uint16)
        path = compressed(tmp_path / "a.dcm", j2k(values), Rows=1024, Columns=1024)
        # What `call` is asked for is 3 x 4 and 40 bytes a voxel: one byte more than now is left.
        monkeypatch.setattr(native, "_MEMORY", 1 - 52 * values.size)
        with pytest.raises(ScanError, match=r"a\.dcm: (to decode it|pixels do not decode|the library)"):
            read_volume(path)
        monkeypatch.undo()
        np.testing.assert_array_equal(read_volume(path, canonical=False).voxels[0], values)

    def test_a_forked_worker_has_a_child_of_its_own(self, tmp_path: Path) -> None:
        path = compressed(tmp_path / "a.dcm", j2k())
        read_volume(path)
        context = multiprocessing.get_context("fork")
        answer = context.SimpleQueue()
        worker = context.Process(target=_in_a_fork, args=(path, _pid(), answer), daemon=True)
        worker.start()
        assert answer.get() == (True, True)
        worker.join()
        np.testing.assert_array_equal(read_volume(path, canonical=False).voxels[0], VALUES)

    def test_an_image_that_takes_memory_of_its_own_is_whole_and_nobody_elses(self, tmp_path: Path) -> None:
        values = np.random.default_rng(1).integers(0, 60000, (1600, 1700)).astype(np.uint16)
        assert values.nbytes > native._SMALL
        path = compressed(tmp_path / "a.dcm", j2k(values), Rows=1600, Columns=1700)
        first, second = (read_volume(path, canonical=False).voxels[0] for _ in range(2))
        first[:] = 0
        np.testing.assert_array_equal(second, values)
        assert path.stat().st_size > native._SMALL  # and so does the request
        np.testing.assert_array_equal(
            read_volume(compressed(tmp_path / "b.dcm", j2k()), canonical=False).voxels[0], VALUES
        )

    def test_children_and_their_memory_are_let_go(self, tmp_path: Path) -> None:
        path = compressed(tmp_path / "a.dcm", j2k())
        read_volume(path)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            os.kill(_pid(), signal.SIGKILL)
            time.sleep(0.1)
            read_volume(path)
        assert len(os.listdir("/proc/self/fd")) == before


class TestHdf5:
    h5py = pytest.importorskip("h5py")
    VALUES = np.random.default_rng(0).random((30, 200, 256), dtype=np.float32)

    @pytest.mark.parametrize(
        "options",
        [{}, {"chunks": (1, 200, 256)}, {"compression": "gzip"}, {"dtype": ">f4"}, {"dtype": "<f8"}, {"dtype": "<f2"}],
        ids=str,
    )
    def test_bytes_that_lie_as_they_are_and_others_are_read_alike(self, tmp_path: Path, options: dict) -> None:
        with self.h5py.File(tmp_path / "a.h5", "w", userblock_size=0) as file:
            file.create_dataset("reconstruction_esc", data=self.VALUES, **options)
        expected = self.VALUES.astype(options.get("dtype", "<f4")).astype(np.float32)
        np.testing.assert_array_equal(read_volume(tmp_path / "a.h5", canonical=False).voxels, expected)

    def test_a_user_block_in_front_moves_nothing(self, tmp_path: Path) -> None:
        with self.h5py.File(tmp_path / "a.h5", "w", userblock_size=512) as file:
            file["reconstruction_esc"] = self.VALUES
        with self.h5py.File(tmp_path / "a.h5") as file:
            assert file.userblock_size == 512
        seen = native.call(
            "a.h5", "hdf5_read", {"path": str(tmp_path / "a.h5"), "key": "reconstruction_esc", "dtype": "<f4"},
            most=self.VALUES.nbytes,
        )[1]  # fmt: skip
        np.testing.assert_array_equal(seen, self.VALUES)

    def test_a_file_cut_inside_its_array_is_refused(self, tmp_path: Path) -> None:
        with self.h5py.File(tmp_path / "a.h5", "w") as file:
            file["reconstruction_esc"] = self.VALUES
        content = (tmp_path / "a.h5").read_bytes()
        (tmp_path / "a.h5").write_bytes(content[: len(content) // 2])
        with pytest.raises(ScanError, match="cut off"):
            read_volume(tmp_path / "a.h5")

    @pytest.mark.filterwarnings("error")
    def test_k_space_whose_magnitude_overflows_is_refused(self, tmp_path: Path) -> None:
        values = np.ones((2, 8, 6), np.complex64)
        values[0, 0, 0] = 1e30
        with self.h5py.File(tmp_path / "a.h5", "w") as file:
            file["kspace"] = values
        with pytest.raises(ScanError, match="NaN or infinite"):
            read_volume(tmp_path / "a.h5")
