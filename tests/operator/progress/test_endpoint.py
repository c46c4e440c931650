"""Real trainers report over HTTPS, with the certificate that the operator put into their namespace."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import KubeflowCallback

from finetune_api.outcome import ProgressReport, TrainerStatus
from finetune_api.status import Phase
from finetune_operator.errors import Unavailable
from finetune_operator.names import CA_KEY
from finetune_operator.progress.app import progress_app
from finetune_operator.progress.authority import CertificateAuthority
from finetune_operator.progress.certificates import LEAF_RENEWAL
from finetune_operator.progress.endpoint import ServerCertificate, endpoint_hosts, progress_endpoint
from finetune_operator.progress.figures import progress_of
from finetune_operator.progress.inbox import Inbox
from finetune_operator.progress.tokens import TokenAuthorizer
from finetune_operator.serving.answers import counted
from finetune_trainer.train import progress_status as ours
from finetune_trainer.train.progress import Endpoint, ProgressReporter
from tests.operator.progress.fake_cluster import JOB_UID, PYTORCHJOB_UID, FakeCluster, worker

GOOD, FOREIGN, EXPIRED, EARLIER = "good", "of-another-worker", "expired", "of-an-earlier-attempt"


class Served:
    """A running endpoint, and files as they are mounted into the pods."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cluster = FakeCluster()
        self.cluster.add_pod(worker(), GOOD)
        self.cluster.add_pod(worker(1), FOREIGN)
        self.cluster.add_pod(worker(attempt=2), EARLIER)
        # So long ago that clients, who have the real time, trust both the first certificate and the next.
        self.now = datetime.now(UTC) - LEAF_RENEWAL
        self.woken: list[tuple[str, str]] = []
        self.answers: list[int] = []
        self.inbox = Inbox(lambda *job: self.woken.append(job), interval_seconds=0)
        self.authority = CertificateAuthority(
            self.cluster,
            namespace="finetune-system",
            secret="finetune-operator-tls",
            config_map="finetune-progress-ca",
            now=lambda: self.now,
        )
        self.certificate = ServerCertificate(
            self.authority, endpoint_hosts(None, "finetune-system"), now=lambda: self.now
        )
        self.url = ""
        self.port = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        authorize = TokenAuthorizer(
            self.cluster, lambda *job: (1, PYTORCHJOB_UID) if job[2] == JOB_UID else None, audience="finetune-operator"
        )
        app = counted(progress_app(authorize, self.inbox.deliver), self.answers.append)
        async with progress_endpoint(app, self.certificate, "127.0.0.1", 0) as self.port:
            self.url = f"https://localhost:{self.port}/"
            await self.authority.ensure_ca("team-a")
            mounted = self.cluster.config_maps["team-a", "finetune-progress-ca"]["data"][CA_KEY]
            self.ca.write_text(mounted)
            yield

    @property
    def ca(self) -> Path:
        return self.folder / "ca.crt"

    def token(self, token: str) -> Path:
        path = self.folder / f"token-{token}"
        path.write_text(f"{token}\n")
        return path

    def newest(self) -> TrainerStatus | None:
        return self.inbox.newest(JOB_UID, 1)

    def post(self, headers: dict[str, str]) -> int:
        status = ours.trainer_status(ours.Progress(phase=ours.Phase.RUNNING, percent=5), self.now)
        return httpx.post(
            self.url,
            json=ProgressReport(trainer_status=status).model_dump(),
            headers=headers,
            verify=ssl.create_default_context(cafile=self.ca),
            trust_env=False,
        ).status_code

    def shown_certificate(self) -> x509.Certificate:
        pem = ssl.get_server_certificate(("localhost", self.port), ca_certs=str(self.ca), timeout=60)
        return x509.load_pem_x509_certificate(pem.encode())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  what is waited for is no event
            await asyncio.sleep(0.001)


def serve(folder: Path, use: Callable[[Served], Awaitable[None]]) -> Served:
    served = Served(folder)

    async def run() -> None:
        async with served.running():
            await use(served)

    asyncio.run(run())
    return served


def test_our_trainer_is_received(tmp_path: Path) -> None:
    def train(served: Served) -> None:
        reporter = ProgressReporter(Endpoint(served.url, served.token(GOOD), served.ca), end_seconds=60)
        reporter.start()
        reporter.update(ours.Progress(phase=ours.Phase.RUNNING, percent=50, step=1, total_steps=2, loss=1.25))
        reporter.publish()
        reporter.finish()

    served = serve(tmp_path, lambda served: asyncio.to_thread(train, served))
    status = served.newest()
    assert status is not None
    progress, phase = progress_of(status)
    assert (progress.percent, progress.step, progress.total_steps, progress.loss) == (100, 1, 2, 1.25)
    assert phase is Phase.PUBLISHING
    assert set(served.woken) == {("team-a", "guard")}
    assert served.answers == [200] * 4


