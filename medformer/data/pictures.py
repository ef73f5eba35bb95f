"""PNG, JPEG, TIFF and BMP files as grey values: one reader for training, evaluation, page and server.

Depth: 8 bits stay uint8, 16 bits uint16; other integers of a TIFF stay int32, its floats float32; 1 bit is 0 and 255.
Colour: ITU-R BT.601 luma in the integers of Pillow's "L", at any depth; palettes, CMYK and YCbCr become RGB first.
Opacity: ignored, the stored values stay. Orientation: EXIF's is applied. Colour profiles and gamma are not.
Pages: each page of a TIFF is a picture, named `file.tif#1`, `file.tif#2`, ...; thumbnails and masks are left out.
"""

from __future__ import annotations

import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from medformer.data.geometry import ScanError

__all__ = [
    "SUFFIXES", "find_pictures", "grey_array", "grey_of", "is_picture", "luma", "pages_of", "picture_files",
    "picture_size", "read_mask", "read_picture", "sniff_picture", "split_page", "unsuffixed",
]  # fmt: skip

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
# Always named: Pillow's other readers may start programs (Ghostscript for PostScript, whatever the file is called).
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"II*\0": "tiff", b"MM\0*": "tiff", b"II+\0": "tiff",
    b"MM\0+": "tiff",
}  # fmt: skip
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # bytes
_MAX_PIXELS = 2**28
_LUMA = np.array([19595, 38470, 7471])  # of 65536: 0.299, 0.587, 0.114 as Pillow rounds them
# What Pillow raises on damage (found by altering bytes).
_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError,
    RuntimeError, MemoryError, EOFError, struct.error, zlib.error,
)  # fmt: skip
_GREY = ("L", "I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_COLOUR = ("1", "P", "PA", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# TIFF 6.0 and EXIF tags.
_SUBFILE, _WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION = 254, 256, 257, 258, 262, 274
_PAGE = re.compile(r"(.+)#([1-9]\d*)", re.DOTALL)

_Path = str | os.PathLike[str]


def read_picture(path: _Path, *, colour: str = "grey") -> tuple[np.ndarray, tuple[str, ...]]:
    """Grey values [Y, X] of a picture or of a page such as `file.tif#2`, and notes on what was changed.

    colour: "grey" turns colours to grey; "refuse" accepts them only where all channels are equal. Raises ScanError.
    """
    name = os.path.basename(path)
    with _opened(path) as (image, notes):
        image = _decoded(image, notes)
        if "transparency" in image.info or ("A" in image.getbands() and np.asarray(image.getchannel("A")).min() < 255):
            notes.append("transparency ignored: the stored values stay")
        if image.mode in _COLOUR:
            image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
        values = _values(image, name)
    if values.ndim == 3:
        values, note = grey_of(values, colour, name, "RGB")
        notes.append(note)
    return values, tuple(notes)


def read_mask(path: _Path) -> np.ndarray:
    """Labels [Y, X] as stored: grey values, a palette's indices, or the 0 and 1 of one bit. Raises ScanError."""
    name = os.path.basename(path)
    with _opened(path) as (image, _):
        if image.mode not in (*_GREY, "1", "P"):
            raise ScanError(f"{name}: mask of mode {image.mode}, a mask is one number a pixel; save it as grey values")
        return _values(_decoded(image, []), name)


def picture_size(path: _Path) -> tuple[int, int]:
    """(height, width) from the header alone, turned as its orientation says. Raises ScanError."""
    with _opened(path) as (image, _):
        if image.format == "TIFF":  # of which newer versions of Pillow have turned the size already
            width, height, turn = _tag(image, _WIDTH, 0), _tag(image, _HEIGHT, 0), _tag(image, _ORIENTATION, 1)
        else:  # asking a PNG without EXIF would decode it
            known = image.format != "PNG" or "exif" in image.info
            width, height, turn = *image.size, _orientation(image, []) if known else 1
        return (width, height) if turn >= 5 else (height, width)


def sniff_picture(head: bytes) -> str | None:
    """png, jpeg, tiff, bmp, or None, from the first 18 bytes or more."""
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "bmp"
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


def is_picture(path: _Path) -> bool:
    """Whether a file, or the file of a page, is named like a picture."""
    return Path(split_page(path)[0]).suffix.lower() in SUFFIXES


def picture_files(root: Path) -> list[Path]:
    """All files below a folder that are named like pictures, sorted."""
    return sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def find_pictures(root: Path) -> list[Path]:
    """All pictures below a folder: files, and pages of those that hold several."""
    return [page for file in picture_files(root) for page in pages_of(file)]


def pages_of(file: Path) -> list[Path]:
    """`file.tif#1`, `file.tif#2`, ... of a TIFF of several pages; else, or where it cannot be read, the file itself."""
    if file.suffix.lower() not in (".tif", ".tiff"):
        return [file]
    try:
        with _said(file.name), open(file, "rb") as source, Image.open(source, formats=_FORMATS) as image:
            pages = _pages(image)
    except ScanError:
        return [file]  # reading it says why
    return [file] if len(pages) == 1 else [Path(f"{file}#{page}") for page in pages]


def split_page(path: _Path) -> tuple[str, int]:
    """The file and the page, from 1, that `file.tif#2` names; 0 where the name is a file's or no file is there."""
    text = os.fspath(path)
    found = None if os.path.exists(text) else _PAGE.fullmatch(text)
    return (found[1], int(found[2])) if found and os.path.isfile(found[1]) else (text, 0)


def unsuffixed(path: Path) -> Path:
    """Without the suffix, but with the page: `a.tif#2` is `a#2`."""
    file, page = split_page(path)
    return Path(f"{Path(file).with_suffix('')}#{page}") if page else path.with_suffix("")


def luma(values: np.ndarray) -> np.ndarray:
    """[..., 3] RGB to grey [...] of the same type: rounded for integers, exact where three integers are equal."""
    if values.dtype.kind == "f":
        return (values.astype(np.float64) @ (_LUMA / 2**16)).astype(values.dtype)
    red, green, blue = (values[..., i].astype(np.int64) * int(_LUMA[i]) for i in range(3))
    return ((red + green + blue + 2**15) >> 16).astype(values.dtype)


def grey_of(values: np.ndarray, colour: str, name: str, kind: str) -> tuple[np.ndarray, str]:
    """[..., 3] RGB to grey, and a note: exact where channels agree, luma where `colour` is "grey", else ScanError."""
    if (values[..., 0] == values[..., 1]).all() and (values[..., 0] == values[..., 2]).all():
        return np.ascontiguousarray(values[..., 0]), f"{kind} with three equal channels: one kept"
    if colour != "grey":
        raise ScanError(
            f"{name}: colour image ({kind}), a scan is grey-scale; pass colour='grey' to weigh the channels"
        )
    return luma(values), f"{kind} turned to grey by ITU-R BT.601 weights"


def grey_array(image: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Grey values of an image of an archive, which is colour where it is [Y, X, 3]; and notes."""
    if image.ndim != 3 or image.shape[-1] != 3:
        return image, ()
    grey, note = grey_of(image, "grey", "", "RGB")
    return grey, (note,)


@contextmanager
def _said(name: str) -> Iterator[None]:
    """One line for whatever Pillow raises; its warnings of size are dropped, for the limits here are ours."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ScanError:
        raise
    except UnidentifiedImageError as error:
        raise ScanError(
            f"{name}: no PNG, JPEG, TIFF or BMP picture that Pillow can read, or its header is damaged; save it as PNG"
        ) from error
    except Image.DecompressionBombError as error:
        raise ScanError(
            f"{name}: declares more pixels than are decoded; cut it into parts, or it is made up"
        ) from error
    except _ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ScanError(f"{name}: cannot be opened ({error.strerror})") from error
        raise ScanError(f"{name}: picture is cut off or damaged ({type(error).__name__}); copy it again") from error


@contextmanager
def _opened(path: _Path) -> Iterator[tuple[Image.Image, list[str]]]:
    """The picture at its page, checked and not yet decoded, and a list for notes."""
    file, page = split_page(path)
    name = os.path.basename(path)
    notes: list[str] = []
    # An open file, for of a path Pillow 13.0 maps an uncompressed TIFF whose orientation is 5 to 8 with wrong rows.
    with _said(name), open(file, "rb") as source, Image.open(source, formats=_FORMATS) as image:
        if image.format == "TIFF":
            pages = _pages(image)
            if page not in pages if len(pages) > 1 else page:
                named = f"{os.path.basename(file)}#{pages[0]}" if len(pages) > 1 else os.path.basename(file)
                more = f" to #{pages[-1]}" if len(pages) > 1 else ""
                raise ScanError(f"{name}: file of {len(pages)} page(s), a picture is one; name it {named}{more}")
            image.seek((page or pages[0]) - 1)
            left = getattr(image, "n_frames", 1) - len(pages)
            notes += [f"{left} thumbnails or masks in the file left out"] if left else []
        elif page:
            raise ScanError(f"{name}: only a TIFF has pages; name it {os.path.basename(file)}")
        elif (count := getattr(image, "n_frames", 1)) > 1:
            notes.append(f"first of {count} frames used")
        _check(image, name, os.path.getsize(file))
        yield image, notes


def _pages(image: Image.Image) -> list[int]:
    """Numbers, from 1, of the pages that are pictures of their own; the first is open again afterwards."""
    if image.format != "TIFF":
        return [1]
    kept = []
    for number in range(image.n_frames):  # pyright: ignore[reportAttributeAccessIssue]
        image.seek(number)
        if not int(_tag(image, _SUBFILE, 0)) & 5:  # 1: a smaller copy, 4: a transparency mask
            kept.append(number + 1)
    image.seek(0)
    return kept or [1]


def _tag(image: Image.Image, tag: int, default: int) -> int:
    """The greatest value of a TIFF's tag; `default` for other formats and tags that are not there."""
    value = image.tag_v2.get(tag, default) if image.format == "TIFF" else default  # pyright: ignore[reportAttributeAccessIssue]
    return max(value) if isinstance(value, tuple) else value


def _check(image: Image.Image, name: str, size: int) -> None:
    """Refuse what would be decoded wrongly or is made up."""
    # Deflate makes at most 1032 bytes of one, JPEG about 2000 pixels of one (an 8 x 8 block in a few bits).
    most = min(_MAX_PIXELS, 4096 * size * (8 if image.mode == "1" else 1))
    if image.width * image.height > most:
        raise ScanError(
            f"{name}: {image.width} x {image.height} pixels declared in {size:,} bytes, at most {most:,} are decoded; "
            "the header is damaged or made up"
        )
    if image.mode not in _GREY + _COLOUR:
        raise ScanError(f"{name}: picture of mode {image.mode}; save it as 8 or 16 bit grey")
    if image.mode in _COLOUR and (";16" in str(getattr(image, "tile", "")) or _tag(image, _BITS, 8) > 8):
        raise ScanError(f"{name}: 16-bit colour, which Pillow cuts to 8 bits; save it as 16-bit grey")


def _decoded(image: Image.Image, notes: list[str]) -> Image.Image:
    """Decoded and upright."""
    inverted = image.mode.startswith("I;16") and _tag(image, _PHOTOMETRIC, 1) == 0
    turn = _tag(image, _ORIENTATION, 1)  # which Pillow applies to a TIFF as it decodes it
    image.load()
    if image.format != "TIFF":
        turn = _orientation(image, notes)
        image = image.transpose(_TURNS[turn]) if turn in _TURNS else image
    if turn in _TURNS:
        notes.append(f"turned upright (EXIF orientation {turn})")
    if inverted:  # Pillow does so for 8 bits alone
        image = Image.fromarray(65535 - np.asarray(image).astype(np.uint16))
        notes.append("white is zero in the file: inverted")
    return image


def _orientation(image: Image.Image, notes: list[str]) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none."""
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
    except _ERRORS as error:
        notes.append(f"EXIF data cannot be read ({type(error).__name__}): taken to be upright")
        return 1
    return turn if turn in _TURNS else 1


def _values(image: Image.Image, name: str) -> np.ndarray:
    """The array, in the machine's byte order."""
    values = np.asarray(image)
    values = values.astype(np.uint8 if values.dtype == bool else values.dtype.newbyteorder("="), copy=False)
    if values.dtype == np.int32 and values.min() >= 0 and values.max() <= 65535:  # Pillow's mode of some 16 bits
        values = values.astype(np.uint16)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ScanError(f"{name}: pixels are NaN or infinite, all must be finite; replace them first")
    return np.ascontiguousarray(values)
