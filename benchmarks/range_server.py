"""A folder served on loopback over HTTP with ranges, and with the faults of a real network, as asked for.

For tests and benchmarks: it listens on 127.0.0.1 only and ends with the process.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

__all__ = ["Faults", "serving"]

_BURST = 2**14  # bytes sent at a time where the rate is limited


@dataclass
class Faults:
    """What is wrong with the network; all of it may change while the server runs."""

    delay: float = 0.0
    """Seconds before each answer."""
    rate: float = 0.0
    """Bytes a second of each connection; 0: as fast as it goes."""
    fault: Callable[[str, int], str | int | None] = lambda path, request: None
    """Path with range, and number of a request, to what befalls it: a status, "cut" (the connection, in the middle of
    the body), "hang", "wrong" (a byte), "whole" (ranges ignored); None: nothing."""
    hidden: str = ""
    """Where set, the first part of each path, as a bucket."""
    requests: int = 0
    sent: int = 0
    """Bytes of bodies."""
    most: int = 0
    """Requests at a time."""
    paths: list[str] = field(default_factory=list)
    end: threading.Event = field(default_factory=threading.Event)
    """Set when the server ends: what hangs goes on."""


@contextmanager
def serving(folder: Path, faults: Faults, port: int = 0) -> Iterator[str]:
    """The address of `folder`, served until the end of the block."""
    lock, running = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            self.connection.setsockopt(6, 1, 1)  # TCP_NODELAY: head and body are two writes

        def do_GET(self) -> None:
            if faults.end.is_set():
                self.close_connection = True
                return
            with lock:
                faults.requests += 1
                faults.paths.append(self.path)
                number = faults.requests
                running[0] += 1
                faults.most = max(faults.most, running[0])
            try:
                time.sleep(faults.delay)
                self._answer(faults.fault(f"{self.path} {self.headers.get('Range', '')}", number))
            finally:
                with lock:
                    running[0] -= 1

        do_HEAD = do_GET

        def _answer(self, fault: str | int | None) -> None:
            path = folder / unquote(self.path).lstrip("/").removeprefix(faults.hidden).lstrip("/")
            if isinstance(fault, int) or not path.is_file():
                return self._head(fault if isinstance(fault, int) else 404, 0)
            if fault == "hang":
                faults.end.wait(60)
                self.close_connection = True
                return None
            data, size = path, path.stat().st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start, stop = 0, size
            if asked and fault != "whole":
                start, stop = int(asked[1]), min(int(asked[2] or size - 1) + 1, size)
                if start >= size:
                    return self._head(416, 0)
            with open(data, "rb") as file:
                file.seek(start)
                body = file.read(stop - start)
            if fault == "wrong":
                middle = len(body) // 2
                body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
            ranged = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"} if asked and fault != "whole" else {}
            self._head(206 if ranged else 200, len(body), **ranged)
            if self.command == "HEAD":
                return None
            if fault == "cut":
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return None
            self._send(body)
            with lock:
                faults.sent += len(body)

        def _head(self, code: int, length: int, **fields: str) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(length))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", '"none"')
            self.send_header("Last-Modified", "Tue, 01 Dec 2026 00:00:00 GMT")
            for name, value in fields.items():
                self.send_header(name, value)
            self.end_headers()

        def _send(self, body: bytes) -> None:
            began = time.monotonic()
            for at in range(0, len(body), _BURST if faults.rate else max(len(body), 1)):
                part = body[at : at + _BURST] if faults.rate else body
                self.wfile.write(part)
                if faults.rate:
                    time.sleep(max(0.0, began + (at + len(part)) / faults.rate - time.monotonic()))

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 256

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # clients of these tests are killed

    server = Server(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}" + (f"/{quote(faults.hidden)}" if faults.hidden else "")
    finally:
        faults.end.set()
        server.shutdown()
        server.server_close()
        thread.join()
