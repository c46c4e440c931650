"""A small Hugging Face Hub on loopback: the endpoints that huggingface_hub calls, and the refusals a job can meet.

Statuses and headers follow the Hub's own: X-Error-Code, X-Repo-Commit, ETag, Retry-After.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIGNATURE = "X-Amz-Signature=0a1b2c3d"
"""What makes an address of the content network a secret for some minutes."""
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
_RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass(frozen=True)
class Refusal:
    """An answer other than 200."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repo:
    """A repository with one commit on the branch `main`, until it moves."""

    files: dict[str, bytes]
    """Of the commit that `main` is at."""
    gated_files: bool = False
    """The Hub describes a gated repository to anybody; only its files are refused."""
    token: str | None = None
    """Needed for the files of a gated repository."""
    licence_accepted: bool = True
    commit: str = COMMIT
    """Where `main` is."""
    earlier: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files of the commits that `main` was at."""

    next_push: tuple[str, dict[str, bytes]] | None = None
    """Commit and files that are pushed as soon as somebody fetched a file."""

    def move(self, commit: str, files: dict[str, bytes]) -> None:
        """Push a commit to `main`."""
        self.earlier[self.commit] = self.files
        self.commit, self.files = commit, files

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a branch or commit, None when there is none."""
        if revision in ("main", self.commit):
            return self.commit, self.files
        return (revision, self.earlier[revision]) if revision in self.earlier else None


@dataclass
class Hub:
    """State of the server; tests change it between calls."""

    endpoint: str
    repos: dict[str, Repo] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    """Answers to the next requests, in order, whatever they ask for."""
    always: Refusal | None = None
    """Answer to every request."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path) of every request so far."""
    tokens: set[str] = field(default_factory=set)
    """Every token that was sent."""

    content_network: bool = False
    """Whether files are redirected to another host, at a signed address, as the Hub does with large ones."""
    content_network_refusal: Refusal | None = None
    content_network_tokens: set[str] = field(default_factory=set)
    """Tokens that the other host got to see: none should."""

    def downloads(self) -> set[str]:
        """Names of the files whose content was asked for."""
        found = (_RESOLVE.fullmatch(path) for method, path in self.requests if method == "GET")
        return {match.group(4) for match in found if match}


@contextmanager
def run_hub() -> Iterator[Hub]:
    """Serve a Hub without repositories until the block ends."""
    hub = Hub("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self._hub = hub
        super().__init__(*arguments)

    def do_GET(self) -> None:
        hub = self._hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token:
            (hub.content_network_tokens if path.startswith("/cdn/") else hub.tokens).add(token)
        if path.startswith("/cdn/"):
            self._content(hub, path.removeprefix("/cdn/"))
        elif hub.always is not None:
            self._refuse(hub.always)
        elif hub.refusals:
            self._refuse(hub.refusals.pop(0))
        elif match := _API.fullmatch(path):
            self._describe(hub, match.group(2), match.group(3), match.group(4), token)
        elif match := _RESOLVE.fullmatch(path):
            self._file(hub, match.group(2), match.group(3), match.group(4), token)
        else:
            self._refuse(Refusal(404))

    do_HEAD = do_GET  # noqa: N815 - the base class looks for this name

    def _describe(self, hub: Hub, name: str, what: str | None, revision: str | None, token: str | None) -> None:
        repo = self._repo(hub, name, revision or "main", token)
        found = repo.at(revision or "main") if repo else None
        if found is None:
            return
        commit, files = found
        if what == "tree":
            self._json([{"type": "file", "path": path, **_sizes(data)} for path, data in files.items()])
            return
        siblings = [{"rfilename": path, "blobId": _etag(data), "size": len(data)} for path, data in files.items()]
        self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": False})

    def _file(self, hub: Hub, name: str, revision: str, path: str, token: str | None) -> None:
        repo = self._repo(hub, name, revision, token)
        found = repo.at(revision) if repo else None
        if repo is None or found is None:
            return
        commit, files = found
        if repo.gated_files and token != repo.token:
            self._refuse(Refusal(401, {"X-Error-Code": "GatedRepo"}))
        elif not repo.licence_accepted:
            self._refuse(Refusal(403, {"X-Error-Code": "GatedRepo"}))
        elif path not in files:
            self._refuse(Refusal(404, {"X-Error-Code": "EntryNotFound"}))
        else:
            data = files[path]
            headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit}
            if hub.content_network:
                headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
                # Another host name for the same server.
                location = hub.endpoint.replace("127.0.0.1", "localhost") + f"/cdn/{_etag(data)}?{SIGNATURE}"
                self._send(302, b"", {**headers, "Location": location})
            else:
                self._send(200, data, headers)

            if repo.next_push is not None and self.command == "GET":
                push, repo.next_push = repo.next_push, None
                repo.move(*push)

    def _content(self, hub: Hub, etag: str) -> None:
        if hub.content_network_refusal is not None:
            self._refuse(hub.content_network_refusal)
            return
        held = (files for repo in hub.repos.values() for files in (repo.files, *repo.earlier.values()))
        contents = (data for files in held for data in files.values())
        self._send(200, next(data for data in contents if _etag(data) == etag), {})

    def _repo(self, hub: Hub, name: str, revision: str, token: str | None) -> Repo | None:
        """The repository, or None after it was refused."""
        repo = hub.repos.get(name)
        if repo is None:
            # Whoever sends no token is not told what exists.
            self._refuse(Refusal(404 if token else 401, {"X-Error-Code": "RepoNotFound"}))
        elif repo.at(revision) is None:
            self._refuse(Refusal(404, {"X-Error-Code": "RevisionNotFound"}))
            return None
        return repo

    def _refuse(self, refusal: Refusal) -> None:
        self._send(refusal.status, b'{"error": "refused"}', {"Content-Type": "application/json", **refusal.headers})

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's signature
        """Nothing: `Hub.requests` holds what tests look at."""


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _sizes(data: bytes) -> dict[str, object]:
    return {"size": len(data), "oid": _etag(data)}
