"""HTTP to the API server: one pool of connections, one way to ask, and errors that say what was refused.

The client library finds the API server and proves who we are; objects stay JSON, because turning thousands of pods
into classes costs more than everything else here. Requests are never repeated here: whoever asked decides anew.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Self
from urllib.parse import quote, urlencode

import aiohttp
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

from finetune_operator.decoding import Garbled, decoded, encoded, without_managed_fields
from finetune_operator.errors import SetupProblem, api_error

Raw = dict[str, Any]

REQUEST_TIMEOUT_SECONDS = 30.0
CONNECTIONS = 32
RETRY_AFTER_LIMIT_SECONDS = 300.0
"""However long a server asks to be left alone, nobody waits longer (seconds)."""
PAGE_BYTES = 2**20
"""Size that a page of a list is to have: what is read at once holds up everything else."""
READ_BYTES = 2 * 2**20
"""Most that is read of a page of several objects: it takes 20 ms to parse, and becomes 20 MB of Python's objects; twice
that where it is made of nothing but empty lists."""
FIRST_PAGE, MOST_PAGE = 25, 500
"""Objects per page: the first page shows how large they are, which says little of those that come after it."""
SHRINKING = 4
"""A page that is too large is asked for again with so many times fewer objects."""
METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
"""Answers without spec and status."""


class Wire:
    """Requests as method and path; every method may raise an `errors.ApiError`. Use as `async with`."""

    def __init__(self, configuration: Configuration, *, timeout_seconds: float = REQUEST_TIMEOUT_SECONDS) -> None:
        self._configuration = configuration
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._client: ApiClient | None = None
        self._pool: aiohttp.ClientSession | None = None

    @classmethod
    async def connect(cls) -> Self:
        """A wire as the pod's service account or the kubeconfig names it.

        Raises:
            SetupProblem: there is neither.
        """
        configuration = Configuration()
        try:
            load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call] # the client's
        except ConfigException as no_pod:
            try:
                await load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call] # likewise
            except ConfigException as error:
                raise SetupProblem(
                    f"No API server is known, by a pod's account ({no_pod}) or otherwise ({error})."
                ) from error
        return cls(configuration)

    async def __aenter__(self) -> Self:
        self._client = ApiClient(self._configuration)
        self._pool = self.session(limit=CONNECTIONS)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._pool is not None:
            await self._pool.close()
        if self._client is not None:
            await self._client.close()  # type: ignore[no-untyped-call] # the client's

    @property
    def server(self) -> str:
        """URL of the API server."""
        return self._configuration.host.rstrip("/")

    def session(self, *, limit: int = 0, **more: Any) -> aiohttp.ClientSession:
        """A pool of connections of its own to the API server, without authorization.

        Args:
            limit: most connections; 0 for any number.
            more: further arguments of aiohttp.ClientSession.
        """
        if self._client is None:
            raise RuntimeError("The wire is used outside of `async with`.")
        connector = aiohttp.TCPConnector(limit=limit, ssl=self._client.rest_client.ssl_context)
        # Without trust_env: or aiohttp reads ~/.netrc before every request, in a thread.
        return aiohttp.ClientSession(connector=connector, proxy=self._configuration.proxy, trust_env=False, **more)

    async def authorization(self) -> dict[str, str]:
        """The header that proves who we are; a pod's token changes every hour.

        Raises:
            Unavailable: the token cannot be read.
        """
        try:
            found = await self._configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        except (ConfigException, OSError, ValueError) as error:
            text = f"The operator's token for the API server cannot be read ({error})."
            raise api_error(None, type(error).__name__, text) from error
        return {"Authorization": found} if found else {}

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
        accept: str = "application/json",
    ) -> Raw:
        """The object that the API server answers with."""
        _, answer = await self._exchange(method, path, body=body, query=query, accept=accept)
        return answer

    async def pages(self, path: str, query: Mapping[str, str], *, accept: str) -> AsyncIterator[list[Raw]]:
        """The objects of a list, page by page. Pages become smaller where objects are large.

        Any tenant can fill objects with 1.5 MB each, and what comes next is only known once it is there: a page that
        is too large is dropped unparsed. One object is read whatever its size, so a list always comes to its end.
        """
        token, limit = "", FIRST_PAGE
        while True:
            page = {**query, "limit": str(limit)} | ({"continue": token} if token else {})
            at_most = READ_BYTES if limit > 1 else None
            try:
                size, answer = await self._exchange("GET", path, query=page, accept=accept, at_most=at_most)
            except _TooLarge:
                limit = max(1, limit // SHRINKING)
                continue
            items, token = _page(answer)
            del answer  # or it is held, with all that the one who asked has dropped of it, until the next has come
            fitting = PAGE_BYTES * max(1, len(items)) // max(1, size)
            limit = max(1, min(MOST_PAGE, 2 * limit, fitting))
            yield items
            del items
            if not token:
                return

    async def _exchange(
        self,
        method: str,
        path: str,
        *,
        accept: str,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
        at_most: int | None = None,
    ) -> tuple[int, Raw]:
        """Size of the answer (bytes), and the answer.

        Raises:
            _TooLarge: it is larger than `at_most`.
        """
        if self._pool is None:
            raise RuntimeError("The wire is used outside of `async with`.")
        url = f"{self.server}/{path}" + (f"?{urlencode(query)}" if query else "")
        headers = {"Accept": accept, **await self.authorization()}
        if body is not None:
            headers["Content-Type"] = "application/json"
        content = encoded(body) if body is not None else None
        try:
            request = self._pool.request(method, url, data=content, headers=headers, timeout=self._timeout)
            async with request as answer:
                content = await _read(answer, at_most)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            text = str(error) or type(error).__name__
            raise api_error(None, type(error).__name__, f"The API server gave no answer ({text}).") from error
        if not 200 <= answer.status < 300:
            raise await _refusal(answer, content)
        try:
            found = await decoded(content)
        except Garbled as error:
            raise _garbled() from error
        if not isinstance(found, dict):
            raise _garbled()
        return len(content), found


class _TooLarge(Exception):  # noqa: N818  what the answer is
    """An answer is larger than what is read of it."""


async def _read(answer: aiohttp.ClientResponse, at_most: int | None) -> bytes:
    """The content.

    Raises:
        _TooLarge: it is larger than `at_most` bytes; the connection goes, with all that is still to come.
    """
    if at_most is None:
        return await answer.read()
    content = bytearray()
    async for piece in answer.content.iter_any():
        content += piece
        if len(content) > at_most:
            answer.close()
            raise _TooLarge
    return bytes(content)


def api_path(api: str, namespace: str | None, *parts: str) -> str:
    """Path of a collection or object below `api`."""
    within = f"namespaces/{quote(namespace, safe='')}/" if namespace else ""
    return f"{api}/{within}" + "/".join(quote(part, safe="") for part in parts)


def is_object(item: Any) -> bool:
    """Whether that is an object of the API server's: nobody can do anything with one that has no name."""
    metadata = item.get("metadata") if isinstance(item, dict) else None
    return isinstance(metadata, dict) and all(
        isinstance(metadata.get(key), str) for key in ("namespace", "name", "uid", "resourceVersion")
    )


