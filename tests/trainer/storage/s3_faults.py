"""Stands between a client and an S3 server, and does to their conversation what networks and servers do to it.

One connection carries one request, byte by byte as it came, so that signatures stay valid.
"""

from __future__ import annotations

import enum
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

_BUFFER = 1 << 16


class Fault(enum.Enum):
    """What becomes of one request."""

    ERROR = "500"
    """Refused by a server in trouble, and not carried out."""
    SLOW_DOWN = "503 SlowDown"
    RESET = "connection reset"
    """Before it is carried out."""
    LOST_ANSWER = "answer lost"
    """Carried out, then reset."""
    SILENT = "no answer"
    STALL = "stalls in the middle"
    """Half of the answer's content, and no end."""
    CUT = "cut short"
    """Half of the answer's content, then the end of the connection."""
    CHANGED_ANSWER = "answer changed"
    """One byte of the content, each time another."""
    CHANGED_REQUEST = "request changed"


@dataclass(frozen=True)
class Request:
    """What a rule decides by."""

    method: str
    path: str
    """As in the request, with its query."""


Rule = Callable[[Request], Fault | None]


class S3Faults:
    """A proxy; `run_s3_faults` makes one."""

    def __init__(self, endpoint: str) -> None:
        self.rule: Rule = lambda _: None
        self.requests: list[tuple[Request, Fault | None]] = []
        upstream = urlsplit(endpoint)
        self._upstream = (upstream.hostname or "", upstream.port or 80)
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._answer)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def stop(self) -> None:
        """End everything, also what is silent."""
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def times(self, fault: Fault, count: int | None, applies: Callable[[Request], bool] = lambda _: True) -> None:
        """From now on `fault` befalls the first `count` requests that it applies to, all when that is None."""
        befallen = [0]

        def rule(request: Request) -> Fault | None:
            if not applies(request) or (count is not None and befallen[0] >= count):
                return None
            befallen[0] += 1
            return fault

        self.rule = rule

    def befallen(self) -> int:
        """How many requests went wrong."""
        return sum(fault is not None for _, fault in self.requests)

    def _answer(self, client: socket.socket) -> None:
        head, body = _read_request(client)
        if not head:
            return
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
        request = Request(method, path)
        with self._lock:
            fault = self.rule(request)
            self.requests.append((request, fault))
        if fault in (Fault.ERROR, Fault.SLOW_DOWN):
            client.sendall(_refusal(fault))
        elif fault is Fault.RESET:
            _reset(client)
        elif fault is Fault.SILENT:
            self._ended.wait()
        else:
            answer = self._carry_out(
                head, _changed(body, len(self.requests)) if fault is Fault.CHANGED_REQUEST else body
            )
            self._give_back(client, answer, fault)

    def _give_back(self, client: socket.socket, answer: bytes, fault: Fault | None) -> None:
        head, _, content = answer.partition(b"\r\n\r\n")
        head += b"\r\nConnection: close\r\n\r\n"
        half = content[: len(content) // 2]
        if fault is Fault.LOST_ANSWER:
            _reset(client)
        elif fault is Fault.STALL:
            client.sendall(head + half)
            self._ended.wait()
        elif fault is Fault.CUT:
            client.sendall(head + half)
        elif fault is Fault.CHANGED_ANSWER:
            client.sendall(head + _changed(content, len(self.requests)))
        else:
            client.sendall(head + content)

    def _carry_out(self, head: bytes, body: bytes) -> bytes:
        with socket.create_connection(self._upstream, timeout=60) as upstream:
            upstream.sendall(head + b"Connection: close\r\n\r\n" + body)
            parts = []
            while part := upstream.recv(_BUFFER):
                parts.append(part)
        return b"".join(parts)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], answer: Callable[[socket.socket], None]) -> None:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                try:
                    answer(self.request)
                except OSError:
                    # The client has given up.
                    return

        super().__init__(address, Handler)


@contextmanager
def run_s3_faults(endpoint: str) -> Iterator[S3Faults]:
    """A proxy in front of the server at `endpoint`; it is ended whatever happens."""
    proxy = S3Faults(endpoint)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


def _read_request(client: socket.socket) -> tuple[bytes, bytes]:
    """(its head without the empty line, and without what the proxy itself settles; its content)."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = client.recv(_BUFFER)
        if not part:
            return b"", b""
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    lines, length = [], 0
    for line in head.split(b"\r\n"):
        name = line.partition(b":")[0].lower()
        if name == b"content-length":
            length = int(line.partition(b":")[2])
        if name == b"expect":
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif name != b"connection":
            lines.append(line)
    while len(body) < length:
        part = client.recv(_BUFFER)
        if not part:
            return b"", b""
        body += part
    return b"\r\n".join(lines) + b"\r\n", body


def _refusal(fault: Fault) -> bytes:
    status, code = ("500 Internal Server Error", "InternalError") if fault is Fault.ERROR else ("503", "SlowDown")
    content = f"<Error><Code>{code}</Code><Message>Later.</Message></Error>".encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(content)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + content


def _reset(client: socket.socket) -> None:
    """The connection breaks, also for a client that still sends."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def _changed(content: bytes, where: int) -> bytes:
    place = (len(content) // 2 + where) % len(content) if content else 0
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] if content else content
