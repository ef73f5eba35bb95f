"""The page where one drops a scan: a server on this machine, for this machine alone.

It listens on 127.0.0.1 only, answers only to that name (so that no web site can reach it through a name of its own),
takes uploads only from its own page, limits their size, and deletes each one as soon as it is read.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
import tempfile
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from page import Viewer, load_scan, render
from runs import UserError

__all__ = ["make_server", "serve"]

MAX_UPLOAD = 1 << 30
_SUFFIXES = (".nii.gz", ".nii", ".zip", ".dcm", ".nrrd", ".mha", ".png", ".jpg", ".jpeg")
_CHUNK = 1 << 20


def serve(viewer: Viewer, sources: Sequence[Path], port: int) -> int:
    """Serve until Ctrl-C; 0 is the exit code."""
    scans = [viewer.scan(load_scan(source, viewer.model.config.dims), source.name) for source in sources]
    try:
        server = make_server(viewer, scans, port)
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}; give another", 2) from error
    print(f"http://127.0.0.1:{server.server_address[1]}/  (this machine only; Ctrl-C ends it)", flush=True)
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


def make_server(
    viewer: Viewer, scans: Sequence[dict[str, Any]], port: int, limit: int = MAX_UPLOAD
) -> ThreadingHTTPServer:
    """A server on 127.0.0.1; port 0 takes a free one. `limit` is in bytes."""
    key = secrets.token_urlsafe(24)
    page = render(viewer, scans, serve=key, limit=limit).encode()
    busy = threading.Lock()  # one scan at a time: memory is one scan's

    class Handler(BaseHTTPRequestHandler):
        timeout = 60

        def do_GET(self) -> None:
            if self._known():
                self._answer(
                    *((200, "text/html", page) if self.path == "/" else (404, "text/plain", b"only / is here"))
                )

        def do_POST(self) -> None:
            if not self._known():
                return
            if self.path != "/scan" or not secrets.compare_digest(self.headers.get("X-Medformer", ""), key):
                return self._refuse(403, "uploads come from this server's own page; reload it")
            name = Path(unquote(self.headers.get("X-Name", ""))).name
            suffix = next((s for s in _SUFFIXES if name.lower().endswith(s)), None)
            length = self.headers.get("Content-Length", "")
            if suffix is None:
                return self._refuse(415, f"{name or 'this file'}: takes .nii, .nii.gz or a .zip of one DICOM series")
            if not length.isdecimal() or int(length) > limit:
                return self._refuse(413, f"{name}: {length or 'unknown'} bytes, at most {limit:,} are taken")
            try:
                with busy, tempfile.TemporaryDirectory(prefix="medformer-") as folder:
                    # Its own name never reaches the disk.
                    path = Path(folder) / f"upload{suffix}"
                    self._store(path, int(length))
                    scan = viewer.scan(load_scan(path, viewer.model.config.dims), name)
            except (UserError, ValueError) as error:
                return self._refuse(422, str(error).replace(f"upload{suffix}", name))
            self._answer(200, "application/json", json.dumps(scan, allow_nan=False).encode())

        def _known(self) -> bool:
            hosts = {f"{name}:{port_taken}" for name in ("127.0.0.1", "localhost")}
            if self.headers.get("Host") in hosts:
                return True
            self._refuse(403, "this server answers to 127.0.0.1 and localhost only")
            return False

        def _store(self, path: Path, left: int) -> None:
            with open(path, "wb") as file:
                while left:
                    part = self.rfile.read(min(_CHUNK, left))
                    if not part:
                        raise UserError(f"{path.name}: the upload broke off; drop it again")
                    left -= len(part)
                    file.write(part)

        def _refuse(self, code: int, message: str) -> None:
            self.close_connection = True  # the rest of the upload is not read
            self._answer(code, "text/plain", message.encode())

        def _answer(self, code: int, kind: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("X-Frame-Options", "DENY")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            # Names of files may name patients: only the verdict is shown.
            print(f"{self.command or '?'} {args[1] if len(args) > 1 else ''}", file=sys.stderr)

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    port_taken = int(server.server_address[1])
    return server
