"""The server of the page: who is answered, and that nothing a client sends ends in a traceback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import medformer
from medformer.data import Volume, make_phantom
from medformer.page import page, serve

LIMIT = 10**6


@pytest.fixture(scope="module")
def viewer(tmp_path_factory: pytest.TempPathFactory) -> page.Viewer:
    torch.manual_seed(0)
    model = medformer.tiny_3d(width=24, depth=1, heads=2)
    path = tmp_path_factory.mktemp("serve") / "backbone.safetensors"
    medformer.save(model, path)
    return page.Viewer(model, path)


@contextlib.contextmanager
def running(viewer: page.Viewer, **settings: Any) -> Iterator[serve.PageServer]:
    server = serve.make_server(viewer, [], 0, **settings)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def server(viewer: page.Viewer) -> Iterator[serve.PageServer]:
    with running(viewer, limit=LIMIT) as server:
        yield server


def talk(server: serve.PageServer, data: bytes, *, close: bool = False) -> tuple[int, str]:
    """Status and body of the answer to bytes; `close`: nothing more will come, and that is said at once."""
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=20) as connection:
        connection.sendall(data)
        if close:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


def upload(server: serve.PageServer, *fields: str, body: bytes = b"", name: str = "a.nii", token: str = "") -> bytes:
    lines = ["POST /scan HTTP/1.1", f"Host: 127.0.0.1:{server.server_address[1]}",
             f"X-Medformer: {token or server.token}", f"X-Name: {name}", *fields]  # fmt: skip
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def get(server: serve.PageServer, path: str, host: str = "127.0.0.1") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {host}:{server.server_address[1]}\r\n\r\n".encode("latin-1")


BODIES = {
    "none": ((), b"", 411),
    "empty": (("Content-Length:",), b"", 400),
    "negative": (("Content-Length: -1",), b"x", 400),
    "signed": (("Content-Length: +1",), b"x", 400),
    "hexadecimal": (("Content-Length: 0x10",), b"x" * 16, 400),
    "words": (("Content-Length: all of it",), b"x", 400),
    "superscript": (("Content-Length: 1\xb2",), b"x" * 12, 400),
    "fraction": (("Content-Length: 1.0",), b"x", 400),
    "two": (("Content-Length: 1", "Content-Length: 2"), b"xx", 400),
    "above the limit": ((f"Content-Length: {LIMIT + 1}",), b"", 413),
    "huge": (("Content-Length: " + "9" * 5000,), b"", 413),  # more digits than int() takes
    "chunked": (("Transfer-Encoding: chunked",), b"1\r\nx\r\n0\r\n\r\n", 411),
    "chunked and counted": (("Transfer-Encoding: chunked", "Content-Length: 1"), b"1\r\nx\r\n0\r\n\r\n", 411),
    "cut off": (("Content-Length: 100",), b"x" * 99, 400),
    "nothing": (("Content-Length: 0",), b"", 422),
}


@pytest.mark.parametrize("kind", BODIES)
def test_lengths_are_refused_in_one_line(
    server: serve.PageServer, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    fields, body, expected = BODIES[kind]
    status, text = talk(server, upload(server, *fields, body=body), close=True)
    assert status == expected
    assert len(text.splitlines()) == 1
    assert len(text) < 400
    assert text.startswith("a.nii")
    assert capsys.readouterr().err == f"POST {expected}\n"


HEADS = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "one word": (b"GET\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /\r\n\r\n", 403),
    "a version that is none": (b"GET / HTTP/x.y\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "four words": (b"GET / a HTTP/1.1\r\n\r\n", 400),
    "a long line": (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
    "a long field": (b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", 431),
    "many fields": (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 500 + b"\r\n", 431),
    "another method": (b"\x1b[31mDELETE / HTTP/1.1\r\n\r\n", 405),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 403),
    "an address that is none": (b"GET http://[ HTTP/1.1\r\n\r\n", 403),
    "no colon": (b"GET / HTTP/1.1\r\nnonsense\r\n\r\n", 403),
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_are_refused_in_one_line(server: serve.PageServer, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    head, expected = HEADS[kind]
    status, text = talk(server, head, close=True)
    assert status == expected
    assert len(text.splitlines()) == 1
    assert len(text) < 400
    assert text.isprintable()
    said = capsys.readouterr().err
    assert said.endswith(f" {expected}\n")
    assert said.count("\n") == 1
    assert said[:-1].isprintable()


def test_a_client_that_says_nothing_is_let_go(
    viewer: page.Viewer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "_HEAD_SECONDS", 0.3)
    monkeypatch.setattr(serve._Handler, "timeout", 0.3)
    with running(viewer) as server:
        at = ("127.0.0.1", server.server_address[1])
        with socket.create_connection(at, timeout=5) as silent, socket.create_connection(at, timeout=5) as slow:
            with contextlib.suppress(ConnectionError):
                for letter in b"GET / HTTP/1.1\r\nHost: 127":  # a byte now and then
                    slow.sendall(bytes([letter]))
                    time.sleep(0.05)
            assert silent.recv(1) == b""
        assert talk(server, get(server, f"/?token={server.token}"))[0] == 200
    assert "Traceback" not in capsys.readouterr().err


def test_only_the_token_opens_the_page(server: serve.PageServer) -> None:
    assert talk(server, get(server, f"/?token={server.token}"))[0] == 200
    assert server.address.endswith(f"/?token={server.token}")
    assert len(server.token) >= 32
    wrong = ["/", "/?token=", f"/?token={server.token}x", f"/?token={server.token[:-1]}", "/?token=\xff%ff", "/scan",
             f"/?other={server.token}", f"/{server.token}"]  # fmt: skip
    for path in wrong:
        status, text = talk(server, get(server, path))
        assert status == 403, path
        assert server.token not in text
    for token in ("guess", "\xff", server.token.swapcase()):
        assert talk(server, upload(server, "Content-Length: 1", body=b"x", token=token))[0] == 403


def test_another_name_of_this_machine_is_refused_even_with_the_token(server: serve.PageServer) -> None:
    """A web site that lets its own name point here (DNS rebinding)."""
    for host in ("evil.example", "127.0.0.1.evil.example", "[::1]", ""):
        assert talk(server, get(server, f"/?token={server.token}", host))[0] == 403
    assert talk(server, get(server, f"/?token={server.token}", "localhost"))[0] == 200


def test_two_servers_have_two_tokens(viewer: page.Viewer) -> None:
    with running(viewer) as one, running(viewer) as other:
        assert one.token != other.token
        assert talk(one, get(one, f"/?token={other.token}"))[0] == 403


def test_a_refused_upload_is_answered_whatever_is_still_being_sent(server: serve.PageServer) -> None:
    size = 8 * LIMIT  # more than the buffers of a socket hold
    status, text = talk(server, upload(server, f"Content-Length: {size}", body=b"x" * size))
    assert status == 413
    assert "at most 1,000,000 are taken" in text


def test_names_are_shown_as_one_line_and_reach_no_disk(server: serve.PageServer) -> None:
    name = "..%2F..%2Fa%0Ab%1B%5B31m" + "n" * 3000 + ".nii"
    status, text = talk(server, upload(server, "Content-Length: 1", body=b"x", name=name))
    assert status == 415  # what is shown of it ends before its suffix
    assert text.isprintable()
    status, text = talk(server, upload(server, "Content-Length: 1", body=b"x", name="..%2F..%2Fa%0A%00b.nii"))
    assert status == 422
    assert text.isprintable()
    assert text.startswith("ab.nii")
    assert "/" not in text


def waited(condition: Any) -> bool:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


def test_several_scans_are_taken_at_a_time_and_no_more(viewer: page.Viewer, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, began, inside = threading.Event(), [], []

    def slow(path: Path, dims: int) -> Volume:
        inside.append(path)
        assert len(inside) == 1  # memory is one scan's
        began.append(path)
        assert go_on.wait(30)
        inside.pop()
        return make_phantom(0, shape=(8, 16, 16))

    monkeypatch.setattr(serve, "load", slow)
    with running(viewer, uploads=2) as server:
        answers: list[tuple[int, str]] = []
        whole = upload(server, "Content-Length: 1", body=b"x")
        threads = [threading.Thread(target=lambda: answers.append(talk(server, whole))) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert waited(lambda: server.free._value == 0 and began)
        status, text = talk(server, whole)
        assert status == 503
        assert "2 scans are being read already" in text
        assert talk(server, get(server, f"/?token={server.token}"))[0] == 200  # the page itself is answered
        go_on.set()
        for thread in threads:
            thread.join()
        assert [status for status, _ in answers] == [200, 200]
        assert talk(server, whole)[0] == 200  # there is room again


def test_uploads_that_end_badly_give_their_place_back(viewer: page.Viewer) -> None:
    with running(viewer, uploads=1) as server:
        for _ in range(3):
            assert talk(server, upload(server, "Content-Length: 9", body=b"x"), close=True)[0] == 400
            with socket.create_connection(("127.0.0.1", server.server_address[1])) as connection:
                connection.sendall(upload(server, "Content-Length: 9", body=b"x"))
                assert waited(lambda: server.free._value == 0)
            assert waited(lambda: server.free._value == 1)


def test_more_connections_than_there_is_room_for_are_closed(
    viewer: page.Viewer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_CONNECTIONS", 3)
    with running(viewer) as server, contextlib.ExitStack() as open_ones:
        at = ("127.0.0.1", server.server_address[1])
        idle = [open_ones.enter_context(socket.create_connection(at, timeout=5)) for _ in range(3)]
        assert waited(lambda: server._connections._value == 0)
        with socket.create_connection(at, timeout=5) as late:
            assert late.recv(1) == b""
        for connection in idle:
            connection.close()
        assert waited(lambda: server._connections._value == 3)
        assert talk(server, get(server, f"/?token={server.token}"))[0] == 200


def test_a_fault_of_ours_is_answered_and_keeps_its_traceback(
    viewer: page.Viewer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "load", lambda viewer, path: 1 / 0)
    with running(viewer) as server:
        status, text = talk(server, upload(server, "Content-Length: 1", body=b"x"))
    assert status == 500
    assert text == "a.nii: ZeroDivisionError: a fault of medformer, see its terminal"
    assert "in <lambda>" in capsys.readouterr().err


def test_a_full_disk_is_said(viewer: page.Viewer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = serve._Handler._store
    monkeypatch.setattr(serve._Handler, "_store", lambda self, _, *rest: real(self, Path("/dev/full"), *rest))
    with running(viewer) as server:
        status, text = talk(server, upload(server, "Content-Length: 1", body=b"x"))
    assert status == 507
    assert "No space left on device" in text


def test_sigterm_ends_it_and_leaves_no_half_of_an_upload(viewer: page.Viewer, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "medformer", "report", str(viewer.file), "--serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as it:
        assert it.stdout is not None
        address = it.stdout.readline().split()[0]
        port, _, token = address.removeprefix("http://127.0.0.1:").partition("/?token=")
        with socket.create_connection(("127.0.0.1", int(port))) as connection:
            head = f"POST /scan HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nX-Medformer: {token}\r\nX-Name: a.nii\r\n"
            connection.sendall(f"{head}Content-Length: 100\r\n\r\nhalf".encode())
            assert waited(lambda: list(tmp_path.glob("medformer-*/upload.nii")))
            it.send_signal(signal.SIGTERM)
            _, said = it.communicate(timeout=60)
    assert it.returncode == 0
    assert said == ""
    assert list(tmp_path.glob("medformer-*")) == []