def checked(answer: Raw) -> Raw:
    """`answer`, if it is an object.

    Raises:
        Unavailable: it is none. What was asked for may be there, or done, all the same.
    """
    if not is_object(answer):
        raise _garbled()
    return answer


def _page(answer: Raw) -> tuple[list[Raw], str]:
    """The objects of a page, without what is none, and the token of the next page or "".

    Raises:
        Unavailable: it is no page. An empty one says that there are none, and jobs end by that.
    """
    metadata, items = answer.get("metadata"), answer.get("items", ())
    token = metadata.get("continue") or "" if isinstance(metadata, dict) and metadata else None
    if not isinstance(token, str) or not (items is None or isinstance(items, list)):
        raise _garbled()
    return [without_managed_fields(item) for item in items or () if is_object(item)], token


def _garbled() -> Exception:
    return api_error(None, "Garbled", "The API server's answer cannot be read.")


async def _refusal(answer: aiohttp.ClientResponse, content: bytes) -> Exception:
    try:
        status = await decoded(content)
    except Garbled:
        status = {}
    status = status if isinstance(status, dict) else {}
    wait = answer.headers.get("Retry-After", "")
    return api_error(
        answer.status,
        str(status.get("reason") or ""),
        str(status.get("message") or f"{answer.status} {answer.reason}"),
        min(float(wait), RETRY_AFTER_LIMIT_SECONDS) if wait.isdecimal() else None,
    )
