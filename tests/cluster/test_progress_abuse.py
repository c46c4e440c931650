"""One pod against the progress endpoint of a real operator: the others report on, and jobs are reconciled as before."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from finetune_api.outcome import PROGRESS_BODY_LIMIT_BYTES
from finetune_operator.progress import tokens
from finetune_operator.serving.admission import Limits
from tests.cluster.api import Api, wait_until
from tests.cluster.control_plane import HOST
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.reporter import Reporter
from tests.cluster.scene import Scene

ATTACKER = "127.0.0.66"
"""Address of the pod that misbehaves; trainers report from 127.0.0.1."""
CONNECTIONS = 1000
MEBIBYTE = 2**20
GROWTH_BYTES = 64 * MEBIBYTE
"""What the operator may take for all of them: TLS for a handful, and what Python does not give back at once."""

HEAD = b"POST / HTTP/1.1\r\nHost: progress\r\nAuthorization: Bearer x.y.z\r\n"


UNTRUSTING = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
UNTRUSTING.check_hostname, UNTRUSTING.verify_mode = False, ssl.CERT_NONE

Kind = Callable[[socket.socket, ExitStack], None]
"""What somebody does with a connection; what has to be closed later is held."""


def connected(operator: OperatorProcess) -> socket.socket:
    """A connection of the attacker's."""
    return socket.create_connection((HOST, operator.progress_port), timeout=30, source_address=(ATTACKER, 0))


def encrypted(connection: socket.socket, held: ExitStack) -> ssl.SSLSocket:
    return held.enter_context(UNTRUSTING.wrap_socket(connection))


def silent(connection: socket.socket, held: ExitStack) -> None:
    """Says nothing."""


def half_a_handshake(connection: socket.socket, held: ExitStack) -> None:
    """Begins to speak TLS and does not go on."""
    connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")


def no_tls(connection: socket.socket, held: ExitStack) -> None:
    """Speaks something else."""
    connection.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)


def slow_headers(connection: socket.socket, held: ExitStack) -> None:
    """Sends its headers a byte at a time, and never the last."""
    secured = encrypted(connection, held)
    for byte in HEAD:
        secured.sendall(bytes([byte]))


def slow_body(connection: socket.socket, held: ExitStack) -> None:
    """Declares a body, and sends the beginning of it."""
    encrypted(connection, held).sendall(HEAD + b"Content-Length: 100\r\n\r\n{")


def endless_body(connection: socket.socket, held: ExitStack) -> None:
    """Sends far more than a report may have, in pieces."""
    secured = encrypted(connection, held)
    secured.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    for _ in range(100):
        secured.sendall(b"10000\r\n" + b"x" * PROGRESS_BODY_LIMIT_BYTES + b"\r\n")


def endless_headers(connection: socket.socket, held: ExitStack) -> None:
    """Sends headers without end."""
    secured = encrypted(connection, held)
    for _ in range(1000):
        secured.sendall(b"X-More: " + b"x" * 4000 + b"\r\n")


KINDS: list[Kind] = [
    silent,
    half_a_handshake,
    no_tls,
    slow_headers,
    slow_body,
    endless_body,
    endless_headers,
]