def test_transformers_own_callback_is_received(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KubeflowCallback, "_MIN_UPDATE_INTERVAL", 0.0)

    def train(served: Served) -> None:
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", served.url)
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(served.token(GOOD)))
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_CA_CERT", str(served.ca))
        args = TrainingArguments(output_dir=str(tmp_path), report_to=[])
        state, control = TrainerState(max_steps=8), TrainerControl()
        stock: Any = KubeflowCallback  # not typed
        callback = stock()
        callback.on_train_begin(args, state, control)
        callback.on_log(args, state, control, logs={"loss": 1.25, "learning_rate": 1e-4, "epoch": 0.25})
        state.global_step, state.epoch = 2, 0.25
        callback.on_step_end(args, state, control)

    served = serve(tmp_path, lambda served: asyncio.to_thread(train, served))
    status = served.newest()
    assert status is not None
    progress, phase = progress_of(status)
    assert (progress.percent, progress.step, progress.total_steps) == (25, 2, 8)
    assert (progress.epoch, progress.loss, progress.learning_rate) == (0.25, 1.25, 1e-4)
    assert progress.eta_seconds is not None
    assert phase is Phase.RUNNING
    assert served.answers == [200] * 2


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 401),
        ({"Authorization": "Bearer unknown"}, 401),
        ({"Authorization": f"Bearer {EXPIRED}"}, 401),
        ({"Authorization": f"Bearer {FOREIGN}"}, 403),
        ({"Authorization": f"Bearer {EARLIER}"}, 403),
        ({"Authorization": f"Bearer {GOOD}"}, 200),
    ],
)
def test_tokens_that_are_wrong_expired_foreign_or_missing_change_nothing(
    tmp_path: Path, headers: dict[str, str], expected: int
) -> None:
    async def use(served: Served) -> None:
        served.cluster.reviews[EXPIRED] = {"authenticated": False, "error": "token has expired"}
        assert await asyncio.to_thread(served.post, headers) == expected

    served = serve(tmp_path, use)
    assert (served.newest() is not None) is (expected == 200)
    assert bool(served.woken) is (expected == 200)
    assert served.answers == [expected]


def test_a_client_that_trusts_others_sends_no_token(tmp_path: Path) -> None:
    async def use(served: Served) -> None:
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await asyncio.to_thread(
                httpx.post, served.url, verify=ssl.create_default_context(), trust_env=False, timeout=60
            )

    assert serve(tmp_path, use).cluster.requests.count("review_token") == 0


def test_a_renewed_certificate_is_shown_to_the_next_client_and_trusted_as_before(tmp_path: Path) -> None:
    async def use(served: Served) -> None:
        first = await asyncio.to_thread(served.shown_certificate)
        assert not await served.certificate.renew_if_due()
        served.now += LEAF_RENEWAL
        assert await served.certificate.renew_if_due()
        second = await asyncio.to_thread(served.shown_certificate)
        assert second.serial_number != first.serial_number
        assert second.issuer == first.issuer
        assert second.not_valid_after_utc - first.not_valid_after_utc == LEAF_RENEWAL

    serve(tmp_path, use)


def test_renewal_goes_on_after_an_outage_and_the_old_certificate_serves_meanwhile(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def use(served: Served) -> None:
        first = await asyncio.to_thread(served.shown_certificate)
        served.now += LEAF_RENEWAL
        served.cluster.error = Unavailable(None, "", "no answer")
        keeping = asyncio.create_task(served.certificate.keep_young(check_seconds=0.001))
        await until(lambda: "could not be renewed" in caplog.text)
        assert (await asyncio.to_thread(served.shown_certificate)).serial_number == first.serial_number
        served.cluster.error = None
        await until(lambda: not served.certificate.is_due)
        keeping.cancel()
        assert (await asyncio.to_thread(served.shown_certificate)).serial_number != first.serial_number

    serve(tmp_path, use)


def open_files() -> list[Path]:
    return sorted(Path("/dev/fd").iterdir())


def test_no_file_is_left_of_a_certificate(tmp_path: Path) -> None:
    async def use(served: Served) -> None:
        before = open_files()
        served.now += timedelta(days=25)
        await served.certificate.renew_if_due()
        assert open_files() == before
        assert served.certificate.context.minimum_version == ssl.TLSVersion.TLSv1_2

    serve(tmp_path, use)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        (None, None),
        ("https://progress.example.com", "progress.example.com"),
        ("https://10.0.0.7:8443/any", "10.0.0.7"),
        ("https://[fd00::7]:8443", "fd00::7"),
        ("https://finetune-operator.finetune-system.svc:8443", None),
    ],
)
def test_the_certificate_names_every_address_that_trainers_may_be_given(url: str | None, host: str | None) -> None:
    service = "finetune-operator.finetune-system.svc"
    usual = [service, f"{service}.cluster.local", "localhost", "127.0.0.1", "::1"]
    assert endpoint_hosts(url, "finetune-system") == [*([host] if host else []), *usual]
