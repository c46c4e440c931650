"""Trainers trust every installation that looks after their namespace; what stands in the way of that stops no job."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.errors import SetupProblem, api_error
from finetune_operator.names import CA_KEY, MANAGED_BY_LABEL, MANAGER
from finetune_operator.progress import bundle
from finetune_operator.progress.authority import CertificateAuthority
from finetune_operator.progress.bundle import OTHER_CHARACTERS, OTHERS, TRIED, bundle_key, merged
from finetune_operator.progress.certificates import AUTHORITY_LIFE, Authorities, valid_certificates
from finetune_operator.progress.trust import CHECK_SECONDS, RETRY_SECONDS
from tests.operator.progress.fake_cluster import FakeCluster

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
CONFIG_MAP = ("team-a", "finetune-progress-ca")
OURS, THEIRS = "finetune-system", "other-system"
KEY = f"{OURS}.tls.crt"


class Setting:
    """An API server and installations in several namespaces, whose clocks are moved by hand."""

    def __init__(self) -> None:
        self.cluster = FakeCluster()
        self.now = NOW
        self.seconds = 0.0

    def installation(self, namespace: str = OURS) -> CertificateAuthority:
        return CertificateAuthority(
            self.cluster,
            namespace=namespace,
            secret="tls",
            config_map=CONFIG_MAP[1],
            now=lambda: self.now,
            clock=lambda: self.seconds,
        )

    def bundle(self, namespace: str = OURS) -> str:
        """The certificates of an installation."""
        return asyncio.run(self.installation(namespace).load()).bundle.decode()

    @property
    def data(self) -> dict[str, str]:
        data: dict[str, str] = self.cluster.config_maps[CONFIG_MAP]["data"]
        return data

    def put(self, data: dict[str, str], **more: Any) -> None:
        """A ConfigMap is there, ours by its label."""
        metadata = {"name": CONFIG_MAP[1], "namespace": CONFIG_MAP[0], "labels": {MANAGED_BY_LABEL: MANAGER}}
        stored = self.cluster.stored({"metadata": metadata, "data": data, **more})
        self.cluster.config_maps[CONFIG_MAP] = stored

    def writes(self) -> int:
        return sum(request in ("create_config_map", "update_config_map") for request in self.cluster.requests)


def ensure(authority: CertificateAuthority, times: int = 1) -> None:
    async def run() -> None:
        for _ in range(times):
            await authority.ensure_ca(CONFIG_MAP[0])

    asyncio.run(run())


@pytest.fixture
def setting() -> Setting:
    return Setting()


def test_the_certificate_and_nothing_secret_reaches_a_namespace_with_one_write(setting: Setting) -> None:
    ensure(setting.installation(), times=5)
    config_map = setting.cluster.config_maps[CONFIG_MAP]
    assert config_map["data"] == {CA_KEY: setting.bundle(), KEY: setting.bundle()}
    assert config_map["metadata"]["labels"][MANAGED_BY_LABEL] == MANAGER
    assert "PRIVATE" not in str(config_map)
    assert setting.cluster.requests.count("get_config_map") == 1


def test_a_thousand_jobs_at_once_in_one_namespace_cost_one_write(setting: Setting) -> None:
    authority = setting.installation()

    async def run() -> None:
        await asyncio.gather(*(authority.ensure_ca(CONFIG_MAP[0]) for _ in range(1000)))

    asyncio.run(run())
    assert setting.cluster.requests.count("get_config_map") == 1
    assert setting.writes() == 1


def test_a_config_map_that_was_changed_or_deleted_is_put_right_after_a_while(setting: Setting) -> None:
    authority = setting.installation()
    ensure(authority)
    wanted = dict(setting.data)

    changes: list[Callable[[], object]] = [
        lambda: setting.data.update({CA_KEY: "edited"}),
        lambda: setting.data.clear(),
        lambda: setting.cluster.config_maps.clear(),
        lambda: setting.cluster.config_maps[CONFIG_MAP].pop("data"),
    ]
    for change in changes:
        change()
        setting.seconds += CHECK_SECONDS
        ensure(authority)
        assert setting.data == wanted

    setting.cluster.requests.clear()
    setting.seconds += CHECK_SECONDS
    ensure(authority)
    assert setting.cluster.requests == ["get_config_map"]


def test_a_race_for_the_config_map_ends_with_the_certificate_in_it(setting: Setting) -> None:
    authority = setting.installation()
    asyncio.run(authority.load())
    setting.cluster.before_write = lambda: setting.put({CA_KEY: "older"})
    ensure(authority)
    assert setting.data == {CA_KEY: setting.bundle(), KEY: setting.bundle()}


def test_two_installations_with_one_namespace_are_both_trusted_and_come_to_rest(setting: Setting) -> None:
    ours, theirs = setting.installation(), setting.installation(THEIRS)
    for _ in range(10):
        ensure(ours)
        ensure(theirs)
        setting.seconds += CHECK_SECONDS
    both = setting.bundle(OURS), setting.bundle(THEIRS)
    assert both[0] != both[1]
    assert all(bundle in setting.data[CA_KEY] for bundle in both)
    assert setting.writes() == 2


def test_an_authority_that_was_made_anew_takes_the_old_one_back_and_leaves_others_alone(setting: Setting) -> None:
    ensure(setting.installation())
    ensure(setting.installation(THEIRS))
    old = setting.bundle()
    setting.cluster.secrets.pop((OURS, "tls"))

    ensure(setting.installation())
    assert old not in setting.data[CA_KEY]
    assert setting.bundle(OURS) in setting.data[CA_KEY]
    assert setting.bundle(THEIRS) in setting.data[CA_KEY]


def test_what_another_installation_left_behind_goes_when_it_has_expired(setting: Setting) -> None:
    authority = setting.installation()
    ensure(setting.installation(THEIRS))
    ensure(authority)
    setting.now += AUTHORITY_LIFE + timedelta(days=1)
    asyncio.run(authority.load())
    ensure(authority)
    assert setting.data == {CA_KEY: setting.bundle(), KEY: setting.bundle()}


OTHER = Authorities().renewed(NOW).bundle.decode()


@pytest.mark.parametrize(
    "found",
    [
        pytest.param({"theirs.crt": "garbage"}, id="no certificate"),
        pytest.param({"theirs.crt": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"}, id="damaged"),
        pytest.param({"theirs": OTHER}, id="another key"),
        pytest.param({"theirs.crt": OTHER * (OTHER_CHARACTERS // len(OTHER) + 1)}, id="too much"),
        pytest.param({"theirs.crt": None}, id="null"),
        pytest.param({CA_KEY: OTHER}, id="only for trainers"),
        pytest.param([], id="no map"),
    ],
)
def test_what_is_no_installations_certificate_is_not_handed_on(found: Any) -> None:
    assert merged(found, KEY, "ours", NOW) == {CA_KEY: "ours", KEY: "ours"}


def test_of_any_number_of_others_a_few_are_handed_on() -> None:
    data = merged({f"{number:04}.crt": OTHER for number in range(1000)}, KEY, "ours", NOW)
    assert len(data) == OTHERS + 2


@pytest.mark.parametrize("value", ["", "-----BEGIN CERTIFICATE-----", None])
def test_of_very_many_keys_few_are_looked_into(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ConfigMap has room for a hundred thousand that hold no certificate."""
    looked: list[bytes] = []

    def noted(pem: bytes, now: datetime) -> bytes:
        looked.append(pem)
        return valid_certificates(pem, now)

    monkeypatch.setattr(bundle, "valid_certificates", noted)
    junk = {f"{number:05}.crt": value for number in range(TRIED - 1)}
    later = {f"{number:05}.crt": value for number in range(TRIED, 5000)}
    data = merged({**later, **junk, f"{TRIED - 1:05}.crt": OTHER}, KEY, "ours", NOW)
    assert data.keys() == {CA_KEY, KEY, f"{TRIED - 1:05}.crt"}
    assert len(looked) <= TRIED


