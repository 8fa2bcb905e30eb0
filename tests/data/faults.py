"""A proxy between an S3 client and a server that does to HTTP what networks and overloaded services do.

It answers in the server's place, cuts requests and replies at any byte, stalls, loses the reply of a request that took
effect, changes bytes, and lies about sizes. Each fault meets the next request that it matches, and then is gone.
"""

import http.client
import logging
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>injected</Message></Error>'


@dataclass
class Reply:
    """What the server answered; a fault may change it."""

    status: int
    headers: dict[str, str]
    body: bytes

    def bytes(self) -> bytes:
        lines = [f"HTTP/1.1 {self.status} Injected", *(f"{name}: {value}" for name, value in self.headers.items())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + self.body


@dataclass
class Fault:
    """What goes wrong with one request; by default nothing does."""

    method: str = ""
    """Meets only requests of this method, or any."""
    containing: str = ""
    """Meets only requests whose path, with the query, contains this."""
    status: int = 0
    """Answers with this status and `code` instead of asking the server."""
    code: str = "SlowDown"
    headers: dict[str, str] = field(default_factory=dict)
    """Headers that the request gets (or loses, where empty) on its way to the server."""
    cut_request: int | None = None
    """Resets the connection after so many bytes of the request's body, which never reach the server."""
    lose_reply: bool = False
    """Resets the connection after the server has answered."""
    stall_after: int | None = None
    """Stops after so many bytes of the reply, and holds the connection open."""
    cut_after: int | None = None
    """Resets the connection after so many bytes of the reply, headers and body."""
    cut_body: int | None = None
    """Resets the connection after so many bytes of the reply's body."""
    end_body: int | None = None
    """Closes the connection in good order after so many bytes of the reply's body."""
    change: Callable[[Reply], None] | None = None
    """Changes the reply."""
    before: Callable[[], Any] | None = None
    """Is called before the request goes to the server."""


class FaultProxy:
    """Listens on a port of localhost, in threads of this process."""

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.log: list[tuple[str, str, dict[str, str], int]] = []
        """Of every request: method, path, headers, bytes of its body."""
        self._faults: list[Fault] = []
        self._lock, self.one_put = threading.Lock(), threading.Lock()
        self.closed = threading.Event()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def add(self, times: int = 1, **fault: Any) -> None:
        """The next `times` requests that match meet this fault."""
        with self._lock:
            self._faults += [Fault(**fault) for _ in range(times)]

    def take(self, method: str, path: str) -> Fault:
        with self._lock:
            for number, fault in enumerate(self._faults):
                if fault.method in ("", method) and fault.containing in path:
                    return self._faults.pop(number)
        return Fault()

    def pending(self) -> int:
        """Faults that no request has met yet."""
        return len(self._faults)

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()
            self.log.clear()

    def requests(self, method: str, containing: str = "") -> list[str]:
        """Paths, with queries, of the requests seen."""
        return [path for seen, path, _, _ in list(self.log) if seen == method and containing in path]

    def close(self) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()


def flip_bit(offset: int) -> Callable[[Reply], None]:
    """A change of one bit of the body."""

    def change(reply: Reply) -> None:
        body = bytearray(reply.body)
        body[offset] ^= 1
        reply.body = bytes(body)

    return change


def set_headers(**headers: Callable[[str], str]) -> Callable[[Reply], None]:
    """A change of headers: name (with underscores) → function of the old value."""

    def change(reply: Reply) -> None:
        for name in list(reply.headers):
            if function := headers.get(name.lower().replace("-", "_")):
                reply.headers[name] = function(reply.headers[name])

    return change


@contextmanager
def s3_behind_faults() -> Iterator[FaultProxy]:
    """A server of S3 with a bucket named "bucket", and the proxy before it, to which the environment points."""
    from moto.server import ThreadedMotoServer

    from nitscale.data import s3, storage

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    proxy = FaultProxy(server.get_host_and_port()[1])
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "NITSCALE_S3_"))]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setattr(s3, "FIRST_PAUSE", 0.002)
        patch.setattr(s3, "LONGEST_PAUSE", 0.01)
        patch.setattr(s3, "RETRY_SECONDS", 20)
        patch.setattr(storage, "STALL_SECONDS", 10)  # however busy the machine is
        client().create_bucket(Bucket="bucket")
        proxy.clear()
        yield proxy
    proxy.close()
    server.stop()


def notice_stalls(patch: pytest.MonkeyPatch) -> None:
    """Make clients give up a connection that brings nothing for 0.3 s."""
    from nitscale.data import storage

    patch.setattr(storage, "STALL_SECONDS", 0.3)
    patch.setattr(storage, "_clients", {})


def client() -> Any:
    """The client of this process, to look behind a storage."""
    from nitscale.data import storage

    return storage._client()


ACCESS_KEY, SECRET = "AKIAFORTESTSONLY", "a/secret+that/nobody+may/see"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # without the good order of the original, see `_reset`

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # clients that are killed are part of the tests
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        proxy = self.proxy
        fault = proxy.take(self.command, self.path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault.cut_request is not None:
            self.rfile.read(min(length, fault.cut_request))
            return self._reset()
        body = self.rfile.read(length)
        proxy.log.append((self.command, self.path, dict(self.headers.items()), len(body)))
        if fault.status:
            xml = b"" if self.command == "HEAD" else ERROR.format(fault.code).encode()
            reply = Reply(fault.status, {"Content-Type": "application/xml", "Content-Length": str(len(xml))}, xml)
        else:
            if fault.before:
                fault.before()
            # moto 5.2 looks whether an object is there, and then puts it; for S3 that is one step.
            with proxy.one_put if "If-None-Match" in self.headers else nullcontext():
                reply = self._ask(body, fault.headers)
        if fault.lose_reply:
            return self._reset()
        if fault.change:
            fault.change(reply)
        data = reply.bytes()
        head = len(data) - len(reply.body)
        with suppress(OSError):
            if fault.stall_after is not None:
                self.wfile.write(data[: fault.stall_after])
                proxy.closed.wait(30)
                return self._reset()
            limit = fault.cut_after if fault.cut_body is None else head + fault.cut_body
            if limit is not None and limit < len(data):
                self.wfile.write(data[:limit])
                return self._reset()
            if fault.end_body is not None:
                self.wfile.write(data[: head + fault.end_body])
                self.close_connection = True
                return
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _ask(self, body: bytes, changed: dict[str, str]) -> Reply:
        headers = {n: v for n, v in self.headers.items() if n.lower() not in ("connection", "expect")} | changed
        upstream = http.client.HTTPConnection("127.0.0.1", self.proxy.upstream, timeout=30)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                if value:
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            response = upstream.getresponse()
            kept = {n: v for n, v in response.getheaders() if n.lower() not in ("connection", "transfer-encoding")}
            content = response.read()
            if response.status == 500 and "uploadId=" in self.path:
                # moto 5.2 fails on an upload that has ended; S3 says so.
                response.status, content = 404, ERROR.format("NoSuchUpload").encode()
            if self.command != "HEAD":
                kept["Content-Length" if "Content-Length" in kept else "content-length"] = str(len(content))
            return Reply(response.status, kept, content)
        finally:
            upstream.close()

    def _reset(self) -> None:
        """End the connection as a failing network does, not in good order."""
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            # Makes the coming close a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, format: str, *args: Any) -> None:
        pass
