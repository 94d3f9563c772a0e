"""A web server on 127.0.0.1 with the files of a folder: ranges, ETags, and the faults of real servers."""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest


@dataclass
class Answer:
    """What the server has sent to one request."""

    path: str
    status: int
    body_bytes: int
    authorization: str | None = None


@dataclass
class ShardServer:
    """The server, with attributes by which tests control it.

    Attributes:
        folder: the folder with its files.
        redirects: URLs by the path that leads there.
        statuses: status by the path that is always answered with it.
        flaky: every fifth part of a file is answered with status 503 when it is first asked for, and every fifth one is
            cut in the middle of its content. A part that is asked for again is sent whole, so the number of faults that
            a client meets does not depend on the order of its requests.
        ranges: whether parts of files are sent.
        headers: further headers of all answers.
        connections: the connections that clients have opened.
        seconds: time that each answer takes.
        most_at_once: largest number of requests that were being answered at the same time.
    """

    folder: Path
    redirects: dict[str, str] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    flaky: bool = False
    ranges: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    requests: int = 0
    seconds: float = 0.0
    most_at_once: int = 0
    connections: list[socket.socket] = field(default_factory=list)
    _at_once: int = 0
    _parts: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.port = 0
        self.start()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Answer requests, after `stop` at the same URL."""
        self._server = _Quiet(("127.0.0.1", self.port), _Handler)
        self._server.shards = self  # type: ignore[attr-defined]
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def note(self, connection: socket.socket) -> None:
        self.connections.append(connection)

    def stop(self) -> None:
        """Refuse connections from now on, and close those that are open."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def fault_of(self, part: tuple[str, str]) -> str | None:
        """Remember a path and range that are asked for; return its fault: "busy", "cut" or None. Needs the lock."""
        if part in self._parts:
            return None
        self._parts.add(part)
        return {0: "busy", 3: "cut"}.get(len(self._parts) % 5)

    @property
    def sent(self) -> int:
        """The number of bytes of content that were sent."""
        return sum(answer.body_bytes for answer in self.answers)


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing when a client disconnects."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Otherwise the second part of an answer waits for 40 ms, until the client has acknowledged the first.
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.shards.note(self.connection)

    @property
    def shards(self) -> ShardServer:
        return self.server.shards  # type: ignore[attr-defined]

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        server = self.shards
        with server.lock:
            server.requests += 1
            server._at_once += 1
            server.most_at_once = max(server.most_at_once, server._at_once)
            fault = server.fault_of((self.path, self.headers.get("Range", ""))) if server.flaky else None
        try:
            if server.seconds:
                time.sleep(server.seconds)
            self._answer(fault)
        finally:
            with server.lock:
                server._at_once -= 1

    def _answer(self, fault: str | None) -> None:
        server, path = self.shards, unquote(self.path)
        if path in server.redirects:
            return self._send(302, b"moved", {"Location": server.redirects[path]})
        if path in server.statuses:
            return self._send(server.statuses[path], b"")
        file = server.folder / path.lstrip("/")
        if not file.is_file():
            return self._send(404, b"not here")
        if fault == "busy":
            return self._send(503, b"busy")
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not part or not server.ranges:
            return self._send(200, content, headers)
        start, end = int(part[1]), min(int(part[2]), len(content) - 1)
        if start >= len(content):
            return self._send(416, b"")
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        body = content[start : end + 1]
        self._send(206, body, headers, cut=fault == "cut" and len(body) > 1)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), **self.shards.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = body[: len(body) // 2] if cut else body
        self.shards.answers.append(Answer(self.path, status, len(sent), self.headers.get("Authorization")))
        self.wfile.write(sent)
        if cut:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ShardServer]:
    """A server with the files in tmp_path / "shards"."""
    running = ShardServer(tmp_path / "shards")
    yield running
    running.stop()