@given(st.dictionaries(st.text(max_size=20) | st.just("a.crt"), st.text() | st.just(OTHER), max_size=5))
def test_whatever_stands_there_the_result_is_ours_and_whole_certificates_and_stays(found: dict[str, str]) -> None:
    data = merged(found, KEY, OTHER, NOW)
    assert data[KEY] == OTHER
    assert len(x509.load_pem_x509_certificates(data[CA_KEY].encode())) == len(data) - 1
    assert merged(data, KEY, OTHER, NOW) == data


def test_keys_are_what_a_config_map_takes_however_long_the_names() -> None:
    key = bundle_key("n" * 63, "s" * 253)
    assert len(key) <= 253
    assert key.endswith(".crt")


def foreign(setting: Setting) -> None:
    setting.put({"mine": "1"})
    setting.cluster.config_maps[CONFIG_MAP]["metadata"]["labels"] = {MANAGED_BY_LABEL: "Helm"}


def unlabelled(setting: Setting) -> None:
    setting.put({"mine": "1"})
    setting.cluster.config_maps[CONFIG_MAP]["metadata"]["labels"] = None


def immutable(setting: Setting) -> None:
    setting.put({CA_KEY: "older"}, immutable=True)


def written_by_somebody_all_the_time(setting: Setting) -> None:
    def again() -> None:
        setting.put({CA_KEY: "theirs"})
        setting.cluster.before_write = again

    again()


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (foreign, "team-a/finetune-progress-ca exists and is not the operator's; rename or delete it"),
        (unlabelled, "team-a/finetune-progress-ca exists and is not the operator's; rename or delete it"),
        (immutable, "team-a/finetune-progress-ca is immutable and does not hold the present certificates; delete it"),
        (written_by_somebody_all_the_time, "team-a/finetune-progress-ca is changed again and again"),
    ],
)
def test_a_config_map_that_cannot_be_ours_is_reported_each_time_and_left_alone(
    setting: Setting, prepare: Callable[[Setting], None], said: str
) -> None:
    authority = setting.installation()
    asyncio.run(authority.load())
    prepare(setting)
    before = setting.cluster.config_maps[CONFIG_MAP]
    for _ in range(2):
        with pytest.raises(SetupProblem, match=said):
            ensure(authority)
    assert setting.cluster.config_maps[CONFIG_MAP]["data"] in (before["data"], {CA_KEY: "theirs"})
    assert "update_config_map" not in setting.cluster.requests or prepare is written_by_somebody_all_the_time


