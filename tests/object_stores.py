"""Real object storages on this machine's loopback, and a proxy before them that fails as networks do.

`moto` knows conditional puts, and lets wrong secrets pass; `rclone serve s3` checks signatures and digests, and knows
no conditions. What works on both works on more.
"""

from __future__ import annotations

import http.client
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEY, SECRET = "a-key-of-the-tests", "a-secret-of-the-tests"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class Bucket:
    """`url` is s3://NAME, `kind` the server's, `endpoint` where it listens; `environment` lets a command find it."""

    url: str
    kind: str
    endpoint: str
    environment: dict[str, str]


@contextmanager
def moto() -> Iterator[str]:
    """A moto server's address."""
    port = _free_port()
    with _running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def rclone(directory: Path) -> Iterator[str]:
    """The address of `rclone serve s3`; a bucket is a directory below `directory`."""
    port = _free_port()
    program = shutil.which("rclone", path=str(Path(sys.executable).parent)) or "rclone"
    options = ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", "--config", "/dev/null"]
    with _running([program, "serve", "s3", *options, str(directory)], port):
        yield f"http://127.0.0.1:{port}"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            assert process.poll() is None, command
            with socket.socket() as found:
                if found.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(20)


class Fault:
    """What happens to the next `times` requests that match `method` and `path` (regular expressions)."""

    def __init__(self, kind: str, method: str = ".*", path: str = ".*", times: int = 1) -> None:
        self.kind, self.method, self.path, self.times = kind, method, path, times


class Proxy:
    """Passes requests on to a server, but for the faults it was given. `seen` is each request's method and path."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream.removeprefix("http://")
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def fail(self, kind: str, method: str = ".*", path: str = ".*", times: int = 1) -> None:
        self.faults.append(Fault(kind, method, path, times))

    def struck(self, method: str, path: str) -> str | None:
        """The fault for this request, if any."""
        with self._lock:
            self.seen.append(f"{method} {path}")
            for fault in self.faults:
                if fault.times > 0 and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    fault.times -= 1
                    return fault.kind
        return None

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _pass_on(self) -> None:
            body = self._body()
            kind = proxy.struck(self.command, self.path)
            if kind is not None and kind.isdigit():
                self._answer(int(kind), {}, b"")
                return
            if kind == "reset":
                self._reset()
                return
            if kind == "cut upload":  # the server sees a part of the body, then the connection is gone
                self._send_half(body)
                self._reset()
                return
            upstream = http.client.HTTPConnection(proxy.upstream, timeout=30)
            try:
                upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length", "expect"):
                        upstream.putheader(name, value)
                upstream.putheader("Content-Length", str(len(body)))
                upstream.endheaders(body)
                response = upstream.getresponse()
                data = response.read()
                headers = dict(response.getheaders())
            finally:
                upstream.close()
            if kind == "lost answer":  # the server did it, and nobody hears of it
                self._reset()
            elif kind == "cut":
                self._answer(response.status, headers, data, sent=len(data) // 2)
                self._reset()
            elif kind == "short":  # fewer bytes than there are, and the header agrees
                self._answer(response.status, headers, data[: len(data) // 2])
            elif kind == "slow":
                self._answer(response.status, headers, data, sent=1)
                time.sleep(3)
                self._reset()
            else:
                self._answer(response.status, headers, data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

        def _body(self) -> bytes:
            if self.headers.get("Expect", "").lower() == "100-continue":
                self.send_response_only(100)
                self.end_headers()
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                pieces = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    pieces.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(pieces)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _answer(self, status: int, headers: dict[str, str], data: bytes, sent: int | None = None) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data if sent is None else data[:sent])
            self.wfile.flush()

        def _send_half(self, body: bytes) -> None:
            with socket.create_connection(proxy.upstream.split(":")) as upstream:  # type: ignore[arg-type]
                head = f"{self.command} {self.path} HTTP/1.1\r\n" + "".join(
                    f"{name}: {value}\r\n" for name, value in self.headers.items() if name.lower() != "expect"
                )
                upstream.sendall(head.encode() + b"\r\n" + body[: len(body) // 2])

        def _reset(self) -> None:
            """Close without a goodbye: the other side sees a reset."""
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.wfile.close = lambda: None  # type: ignore[method-assign]
            self.connection.shutdown(socket.SHUT_RD)
            self.connection.close()

    return Handler


@contextmanager
def web_server(directory: Path, *, ranges: bool, answer: Callable[[str], int] | None = None) -> Iterator[str]:
    """A plain web server's address; with `ranges` it gives pieces of a file. `answer`: a status for some paths."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, directory=str(directory), **options)  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            status = answer(self.path) if answer is not None else 200
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if status != 200:
                self.send_error(status)
            elif ranges and wanted:
                data = Path(self.translate_path(self.path)).read_bytes()
                piece = data[int(wanted[1]) : int(wanted[2]) + 1]
                self.send_response(206)
                self.send_header("Content-Length", str(len(piece)))
                self.send_header("Content-Range", f"bytes {wanted[1]}-{int(wanted[1]) + len(piece) - 1}/{len(data)}")
                self.end_headers()
                self.wfile.write(piece)
            else:
                super().do_GET()

        def end_headers(self) -> None:
            if ranges:
                self.send_header("Accept-Ranges", "bytes")
            super().end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
