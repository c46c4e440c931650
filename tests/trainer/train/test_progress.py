"""Progress reaches the server at the right moments, and no failure of the server reaches the training."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from finetune_api.outcome import ProgressMetric, TrainerStatus
from finetune_trainer.train.progress import Endpoint, ProgressReporter
from finetune_trainer.train.progress_status import (
    Phase,
    Progress,
    percent_done,
    remaining_seconds,
    trainer_status,
)
from tests.progress_receiver import Receiver, run_receiver

NEVER = 3600.0
NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with run_receiver() as server:
        yield server


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("right\n")
    return path


def running(step: int, total: int = 10) -> Progress:
    return Progress(phase=Phase.RUNNING, percent=percent_done(step, total), step=step, total_steps=total, loss=1 / step)


def seen(reports: list[TrainerStatus]) -> list[tuple[str | None, int | None]]:
    return [(report.text(ProgressMetric.PHASE), report.progress_percentage) for report in reports]


def test_start_changes_of_phase_and_the_end_are_posted_and_between_them_no_more_than_the_interval_allows(
    receiver: Receiver, token: Path
) -> None:
    reporter = ProgressReporter(Endpoint(receiver.url, token), interval_seconds=NEVER, now=lambda: NOW)
    reporter.start()
    for done in range(0, 101, 10):
        reporter.preparing(done, 100)
    for step in range(1, 11):
        reporter.update(running(step))
    reporter.publish()
    reporter.finish()

    reports = receiver.wait_for_reports(4)
    assert seen(reports) == [("Preparing", 0), ("Running", 10), ("Publishing", 99), ("Publishing", 100)]
    assert reports[-1].number(ProgressMetric.LOSS) == pytest.approx(0.1)
    assert reports[-1].estimated_remaining_seconds == 0
    assert {report.last_updated_time for report in reports} == {"2030-01-02T03:04:05+00:00"}


def test_between_the_milestones_the_newest_is_posted(receiver: Receiver, token: Path) -> None:
    reporter = ProgressReporter(Endpoint(receiver.url, token), interval_seconds=0)
    reporter.start()
    receiver.wait_for_reports(1)
    receiver.answers.clear()
    for done in (10, 20, 30, 40):
        reporter.preparing(done, 100)
    receiver.answers.set()

    reports = receiver.wait_for_reports(2)
    while seen(reports)[-1] != ("Preparing", 40):
        reports = receiver.wait_for_reports(len(reports) + 1)
    # The first of the four may already be on its way when the second comes; the two between were overtaken.
    assert len(reports) <= 3
    reporter.close()


def test_after_a_failure_nothing_claims_the_end(receiver: Receiver, token: Path) -> None:
    reporter = ProgressReporter(Endpoint(receiver.url, token), interval_seconds=NEVER)
    reporter.start()
    reporter.update(running(3))
    reporter.close()
    reporter.update(running(4))
    reporter.finish()
    assert seen(receiver.wait_for_reports(2)) == [("Preparing", 0), ("Running", 30)]


def test_the_token_is_read_again_for_every_post(receiver: Receiver, token: Path) -> None:
    reporter = ProgressReporter(Endpoint(receiver.url, token), interval_seconds=0)
    reporter.start()
    receiver.wait_for_reports(1)
    receiver.tokens = {"rotated"}
    token.write_text("rotated")
    reporter.update(running(1))
    assert len(receiver.wait_for_reports(2)) == 2
    reporter.close()


def test_an_outage_is_logged_once_and_posting_goes_on_after_it(
    receiver: Receiver, token: Path, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.tokens = set()
    reporter = ProgressReporter(Endpoint(receiver.url, token), interval_seconds=0)
    reporter.start()
    receiver.wait_for_posts(1)
    reporter.update(running(1))
    receiver.wait_for_posts(2)
    receiver.tokens = {"right"}
    # The answer to the second post may still be under way, and this one replaces it.
    reporter.publish()
    assert seen(receiver.wait_for_reports(1)) == [("Publishing", 99)]
    reporter.finish()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "Progress cannot be reported (the server answered 401); training goes on."
    ]


@pytest.mark.parametrize(
    ("url", "content", "cause"),
    [
        ("http://127.0.0.1:1/", "right", "Connection refused"),
        (None, "two\nlines", "LocalProtocolError"),
        ("http://127.0.0.1:1/", "schlüssel", "UnicodeDecodeError"),
        ("http://127.0.0.1:1/", None, "No such file"),
        ("nonsense", "right", "UnsupportedProtocol"),
        ("http://127.0.0.1:port/", "right", "InvalidURL"),
    ],
)
def test_what_goes_wrong_is_one_log_line_without_the_token(
    receiver: Receiver,
    url: str | None,
    content: str | None,
    cause: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    token = tmp_path / "token"
    if content is not None:
        token.write_text(content, encoding="utf-8")
    reporter = ProgressReporter(Endpoint(url or receiver.url, token), interval_seconds=0)
    reporter.start()
    reporter.update(running(1))
    reporter.finish()
    [line] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert cause in line
    assert line.endswith("training goes on.")
    assert content is None or content not in line


def test_a_server_that_never_answers_does_not_hold_up_the_end(receiver: Receiver, token: Path) -> None:
    receiver.answers.clear()
    reporter = ProgressReporter(Endpoint(receiver.url, token), end_seconds=0.01)
    reporter.start()
    reporter.update(running(1))
    reporter.finish()
    assert receiver.reports == []
    # The thread goes on by itself; it must be through before the server is gone.
    receiver.answers.set()
    receiver.wait_for_reports(3)


@pytest.mark.parametrize("environ", [{}, {"KUBEFLOW_TRAINER_SERVER_URL": ""}])
def test_without_an_address_nothing_is_posted_or_logged(
    environ: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    reporter = ProgressReporter.from_environment(environ)
    reporter.start()
    reporter.update(running(1))
    reporter.publish()
    reporter.finish()
    assert caplog.records == []


def test_an_address_without_a_token_file_is_one_warning(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    reporter = ProgressReporter.from_environment({"KUBEFLOW_TRAINER_SERVER_URL": receiver.url})
    reporter.start()
    reporter.finish()
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "KUBEFLOW_TRAINER_SERVER_TOKEN names no token file" in record.getMessage()
    assert receiver.posts == 0


def test_proxies_for_the_internet_are_not_used(
    receiver: Receiver, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    reporter = ProgressReporter(Endpoint(receiver.url, token))
    reporter.start()
    reporter.finish()
    assert len(receiver.wait_for_reports(2)) == 2


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "progress")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_path, key_path = folder / "ca.crt", folder / "tls.key"
    certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate_path, key_path


def test_the_servers_certificate_must_be_signed_by_the_named_authority(
    tmp_path: Path, token: Path, caplog: pytest.LogCaptureFixture
) -> None:
    certificate, key = self_signed(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with run_receiver(tls) as receiver:
        environ = {"KUBEFLOW_TRAINER_SERVER_URL": receiver.url, "KUBEFLOW_TRAINER_SERVER_TOKEN": str(token)}
        stranger = ProgressReporter.from_environment(environ)
        stranger.start()
        stranger.finish()
        assert receiver.posts == 0
        assert "CERTIFICATE_VERIFY_FAILED" in caplog.text

        trusting = ProgressReporter.from_environment({**environ, "KUBEFLOW_TRAINER_SERVER_CA_CERT": str(certificate)})
        trusting.start()
        trusting.finish()
        assert len(receiver.wait_for_reports(2)) == 2


@pytest.mark.parametrize(
    ("done", "total", "expected"),
    [
        (0, 10, 0),
        (1, 3, 33),
        (999, 1000, 99),
        (1000, 1000, 99),
        (12, 10, 99),
        (-1, 10, 0),
        (5, 0, None),
        (5, None, None),
    ],
)
def test_a_percentage_is_whole_and_100_only_at_the_end(done: int, total: int | None, expected: int | None) -> None:
    assert percent_done(done, total) == expected


@pytest.mark.parametrize(
    ("first_step", "step", "total_steps", "elapsed_seconds", "expected"),
    [
        (0, 0, 100, 5.0, None),
        (0, 10, 100, 20.0, 180.0),
        # Resumed at 80: ten steps took 20 s, ten are left. The whole run's mean would have said 2 s.
        (80, 90, 100, 20.0, 20.0),
        (80, 80, 100, 20.0, None),
        (0, 100, 100, 20.0, 0.0),
        (0, 101, 100, 20.0, 0.0),
        (0, 5, 0, 20.0, None),
    ],
)
def test_the_time_left_follows_from_this_attempts_own_pace(
    first_step: int, step: int, total_steps: int, elapsed_seconds: float, expected: float | None
) -> None:
    left = remaining_seconds(first_step=first_step, step=step, total_steps=total_steps, elapsed_seconds=elapsed_seconds)
    assert left == expected


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf")])
def test_a_figure_that_was_not_measured_is_not_sent(missing: float | None) -> None:
    progress = Progress(
        phase=Phase.RUNNING, step=0, loss=missing, eval_loss=missing, learning_rate=1e-4, remaining_seconds=missing
    )
    status = trainer_status(progress, NOW)
    assert {metric.name: metric.value for metric in status.metrics} == {
        "phase": "Running",
        "current_step": "0",
        "learning_rate": "0.0001",
    }
    assert status.estimated_remaining_seconds is None
    assert status.progress_percentage is None