def test_an_immutable_config_map_that_is_right_is_no_problem(setting: Setting) -> None:
    setting.put({CA_KEY: setting.bundle(), KEY: setting.bundle()}, immutable=True)
    ensure(setting.installation())


STATUSES = [400, 401, 403, 404, 405, 409, 413, 418, 422, 429, 500, 503, 504, None]
SECRET_REQUESTS = ["get_secret", "create_secret"]
CONFIG_MAP_REQUESTS = ["get_config_map", "create_config_map"]


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("request_name", [*SECRET_REQUESTS, *CONFIG_MAP_REQUESTS, "update_config_map"])
def test_whatever_the_api_server_answers_is_a_sentence_about_the_right_object_and_nothing_else(
    setting: Setting, request_name: str, status: int | None
) -> None:
    if request_name == "update_config_map":
        setting.put({CA_KEY: "older"})
    refusal = 'admission webhook "policy.example.com" denied the request' if status != 409 else "changed"
    setting.cluster.refused[request_name] = api_error(status, message=refusal)
    authority = setting.installation()
    with pytest.raises(SetupProblem) as raised:
        ensure(authority)
    sentence = str(raised.value)
    is_about_secret = request_name in SECRET_REQUESTS
    assert sentence.endswith((".", "?", "writes it."))
    assert ("Secret" in sentence) is is_about_secret
    assert ("ConfigMap team-a/finetune-progress-ca" in sentence) is not is_about_secret
    assert refusal in sentence or status == 409

    # The jobs that come next neither wait nor ask; after a while one tries again, and it is well.
    setting.cluster.requests.clear()
    with pytest.raises(SetupProblem):
        ensure(authority, times=5)
    assert setting.cluster.requests == []
    setting.cluster.refused.clear()
    setting.seconds += RETRY_SECONDS
    ensure(authority)
    assert setting.data[KEY] == setting.bundle()


