"""Corrupted files of every format: no crash, no hang, nothing but a finite volume or a refusal of one line.

    python benchmarks/fuzz_readers.py [--count 10000] [--formats nii,mha] [--seed 0]

Each file is a sound one with one to eight changes: bytes, cuts, inserted bytes, and numbers of its header set to NaN,
infinity, 0, negative and huge values. Counted: volumes, refusals; exceptions other than ScanError, files that take more
than 10 s, voxels or affines that are not finite. Warnings are errors. The process that reads is a child, so that a
crash is counted and the next file goes on.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import nibabel as nib
import numpy as np

SLOW_S, HANG_S = 10.0, 120.0
# What a native library did in its own process, which the reader turned into a refusal.
_CONTAINED = ("crash of the library, contained", "hang of the library, stopped")
DATA = np.random.default_rng(0).integers(-900, 900, (4, 5, 6)).astype(np.int16)
NUMBERS = ("nan", "inf", "-inf", "-1", "0", "1e300", "-1e300", "1e-300", "99999999999", "5000", "0.5")


def _nifti(path: Path) -> None:
    nib.save(nib.Nifti1Image(DATA.T, np.diag([1, 2, 3, 1.0])), path)


def _nifti2(path: Path) -> None:
    nib.save(nib.Nifti2Image(DATA.T, np.diag([1, 2, 3, 1.0])), path)


def _itk(path: Path) -> None:
    meta = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
        "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 1 2 3\nElementSpacing = 1 2 3\nDimSize = 6 5 4\n"
        "ElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    nrrd = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 6 5 4\n"
        "space directions: (1,0,0) (0,2,0) (0,0,3)\nkinds: domain domain domain\nendian: little\nencoding: raw\n"
        "space origin: (1,2,3)\n\n"
    )
    head = meta if path.suffix == ".mha" else nrrd
    path.write_bytes(head.encode() + DATA.tobytes())


def _dicom(path: Path) -> None:
    from tests.dicom_files import write_slice

    write_slice(path, 0, np.zeros(3))


def _enhanced(path: Path) -> None:
    from tests.dicom_files import write_enhanced

    write_enhanced(path, [0, 2, 4])


def _j2k(path: Path) -> None:
    import pydicom
    from PIL import Image
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEG2000Lossless

    from tests.dicom_files import write_slice

    write_slice(path, 0, np.zeros(3))
    ds, stream = pydicom.dcmread(path), io.BytesIO()
    values = np.random.default_rng(0).integers(0, 4000, (64, 64)).astype(np.uint16)
    Image.fromarray(values).save(stream, "JPEG2000", no_jp2=True)
    ds.Rows = ds.Columns = 64
    ds.file_meta.TransferSyntaxUID, ds.PixelData = JPEG2000Lossless, encapsulate([stream.getvalue()])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.save_as(path)


def _hdf5(path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file["kspace"] = np.zeros((2, 8, 6), np.complex64)
        file["reconstruction_esc"] = np.ones((2, 4, 4), np.float32)
        file.attrs["acquisition"] = "AXT2"


def _npy(path: Path) -> None:
    np.save(path, DATA)


def _picture(path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)).save(path)


MAKERS: dict[str, Callable[[Path], None]] = {
    "nii": _nifti, "nii.gz": _nifti, "nii2.nii": _nifti2, "mha": _itk, "nrrd": _itk, "dcm": _dicom,
    "enh.dcm": _enhanced, "j2k.dcm": _j2k, "h5": _hdf5, "npy": _npy, "png": _picture, "jpg": _picture,
}  # fmt: skip


def corrupt(content: bytes, text: bool, draw: random.Random) -> bytes:
    """One to eight changes; text headers also get numbers that are none."""
    out = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        if not out:
            break
        at = draw.randrange(min(len(out), 800) if draw.random() < 0.6 else len(out))
        match draw.randrange(7):
            case 0:
                del out[at:]
            case 1:
                out[at:at] = draw.randbytes(draw.randint(1, 40))
            case 2:
                out[at : at + 4] = struct.pack("<f", draw.choice([np.nan, np.inf, -np.inf, -1.0, 3e38, 0.0, 1e-40]))
            case 3:
                out[at : at + 4] = struct.pack("<i", draw.choice([-1, 0, 2**31 - 1, -(2**31), 65535, 5000]))
            case 4 if text:
                head = bytes(out[:600]).split(b" ")
                head[draw.randrange(len(head))] = draw.choice(NUMBERS).encode()
                out[:600] = b" ".join(head)
            case _:
                out[at] = draw.randrange(256)
    return bytes(out)


def _reader(pipe: Connection) -> None:
    """Read what is asked for and answer with a word."""
    import warnings

    from medformer.data import ScanError, read_volume

    warnings.simplefilter("error")
    pipe.send("ready")
    while (path := pipe.recv()) is not None:
        start = time.perf_counter()
        try:
            volume = read_volume(path)
            finite = bool(np.isfinite(volume.affine).all() and np.isfinite(volume.voxels).all())
            word = "volume" if finite and volume.voxels.nbytes < 2**28 else "WRONG: not finite, or too large"
        except ScanError as error:
            word = "refused" if "\n" not in str(error) and "please report" not in str(error) else f"UNFORESEEN: {error}"
            word = _CONTAINED[0] if "crashed" in str(error) else _CONTAINED[1] if "was stopped" in str(error) else word
        except BaseException as error:
            word = f"EXCEPTION: {type(error).__name__}: {error}"
        pipe.send((word, time.perf_counter() - start))


class Reader:
    """A process that may die."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_reader, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.pipe.recv()  # imports are not the file's

    def ask(self, path: Path) -> tuple[str, float]:
        self.pipe.send(str(path))
        if not self.pipe.poll(HANG_S):
            self.process.kill()
            return "HANG", HANG_S
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            return f"CRASH ({self.process.exitcode})", 0.0


def main(arguments: list[str] | None = None) -> int:
    """1 where anything but volumes and refusals came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="corrupted files of each format")
    parser.add_argument("--formats", default=",".join(MAKERS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    reader, bad = Reader(), 0
    for name in args.formats.split(","):
        count: Counter[str] = Counter()
        slowest, draw = 0.0, random.Random(f"{args.seed} {name}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / (f"a.{name}" if "." not in name or name == "nii.gz" else f"a.{name.split('.')[-1]}")
            MAKERS[name](path)
            content = path.read_bytes()
            for number in range(args.count):
                path.write_bytes(corrupt(content, name in {"mha", "nrrd", "npy"}, draw))
                word, seconds = reader.ask(path)
                slowest = max(slowest, seconds)
                word = "SLOW" if seconds > SLOW_S and word in {"volume", "refused"} else word
                count[word] += 1
                if word.startswith(("CRASH (", "HANG")):
                    reader = Reader()
                if word not in {"volume", "refused", *_CONTAINED}:
                    bad += 1
                    print(f"{name} file {number} of seed {args.seed}: {word}", flush=True)
        print(f"{name}: {args.count} files, slowest {slowest:.2f} s: {dict(count)}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
