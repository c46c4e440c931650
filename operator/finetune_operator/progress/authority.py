"""Keeps the progress endpoint's certificate authority in one Secret, for as long as the installation lives.

Jobs trust it for as long as they run, so it outlives the operator's process: it is read where there is one, made only
where there is none, and never replaced because it looks odd.
"""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, Protocol

from finetune_operator.errors import Conflict, Forbidden, NotFound, SetupProblem
from finetune_operator.names import CA_KEY, MANAGED_BY_LABEL, MANAGER
from finetune_operator.progress.bundle import bundle_key
from finetune_operator.progress.certificates import Authorities
from finetune_operator.progress.trust import ConfigMapClient, Trust

SECRET_KEY = "ca.key"
"""Key of the Secret with the private keys, in the order of the certificates under CA_KEY."""
CONFLICTS = 10
"""Times that an object is read again because somebody else wrote it in the meantime."""

Object = dict[str, Any]

_log = logging.getLogger(__name__)


class AuthorityClient(ConfigMapClient, Protocol):
    """What is needed of the API server. Objects are raw; failures are finetune_operator.errors.ApiError."""

    async def get_secret(self, namespace: str, name: str) -> Object | None:
        """The Secret, or None."""

    async def create_secret(self, namespace: str, body: Object) -> Object:
        """Create it; Conflict when there is one."""

    async def update_secret(self, namespace: str, body: Object) -> Object:
        """Replace it; Conflict when `metadata.resourceVersion` is no longer the newest."""


class CertificateAuthority:
    """The authority that every operator process of this installation shares.

    Args:
        client: the API server.
        namespace: the operator's own namespace.
        secret: name of the Secret that keeps the authority.
        config_map: name of the ConfigMap that carries its certificate into the jobs' namespaces.
        now: wall clock, UTC.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        client: AuthorityClient,
        *,
        namespace: str,
        secret: str,
        config_map: str,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._secret = secret
        self._now = now
        self._authorities: Authorities | None = None
        self._trust = Trust(
            client,
            config_map=config_map,
            key=bundle_key(namespace, secret),
            certificates=self._certificates,
            now=now,
            clock=clock,
        )

    async def load(self) -> Authorities:
        """Read the authority from the Secret; make it where the Secret is empty or missing, renew it where it ages.

        Raises:
            SetupProblem: the Secret is damaged, or missing and the operator may not create it.
            ApiError: the API server refused or did not answer.
        """
        for _ in range(CONFLICTS):
            try:
                authorities = await self._read_or_write()
            except Conflict:  # another operator was faster: its authority is ours
                continue
            if self._authorities is None or authorities.bundle != self._authorities.bundle:
                self._trust.outdated()
            self._authorities = authorities
            return authorities
        raise SetupProblem(f"Secret {self._where} is changed again and again; find out who writes it.")

    async def ensure_ca(self, namespace: str) -> None:
        """See to it that pods in `namespace` can mount the certificate that they trust the endpoint by.

        Raises:
            SetupProblem: that cannot be done now, whatever the reason is.
        """
        await self._trust.ensure(namespace)

    async def ensure_everywhere(self, namespaces: Iterable[str]) -> None:
        """As `ensure_ca`, in those of `namespaces` that do not have the present certificate yet.

        To be called with the namespaces of open attempts: after the installation was made anew, jobs that run trust
        the old authority until theirs is told. Costs a request for each namespace once in the operator's life, and
        again when the authority changes. Problems go to the log.
        """
        await self._trust.ensure_everywhere(namespaces)

    async def _certificates(self) -> bytes:
        return (self._authorities or await self.load()).bundle

    @property
    def _where(self) -> str:
        return f"{self._namespace}/{self._secret}"

    async def _read_or_write(self) -> Authorities:
        secret = await self._client.get_secret(self._namespace, self._secret)
        if secret is None:
            return await self._create()
        data = secret.get("data") or {}
        if not data.get(CA_KEY) and not data.get(SECRET_KEY):
            authorities = Authorities().renewed(self._now())
        else:
            stored = self._parse(data)
            authorities = stored.renewed(self._now())
            if authorities is stored:
                return stored
        await self._client.update_secret(self._namespace, {**secret, "data": {**data, **_secret_data(authorities)}})
        _log.info("Made a certificate authority for the progress endpoint, in Secret %s.", self._where)
        return authorities

    async def _create(self) -> Authorities:
        authorities = Authorities().renewed(self._now())
        metadata = {"name": self._secret, "namespace": self._namespace, "labels": {MANAGED_BY_LABEL: MANAGER}}
        body = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": _secret_data(authorities)}
        try:
            await self._client.create_secret(self._namespace, body)
        except (Forbidden, NotFound) as error:
            raise SetupProblem(
                f"Secret {self._where} is missing and the operator may not create it ({error}); create it empty: "
                f"kubectl create secret generic {self._secret} --namespace {self._namespace}."
            ) from error
        return authorities

    def _parse(self, data: dict[str, str]) -> Authorities:
        try:
            return Authorities.parse(*(base64.b64decode(data.get(key) or "") for key in (CA_KEY, SECRET_KEY)))
        except ValueError as error:
            raise SetupProblem(
                f"Secret {self._where} is damaged: {error}. Restore it from a backup, or delete its data: "
                "jobs that run now will then report no more progress."
            ) from error


def _secret_data(authorities: Authorities) -> dict[str, str]:
    return {
        CA_KEY: base64.b64encode(authorities.bundle).decode(),
        SECRET_KEY: base64.b64encode(authorities.keys).decode(),
    }
