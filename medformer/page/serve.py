"""The page where one drops a scan: a server on this machine, for who started it.

It listens on 127.0.0.1 only and answers only to that name (so that no web site reaches it through a name of its own),
and only to a random token, which is in the address it prints: other users of the machine can connect, and get 403.
Uploads are limited in size and number. Each is deleted as soon as it is read, and where the server ends before, unless
it is killed with SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from medformer.data.pictures import SUFFIXES
from medformer.errors import UserError
from medformer.page.page import Viewer, load, render

__all__ = ["PageServer", "make_server", "serve"]

MAX_UPLOAD = 1 << 30
MAX_UPLOADS = 4
_CONNECTIONS = 64
_HEAD_SECONDS = 10  # for a request's head, whoever sends it
_BODY_SECONDS = 60  # without a byte of an upload
_DRAIN_SECONDS = 5  # of a refused upload: a browser reads no answer before it has sent some
_SUFFIXES = (".nii.gz", ".nii", ".zip", ".dcm", ".nrrd", ".mha", *SUFFIXES)
_CHUNK = 1 << 20


def serve(viewer: Viewer, sources: Sequence[Path], port: int) -> int:
    """Serve until Ctrl-C or SIGTERM; 0 is the exit code."""
    scans = [viewer.scan(load(viewer, source), source.name) for source in sources]
    try:
        server = make_server(viewer, scans, port)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "must be from 0 to 65535"
        raise UserError(f"--port {port}: {reason}; give another", 2) from error
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with server, contextlib.suppress(KeyboardInterrupt):
            print(f"{server.address}  (this machine only, only with this token; Ctrl-C ends it)", flush=True)
            server.serve_forever()
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


class _Refused(Exception):
    """An answer that is not 200, in one line."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code


