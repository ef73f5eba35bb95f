"""Native libraries (codecs, HDF5) on files that were not made here, in a child process that may crash.

One child is kept alive in each process that decodes, forked loader workers included. It has limits on memory and on
time; where it dies, the file that killed it is refused and the next file gets a new child.
"""

from __future__ import annotations

import atexit
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np

from medformer.data.geometry import ScanError

__all__ = ["NativeError", "call"]

_SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "native_child.py")
# Seconds for any request, and bytes of result a second beyond: a tenth of what the slowest codec does here.
_SECONDS, _BYTES_PER_SECOND = 30.0, 2**20
# Address space of any request, for libraries and their tables.
_MEMORY = 2**30
# Freed memory stays with the child, so that the next image of a series touches no new pages (glibc's settings).
# What one request may leave in the memory that is kept.
_SMALL = 2**22
_KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**27)}


class NativeError(Exception):
    """What the library said of the file."""


class _Child:
    """JSON texts go by a socket. Bytes lie in memory that both know by descriptor: those of a request in `inbox`, small
    arrays in `outbox`, which both keep; a large array in memory of its own, whose descriptor comes with the answer."""

    def __init__(self) -> None:
        self.inbox, self.outbox = _memory(), _memory()
        paths = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.socket, other = socket.socketpair()
        with other:
            self.process = subprocess.Popen(
                [sys.executable, _SCRIPT, str(self.inbox), str(self.outbox)], stdin=other.fileno(),
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | _KEEP | paths,
                pass_fds=(self.inbox, self.outbox),
            )  # fmt: skip
        self.ends = float("inf")

    def send(self, request: dict[str, Any], data: bytes, seconds: float) -> None:
        self.ends = time.monotonic() + seconds
        text = json.dumps(request).encode()
        view, at = memoryview(data), 0
        while at < len(view):
            at += os.pwrite(self.inbox, view[at:], at)
        self._wait()
        self.socket.sendall(len(text).to_bytes(8, "little") + text)

    def receive(self) -> tuple[dict[str, Any], int]:
        """The answer, and the descriptor of the memory with the array; -1 where there is none."""
        self._wait()
        head, descriptors, _, _ = socket.recv_fds(self.socket, 8, 1)
        descriptor = descriptors[0] if descriptors else -1
        try:
            if not head:
                raise EOFError
            size = int.from_bytes(head + self._read(8 - len(head)), "little")
            return json.loads(self._read(min(size, 2**26))), descriptor
        except BaseException:
            if descriptor >= 0:
                os.close(descriptor)
            raise

    def _wait(self) -> None:
        self.socket.settimeout(max(1e-3, self.ends - time.monotonic()))

    def _read(self, count: int) -> bytes:
        out = bytearray()
        while len(out) < count:
            self._wait()
            if not (got := self.socket.recv(count - len(out))):
                raise EOFError
            out += got
        return bytes(out)

    def close(self, *, kill: bool) -> int:
        """The exit status."""
        if kill:
            self.process.kill()
        self.forget()
        try:
            return self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def forget(self) -> None:
        self.socket.close()
        os.close(self.inbox)
        os.close(self.outbox)


_child: _Child | None = None
_lock = threading.Lock()


def call(
    name: str, job: str, arguments: dict[str, Any], data: bytes = b"", *, most: int, memory: int = 0
) -> tuple[dict[str, Any], np.ndarray]:
    """Run a job of native_child.py; facts and array.

    name: the file, for messages. most: bytes that the array may have. memory: bytes that the library may take beyond
    that. Raises NativeError with what the library raises, ScanError where it crashes, hangs or takes too much memory.
    """
    global _child
    seconds = _SECONDS + most / _BYTES_PER_SECOND
    request = {
        "job": job, "arguments": arguments, "bytes": len(data), "memory": _MEMORY + 3 * most + memory
    }  # fmt: skip
    with _lock:
        if _child is not None and _child.process.poll() is not None:
            _child.close(kill=False)  # killed from outside between two files
            _child = None
        if _child is None:
            try:
                _child = _Child()
            except OSError as error:
                raise ScanError(f"{name}: the process that decodes cannot be started ({error.strerror})") from error
        child = _child
        try:
            child.send(request, data, seconds)
            answer, descriptor = child.receive()
            result = None if "error" in answer else _array(answer, descriptor, child.outbox, most)
            if len(data) > _SMALL:
                os.ftruncate(child.inbox, 0)
        except (EOFError, ConnectionError, TimeoutError) as error:
            _child = None
            status = child.close(kill=True)
            if isinstance(error, TimeoutError):
                what = f"it takes more than {seconds:.0f} s to decode and was stopped"
            else:
                what = f"the library that decodes it crashed ({_status(status)})"
            raise ScanError(f"{name}: {what}; the file is damaged or made up") from error
        except BaseException:  # interrupted half-way: what is in the socket belongs to no request any more
            _child = None
            child.close(kill=True)
            raise
    if result is None:
        if answer["error"].startswith("MemoryError"):
            raise ScanError(f"{name}: to decode {answer['error'][13:]}; the file is damaged or made up")
        raise NativeError(answer["error"])
    return answer["facts"], result


def _memory() -> int:
    """The descriptor of new memory; off Linux of a file without a name."""
    if sys.platform == "linux":
        return os.memfd_create("medformer")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _array(answer: dict[str, Any], descriptor: int, outbox: int, most: int) -> np.ndarray:
    """The array that the child has put into `outbox`, else into memory of its own. EOFError where it cannot be one."""
    shape, dtype, size = tuple(answer["shape"]), np.dtype(answer["dtype"]), answer["bytes"]
    if descriptor < 0:
        out = np.empty(shape, dtype)
        if out.nbytes != size or size > min(most, _SMALL):
            raise EOFError
        if size and os.preadv(outbox, [out.reshape(-1).view(np.uint8).data], 0) != size:
            raise EOFError
        return out
    try:
        if size > most or os.fstat(descriptor).st_size != size:
            raise EOFError
        # Private: what is written into the array is seen by no other process, forked ones included.
        memory = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    finally:
        os.close(descriptor)
    return np.frombuffer(memory, dtype).reshape(shape)


def _status(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"
    except ValueError:
        return f"signal {-code}"


def _forget() -> None:
    """After a fork the child belongs to the parent: close our end of its socket."""
    global _child, _lock
    _lock = threading.Lock()
    if _child is not None:
        _child.forget()
        _child.process.returncode = 0  # nothing to wait for here
        _child = None


def _end() -> None:
    if _child is not None:
        _child.close(kill=False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
atexit.register(_end)