def test_a_namespace_that_is_being_deleted_is_said_to_be(setting: Setting) -> None:
    message = "configmaps is forbidden: unable to create new content in namespace team-a because it is being terminated"
    setting.cluster.refused["create_config_map"] = api_error(403, "Forbidden", message)
    with pytest.raises(SetupProblem, match="since its namespace is being deleted"):
        ensure(setting.installation())


def test_an_api_server_that_does_not_answer_holds_an_attempt_up_for_seconds_only(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(namespace: str, name: str) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("finetune_operator.progress.trust.LIMIT_SECONDS", 0.01)
    monkeypatch.setattr(setting.cluster, "get_config_map", silent)
    with pytest.raises(SetupProblem, match=r"could not be written within 0\.01 s"):
        ensure(setting.installation())


def everywhere(authority: CertificateAuthority, *namespaces: str) -> None:
    asyncio.run(authority.ensure_everywhere(namespaces))


def holders(setting: Setting, bundle: str) -> set[str]:
    return {key[0] for key, found in setting.cluster.config_maps.items() if bundle in found["data"][CA_KEY]}


def test_after_a_new_installation_jobs_that_run_trust_it_without_a_new_attempt(setting: Setting) -> None:
    everywhere(setting.installation(), "team-a", "team-b")
    setting.cluster.secrets.clear()
    everywhere(setting.installation(), "team-a", "team-b")
    assert holders(setting, setting.bundle()) == {"team-a", "team-b"}


def test_what_is_right_everywhere_costs_no_request_until_the_authority_changes(setting: Setting) -> None:
    authority = setting.installation()
    everywhere(authority, "team-a", "team-b")
    setting.cluster.requests.clear()
    for _ in range(20):
        setting.seconds += CHECK_SECONDS
        everywhere(authority, "team-a", "team-b")
    assert setting.cluster.requests == []
    everywhere(authority, "team-a", "team-c")
    assert setting.writes() == 1
    setting.now += AUTHORITY_LIFE * 0.95
    asyncio.run(authority.load())
    everywhere(authority, "team-a", "team-c")
    assert holders(setting, setting.bundle()) == {"team-a", "team-c"}


def test_a_namespace_that_cannot_have_it_is_told_and_keeps_no_other_from_it(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    immutable(setting)
    authority = setting.installation()
    for _ in range(3):
        everywhere(authority, "team-a", "team-b", "team-c")
    assert holders(setting, setting.bundle()) == {"team-b", "team-c"}
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("Jobs in namespace team-a may show no progress: ConfigMap team-a/")


def test_namespaces_that_come_and_go_are_forgotten(setting: Setting) -> None:
    authority = setting.installation()
    setting.cluster.refused["get_config_map"] = api_error(404)
    for number in range(100):
        everywhere(authority, f"team-{number}")
        setting.seconds += RETRY_SECONDS
    setting.cluster.refused.clear()
    for number in range(100):
        everywhere(authority, f"team-{number}")
        setting.seconds += CHECK_SECONDS
    trust = authority._trust
    assert [len(kept) for kept in (trust._done, trust._failed, trust._busy)] == [1, 0, 0]