class PageServer(ThreadingHTTPServer):
    """A server on 127.0.0.1.

    Attributes:
        token: without it nothing is answered.
        limit: bytes of an upload.
    """

    def __init__(self, viewer: Viewer, scans: Sequence[dict[str, Any]], port: int, limit: int, uploads: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.token = secrets.token_urlsafe(24)
        self.viewer, self.limit, self.uploads = viewer, limit, uploads
        self.page = render(viewer, scans, serve=self.token, limit=limit).encode()
        self.hosts = {f"{name}:{self.server_address[1]}" for name in ("127.0.0.1", "localhost")}
        self.free = threading.BoundedSemaphore(uploads)
        self.reading = threading.Lock()  # one scan at a time: memory is one scan's
        self._connections = threading.BoundedSemaphore(_CONNECTIONS)

    @property
    def address(self) -> str:
        """Of the page, with the token."""
        return f"http://127.0.0.1:{self.server_address[1]}/?token={self.token}"

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Too many connections at once: this one is closed."""
        return self._connections.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is no fault; anything else is one of ours and keeps its traceback."""
        if isinstance(sys.exception(), ConnectionError | TimeoutError):
            print("? gave up", file=sys.stderr)
        else:
            super().handle_error(request, client_address)


def make_server(
    viewer: Viewer, scans: Sequence[dict[str, Any]], port: int, limit: int = MAX_UPLOAD, uploads: int = MAX_UPLOADS
) -> PageServer:
    """Port 0 takes a free one; `limit` is in bytes, `uploads` the most at a time."""
    return PageServer(viewer, scans, port, limit, uploads)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = _HEAD_SECONDS
    command: Any = None

    def handle_one_request(self) -> None:
        self._slow = threading.Timer(_HEAD_SECONDS, self._cut)  # for who sends a byte now and then
        self._slow.daemon = True
        self._slow.start()
        try:
            super().handle_one_request()
        finally:
            self._slow.cancel()

    def _cut(self) -> None:
        with contextlib.suppress(OSError):  # closed meanwhile
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        self._answer_or_refuse(self._get)

    def do_POST(self) -> None:
        self._answer_or_refuse(self._post)

    def _answer_or_refuse(self, answer: Any) -> None:
        self._slow.cancel()
        self.connection.settimeout(_BODY_SECONDS)
        self.request_version = self.protocol_version  # of HTTP/0.9 too, whose answers have no status line
        try:
            answer()
        except _Refused as refused:
            self._refuse(refused.code, str(refused))

    def _get(self) -> None:
        path, _, query = self.path.partition("?")
        self._known(parse_qs(query).get("token", [""])[0])
        if path != "/":
            raise _Refused(404, "only / is here")
        self._answer(200, "text/html", self.server.page)

    def _post(self) -> None:
        self._known(self.headers.get("X-Medformer", ""))
        if self.path != "/scan":
            raise _Refused(404, "scans go to /scan")
        name = _shown(Path(unquote(self.headers.get("X-Name", ""))).name)
        suffix = next((s for s in _SUFFIXES if name.lower().endswith(s)), None)
        if suffix is None:
            raise _Refused(415, f"{name or 'this file'}: takes {', '.join(_SUFFIXES)}; a .zip holds one series")
        length = self._length(name)
        if not self.server.free.acquire(blocking=False):
            raise _Refused(503, f"{name}: {self.server.uploads} scans are being read already; drop it again later")
        try:
            with tempfile.TemporaryDirectory(prefix="medformer-") as folder:
                path = Path(folder) / f"upload{suffix}"  # its own name never reaches the disk
                self._store(path, name, length)
                with self.server.reading:
                    scan = self._scan(path, name)
        finally:
            self.server.free.release()
        self._answer(200, "application/json", json.dumps(scan, allow_nan=False).encode())

    def _scan(self, path: Path, name: str) -> dict[str, Any]:
        viewer = self.server.viewer
        try:
            return viewer.scan(load(viewer, path), name)
        except (UserError, ValueError) as error:
            raise _Refused(422, str(error).replace(path.name, name)) from error
        except Exception as error:
            self._refuse(500, f"{name}: {type(error).__name__}: a fault of medformer, see its terminal")
            raise

    def _known(self, token: str) -> None:
        if self.headers.get("Host") not in self.server.hosts:
            raise _Refused(403, "this server answers to 127.0.0.1 and localhost only")
        # As bytes: compare_digest takes no text beyond ASCII.
        if not secrets.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            raise _Refused(403, "open the address that medformer report printed, with its token")

    def _length(self, name: str) -> int:
        if self.headers.get("Transfer-Encoding") is not None:
            raise _Refused(411, f"{name}: give Content-Length; no transfer coding is taken")
        said = self.headers.get_all("Content-Length") or []
        if not said:
            raise _Refused(411, f"{name}: give Content-Length")
        digits = said[0].strip()
        if len({*said}) > 1 or not (digits.isascii() and digits.isdecimal()):
            raise _Refused(400, f"{name}: Content-Length {_shown(', '.join(said))!r} must be one whole number")
        digits = digits.lstrip("0") or "0"
        if len(digits) > 18 or int(digits) > self.server.limit:
            raise _Refused(413, f"{name}: {_shown(digits)} bytes, at most {self.server.limit:,} are taken")
        return int(digits)

    def _store(self, path: Path, name: str, left: int) -> None:
        try:
            with open(path, "wb") as file:
                while left:
                    part = self.rfile.read1(min(_CHUNK, left))
                    if not part:
                        raise _Refused(400, f"{name}: the upload broke off, {left:,} bytes are missing; drop it again")
                    left -= len(part)
                    file.write(part)
        except TimeoutError:
            raise _Refused(408, f"{name}: nothing came for {_BODY_SECONDS} seconds; drop it again") from None
        except ConnectionError:
            raise
        except OSError as error:
            raise _Refused(507, f"{name}: cannot be kept while it is read: {error.strerror}; make room") from error

    def _refuse(self, code: int, message: str) -> None:
        """Answer, and take some of what is still being sent: a connection closed before loses the answer."""
        self.close_connection = True
        self._answer(code, "text/plain", message.encode("utf-8", "replace"))
        end = time.monotonic() + _DRAIN_SECONDS
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            while time.monotonic() < end and self.rfile.read1(_CHUNK):
                pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses (request lines, header fields, methods), as all else: one line."""
        self._slow.cancel()
        self.request_version = self.protocol_version
        code = {501: 405}.get(code, code if 400 <= code < 500 else 400)
        self._refuse(code, _shown(message or self.responses[code][0]))

    def _answer(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Referrer-Policy", "no-referrer")  # the address holds the token
        if code == 503:
            self.send_header("Retry-After", "10")
        if code == 405:
            self.send_header("Allow", "GET, POST")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        # Names of files may name patients, addresses hold the token: only the verdict is shown.
        method = self.command if self.command in ("GET", "POST") else "?"
        print(f"{method} {args[1] if len(args) > 1 else 'gave up'}", file=sys.stderr)


def _shown(text: str) -> str:
    """Text of a client as one line, of 200 characters at most."""
    return "".join(c for c in text if c.isprintable())[:200]
