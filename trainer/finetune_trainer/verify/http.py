"""Requests to an OpenAI-compatible server: bounded, retried, and each failure one sentence."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import tenacity

from finetune_trainer.verify.report import one_line

_TRIES = 4
_BODY_LIMIT_BYTES = 8 << 20
_TRY_AGAIN = {408, 429, 500, 502, 503, 504}
_TIMEOUT = httpx.Timeout(180, connect=10)
"""Seconds; a server on a CPU takes its time for an answer."""


class ServerError(Exception):
    """The server cannot be asked at all; the text is one sentence."""


class RefusedError(Exception):
    """The server refuses one request; the text is its own sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _AgainError(Exception):
    """Worth another try; carries what is raised when there is none left."""

    def __init__(self, last: Exception) -> None:
        super().__init__(str(last))
        self.last = last


class Server:
    """One server.

    Args:
        url: its address, with or without /v1.
        token: bearer token, or None.
        sleep: waits between tries, for tests.

    Raises:
        ServerError: `url` is no address.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServerError(f"{one_line(url)[:200]} is no address of a server: write http://host:port.")
        if parts.username or parts.password:
            raise ServerError(
                "Credentials do not belong into the server's address: name a variable with --api-key-env."
            )
        if parts.query or parts.fragment:
            raise ServerError("The server's address ends with its path: leave out ? and # and what follows them.")
        path = parts.path.rstrip("/")
        self.base = f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else path + '/v1'}"
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(timeout=_TIMEOUT, headers=headers)
        self._sleep = sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._client.close()

    def get(self, route: str) -> dict[str, Any]:
        """The JSON object at `route`; raises as `post`."""
        return self._asked("GET", route, None)

    def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that `body` is answered with.

        Raises:
            RefusedError: the server refuses this request (400, 404, 422, or a failure of its own).
            ServerError: it cannot be reached, wants other credentials, or is no such server.
        """
        return self._asked("POST", route, body)

    def _asked(self, method: str, route: str, body: dict[str, Any] | None) -> dict[str, Any]:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_AgainError),
            stop=tenacity.stop_after_attempt(_TRIES),
            wait=tenacity.wait_exponential(multiplier=0.5, max=8),
            reraise=True,
            sleep=self._sleep,
        )
        try:
            found: dict[str, Any] = retrying(self._once, method, f"{self.base}{route}", body)
        except _AgainError as error:
            raise error.last from error.__cause__
        return found

    def _once(self, method: str, url: str, body: dict[str, Any] | None) -> dict[str, Any]:
        try:
            with self._client.stream(method, url, json=body) as response:
                data = _bounded(response)
        except httpx.ConnectError as error:
            raise _AgainError(ServerError(f"{self.base} cannot be reached ({one_line(str(error))[:200]}).")) from error
        except httpx.TimeoutException as error:
            raise _AgainError(
                ServerError(f"{self.base} does not answer in time: try again when it is less busy.")
            ) from error
        except httpx.HTTPError as error:
            raise _AgainError(
                ServerError(
                    f"The connection to {self.base} broke ({one_line(str(error))[:200] or type(error).__name__})."
                )
            ) from error
        return self._content(response, data)

    def _content(self, response: httpx.Response, data: bytes) -> dict[str, Any]:
        status, kind = response.status_code, response.headers.get("content-type", "")
        if status in (401, 403):
            raise ServerError(
                f"{self.base} refuses these credentials ({status}): name the variable that holds its token with "
                "--api-key-env."
            )
        if 300 <= status < 400:
            where = one_line(response.headers.get("location", "nowhere"))[:200]
            raise ServerError(f"{self.base} redirects to {where}: give the server's final address.")
        content = _json(data)
        if status >= 400:
            refused = RefusedError(status, f"{status}: {(_sentence(content) or response.reason_phrase).rstrip('.')}")
            if status in _TRY_AGAIN:
                raise _AgainError(refused)
            raise refused
        if not isinstance(content, dict):
            raise ServerError(
                f"{self.base} answers with {one_line(kind)[:60] or 'something'} that is no JSON object: it is no "
                "OpenAI-compatible server."
            )
        return content


def _bounded(response: httpx.Response) -> bytes:
    data = b""
    for part in response.iter_bytes():
        data += part
        if len(data) > _BODY_LIMIT_BYTES:
            raise ServerError(f"The server's answer has more than {_BODY_LIMIT_BYTES >> 20} MiB.")
    return data


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _sentence(content: Any) -> str:
    """The message in an error body, in the shapes that servers use."""
    if not isinstance(content, dict):
        return ""
    error = content.get("error", content)
    for key in ("message", "detail", "error"):
        value = error.get(key) if isinstance(error, dict) else error
        if isinstance(value, str) and value.strip():
            return one_line(value)[:300]
    return ""
