"""The child process of native.py: codecs and HDF5 on files that were not made here.

A script that imports nothing of medformer. Requests come and answers go by the socket that is its stdin: 8 bytes with
the length of a JSON text, and the text. The bytes of a request lie in the memory whose descriptor is the first
argument; those of an array go into that of the second, or, where they are many, into memory of their own, whose
descriptor goes with the answer.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import sys
import tempfile
from typing import Any

_HEADER_LIMIT = 2**22
# As in native.py: so many bytes go by memory that is kept.
_SMALL = 2**22


def decode(data: bytes, *, syntax: str, options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Encapsulated pixel data to an array, by pydicom's decoder of the transfer syntax."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    array, _ = get_decoder(UID(syntax)).as_array(data, **options)
    return {}, array


def hdf5_look(_: bytes, *, path: str, keys: list[str], text: str) -> tuple[dict[str, Any], Any]:
    """What lies under `keys`, and the bytes of the one text `text`, without reading voxels."""
    import h5py
    import numpy as np

    facts: dict[str, Any] = {"attrs": {}, "found": {}, "text": None}
    with h5py.File(path, "r", locking=False) as file:
        facts["attrs"]["acquisition"] = str(file.attrs.get("acquisition", ""))[:64]
        for key in [k for k in (*keys, text) if k in file]:
            hard = isinstance(file.get(key, getlink=True), h5py.HardLink)
            found = file[key] if hard else None
            if not isinstance(found, h5py.Dataset):
                facts["found"][key] = None
                continue
            plain = not found.chunks and h5py.h5t.py_create(found.dtype, logical=True) == found.id.get_type()
            facts["found"][key] = {
                "own": not found.is_virtual and not found.external,
                "kind": found.dtype.kind, "itemsize": found.dtype.itemsize, "shape": list(found.shape or ()),
                "stored": found.id.get_storage_size(), "dtype": found.dtype.str,
                # Where its bytes lie as they are; None where they lie in chunks, or are none that NumPy has.
                "offset": found.id.get_offset() if plain and not file.userblock_size else None,
            }  # fmt: skip
        entry = facts["found"].get(text)
        if entry is not None:
            value = np.asarray(file[text])[()] if not entry["shape"] and entry["stored"] <= _HEADER_LIMIT else None
            if isinstance(value, str | bytes):
                facts["text"] = (value if isinstance(value, bytes) else value.encode()).decode("latin1")
    return facts, np.empty(0, np.uint8)


def hdf5_read(_: bytes, *, path: str, key: str, dtype: str) -> tuple[dict[str, Any], Any]:
    """One array as `dtype`."""
    import h5py
    import numpy as np

    with h5py.File(path, "r", locking=False) as file:
        found: Any = file[key]
        out = shared(found.shape, np.dtype(dtype))
        if out.size:
            found.read_direct(out)
        return {}, out


JOBS = {"decode": decode, "hdf5_look": hdf5_look, "hdf5_read": hdf5_read}


def _limit(extra: int) -> None:
    """At most `extra` bytes of address space more than now."""
    try:
        import resource

        with open("/proc/self/statm", "rb") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + extra, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, OSError, ValueError):
        pass  # not Linux: the sizes that the headers declare are all that bounds memory there


def shared(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array; a large one in memory that the parent can map too."""
    import numpy as np

    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if size <= _SMALL:
        return np.empty(shape, dtype)
    if sys.platform == "linux":
        descriptor = os.memfd_create("medformer")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        os.ftruncate(descriptor, size)
        # All its pages at once: one by one costs as much again as filling them.
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        out = np.frombuffer(mmap.mmap(descriptor, size, flags=flags), dtype).reshape(shape)
    except BaseException:
        os.close(descriptor)
        raise
    _shared[id(out)] = descriptor
    return out


# The descriptors of arrays that `shared` made, by id, until they are sent.
_shared: dict[int, int] = {}


def _answer(link: socket.socket, facts: dict[str, Any], descriptor: int = -1) -> None:
    text = json.dumps(facts).encode()
    head = len(text).to_bytes(8, "little")
    if descriptor < 0:
        link.sendall(head)
    else:
        socket.send_fds(link, [head], [descriptor])
    link.sendall(text)


def _receive(link: socket.socket, count: int) -> bytes:
    out = bytearray()
    while len(out) < count and (got := link.recv(count - len(out))):
        out += got
    return bytes(out)


def _request(link: socket.socket, inbox: int) -> tuple[dict[str, Any], bytes] | None:
    """The next one and its bytes; None where the parent has gone."""
    if not (size := _receive(link, 8)):
        return None
    request = json.loads(_receive(link, int.from_bytes(size, "little")))
    if request["bytes"] <= _SMALL:
        return request, os.pread(inbox, request["bytes"], 0)
    with mmap.mmap(inbox, request["bytes"], access=mmap.ACCESS_READ) as memory:
        return request, memory[:]


def _work(request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], Any]:
    """The answer, and the array."""
    facts, array = JOBS[request["job"]](data, **request["arguments"])
    if array.nbytes > _SMALL and id(array) not in _shared:
        out = shared(array.shape, array.dtype)
        out[...] = array
        array = out
    return {"facts": facts, "shape": list(array.shape), "dtype": array.dtype.str, "bytes": array.nbytes}, array


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is asked to stop; this ends with its stdin
    link, inbox, outbox = socket.socket(fileno=os.dup(0)), int(sys.argv[1]), int(sys.argv[2])
    import numpy as np

    while (request := _request(link, inbox)) is not None:
        try:
            _limit(request[0]["memory"])
            facts, array = _work(*request)
            if array.nbytes <= _SMALL:
                os.pwrite(outbox, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, 0)
            _answer(link, facts, _shared.get(id(array), -1))
        except MemoryError:
            _answer(link, {"error": f"MemoryError: it takes more than {request[0]['memory'] >> 20:,} MiB"})
        except Exception as error:  # sent to the parent, which raises it
            lines = str(error).splitlines()
            _answer(link, {"error": f"{type(error).__name__}: {' '.join(lines)[:300] if lines else ''}"})
        finally:
            while _shared:
                os.close(_shared.popitem()[1])
            facts = array = request = None


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules are no top-level ones
    main()