@contextmanager
def attack(operator: OperatorProcess, kinds: list[Kind], count: int) -> Iterator[None]:
    """So many connections are made and held, of all kinds in turn, by as many threads as there are kinds."""
    with ExitStack() as held:

        def connect(kind: Kind, number: int) -> None:
            for _ in range(number):
                with suppress(OSError):  # it may be refused, or cut off
                    connection = held.enter_context(connected(operator))
                    kind(connection, held)

        threads = [threading.Thread(target=connect, args=(kind, count // len(kinds))) for kind in kinds]
        for thread in threads:
            thread.start()
        yield
        for thread in threads:
            thread.join()


def memory_bytes(operator: OperatorProcess) -> float:
    """What the operator holds of the machine's memory."""
    return metric(operator, "process_resident_memory_bytes")


def metric(operator: OperatorProcess, name: str) -> float:
    (value,) = [line.split()[1] for line in operator.metrics().splitlines() if line.startswith(f"{name} ")]
    return float(value)


@pytest.mark.parametrize("kinds", [[silent], KINDS], ids=["silent", "all kinds"])
def test_a_thousand_connections_of_one_pod_change_nothing_for_anybody_else(
    reporter: Reporter,
    operator: OperatorProcess,
    api: Api,
    kubelet: Kubelet,
    kinds: list[Kind],
) -> None:
    running = Scene(api, kubelet, "running")
    running.apply()
    (pod,) = running.run()
    token = reporter.token(pod)
    assert reporter.post(token, 1) == 200
    memory, files, log = memory_bytes(operator), metric(operator, "process_open_fds"), operator.server.log_size()
    since = operator.control_plane.audit.position()

    with attack(operator, kinds, CONNECTIONS):
        # The job that runs reports on, and one that is applied now begins.
        for percent in range(2, 12):
            assert reporter.post(token, percent) == 200
        started = Scene(api, kubelet, "started")
        started.apply()
        started.run()
        api.wait("FineTuneJob", "running", lambda job: job["status"]["progress"]["percent"] == 11)
        assert metric(operator, "process_open_fds") <= files + Limits().connections_of_one + 30
        assert memory_bytes(operator) <= memory + GROWTH_BYTES

    assert running.status()["progress"]["percent"] == 11
    assert reporter.reviews(since) <= 1  # none is the attacker's
    assert len(operator.log(log).splitlines()) <= 5
    # Nothing is left of them.
    wait_until(lambda: metric(operator, "process_open_fds"), lambda open_files: open_files <= files + 10)
    assert reporter.post(token, 12) == 200


def test_tokens_that_nobody_signed_cost_the_api_server_a_few_questions_and_the_trainer_nothing(
    reporter: Reporter, operator: OperatorProcess, api: Api, kubelet: Kubelet
) -> None:
    scene = Scene(api, kubelet, "guard")
    scene.apply()
    (pod,) = scene.run()
    good = reporter.token(pod)
    assert reporter.post(good, 1) == 200
    since = operator.control_plane.audit.position()

    statuses: list[int] = []
    head, payload, _ = good.split(".")
    for number in range(3 * tokens.REVIEWS_BURST):
        signature = base64.urlsafe_b64encode(f"signature-{number}".encode()).decode().rstrip("=")
        statuses.append(post_raw(operator, f"{head}.{payload}.{signature}"))
        if number % 20 == 0:
            assert reporter.post(good, 2 + number // 20) == 200
    # What is not asked about is refused before, or its connection is.
    assert set(statuses) <= {401, 429, 0}
    assert statuses.count(401) == pytest.approx(tokens.REVIEWS_BURST, abs=15)
    assert reporter.reviews(since) <= statuses.count(401) + 1
    assert reporter.post(good, 50) == 200


def post_raw(operator: OperatorProcess, token: str) -> int:
    """Post a report from the attacker's address; the status of the answer, 0 where there was none."""
    body = json.dumps({"trainerStatus": {"lastUpdatedTime": "2030-01-02T03:04:05Z"}}).encode()
    request = (
        f"POST / HTTP/1.1\r\nHost: progress\r\nAuthorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    with suppress(OSError), ExitStack() as held:
        secured = encrypted(held.enter_context(connected(operator)), held)
        secured.sendall(request)
        answer = secured.recv(4096).split()
        return int(answer[1]) if len(answer) > 1 else 0
    return 0


@pytest.mark.parametrize("port", ["metrics_port", "health_port"])
def test_the_other_ports_answer_while_one_pod_holds_all_that_it_can(operator: OperatorProcess, port: str) -> None:
    with ExitStack() as held:
        for _ in range(CONNECTIONS):
            held.enter_context(
                socket.create_connection((HOST, getattr(operator, port)), timeout=30, source_address=(ATTACKER, 0))
            )
        assert "finetune_jobs" in operator.metrics()
        assert operator.server.ready()
