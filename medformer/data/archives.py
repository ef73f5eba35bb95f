"""Zip files: unpacked into a private folder, whatever their member names ask for; other archives are named."""

from __future__ import annotations

import lzma
import os
import re
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from medformer.data.geometry import ScanError
from medformer.data.volumes import MAX_VOLUME_BYTES

__all__ = ["ARCHIVES", "archive_note", "is_archive", "sniff_zip", "unpack", "unpacked", "unpacked_for_good"]

# Endings of archives that may hold scans. Zip is read where it is asked for by its own path; none inside a folder.
ARCHIVES = (
    ".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".7z", ".rar", ".dcm.gz",
    ".mha.gz", ".mhd.gz", ".nrrd.gz", ".dcm.zst", ".nii.zst", ".nii.bz2", ".nii.xz",
)  # fmt: skip
_FOREVER: dict[tuple[str, int, int], tempfile.TemporaryDirectory[str]] = {}

_MAX_MEMBERS = 100_000
_MAX_RATIO = 1100
# What zipfile raises on damage (found by altering bytes).
_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, EOFError, ValueError, RuntimeError,
    NotImplementedError, LookupError, OverflowError, MemoryError,
)  # fmt: skip
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


def sniff_zip(head: bytes) -> bool:
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06"))  # the second begins an empty one


def archive_note(path: str, head: bytes) -> str | None:
    """What to do about an archive among scans; None for any other file."""
    name = os.path.basename(path)
    if not _archived(name, head):
        return None
    read = "pass its own path, or unpack it" if sniff_zip(head) else "unpack it"
    return f"{name}: an archive, which is not searched; {read}"


def is_archive(path: str) -> bool:
    """Whether a file is an archive by its name or its first bytes; False for what cannot be opened."""
    try:
        with open(path, "rb") as file:
            return _archived(os.path.basename(path), file.read(512))
    except OSError:
        return False


def _archived(name: str, head: bytes) -> bool:
    return name.lower().endswith(ARCHIVES) or head[257:262] == b"ustar"


@contextmanager
def unpacked(path: str) -> Iterator[str]:
    """A folder with the members, gone when the context ends; see `unpack`."""
    with tempfile.TemporaryDirectory(prefix="medformer-") as root:
        unpack(path, root)
        yield root


def unpacked_for_good(path: str) -> str:
    """The same, kept until this process ends; an archive is unpacked once."""
    state = os.stat(path)
    key = (os.path.realpath(path), state.st_size, state.st_mtime_ns)
    if key not in _FOREVER:
        folder = tempfile.TemporaryDirectory(prefix="medformer-")
        unpack(path, folder.name)
        _FOREVER[key] = folder
    return _FOREVER[key].name


def unpack(path: str, root: str) -> None:
    """Write the members into the folder `root`, each folder of the archive a numbered one, names of plain letters.

    Links, encrypted members and absolute or climbing names are never followed: names are only labels here. Raises
    ScanError for an archive that declares, or turns out to hold, more than its size can.
    """
    name = os.path.basename(path)
    try:
        archive = zipfile.ZipFile(path)
    except _ERRORS as error:
        raise ScanError(f"{name}: zip file is cut off or damaged; copy it again") from error
    with archive:
        members = [m for m in archive.infolist() if not m.is_dir()]
        total = sum(m.file_size for m in members)
        budget = min(MAX_VOLUME_BYTES, _MAX_RATIO * os.path.getsize(path) + 2**20)
        if len(members) > _MAX_MEMBERS or total > budget:
            raise ScanError(
                f"{name}: zip of {len(members):,} files and {total:,} bytes, at most {_MAX_MEMBERS:,} and {budget:,} "
                "are unpacked; unpack it by hand if you trust it"
            )
        folders: dict[str, str] = {}
        for member in members:
            if stat.S_ISLNK(member.external_attr >> 16) or member.flag_bits & 1:
                raise ScanError(f"{name}: zip holds a link or an encrypted file; unpack it by hand")
            inside, _, base = member.filename.replace("\\", "/").rpartition("/")
            folder = folders.setdefault(inside, os.path.join(root, f"{len(folders):06d}"))
            os.makedirs(folder, exist_ok=True)
            plain = _UNSAFE.sub("_", base)[-100:].lstrip(".") or "file"
            budget -= _copy(archive, member, os.path.join(folder, plain), budget, name)


def _copy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: str, budget: int, name: str) -> int:
    """Write one member, counting what really comes out of it."""
    written = 0
    while os.path.exists(target):
        target += "_"
    try:
        with archive.open(member) as source, open(target, "xb") as sink:
            while block := source.read(2**20):
                written += len(block)
                if written > budget:
                    raise ScanError(f"{name}: zip inflates beyond what it declares; not unpacked")
                sink.write(block)
    except ScanError:
        raise
    except _ERRORS as error:
        raise ScanError(f"{name}: zip file is cut off or damaged ({type(error).__name__}); copy it again") from error
    return written
