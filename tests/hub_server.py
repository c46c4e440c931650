"""A small Hugging Face Hub on loopback: the endpoints that huggingface_hub calls, and the refusals a job can meet.

Statuses and headers follow the Hub's own: X-Error-Code, X-Repo-Commit, ETag, Retry-After.
"""

from __future__ import annotations

import base64
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
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?")
_WRITE = re.compile(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/]+)")
_BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
_RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass(frozen=True)
class Refusal:
    """An answer other than 200."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Commit:
    """One commit, as it was sent."""

    repo: str
    branch: str
    written: tuple[str, ...]
    removed: tuple[str, ...]


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

    private: bool = False
    branches: dict[str, tuple[str, dict[str, bytes]]] = field(default_factory=dict)
    """Commit and files of the branches other than `main`."""

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
        if revision in self.branches:
            return self.branches[revision]
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

    read_only: set[str] = field(default_factory=set)
    """Tokens that may not write; any other may."""
    commits: list[Commit] = field(default_factory=list)
    """Every commit that was sent."""
    large: dict[str, bytes] = field(default_factory=dict)
    """Uploaded contents by SHA-256."""
    write_refusals: list[Refusal] = field(default_factory=list)
    """Answers to the next commits, in order."""

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
            self._describe(hub, match.group(2), match.group(3), match.group(4), match.group(5), token)
        elif match := _RESOLVE.fullmatch(path):
            self._file(hub, match.group(2), match.group(3), match.group(4), token)
        else:
            self._refuse(Refusal(404))

    do_HEAD = do_GET  # noqa: N815 - the base class looks for this name

    def do_POST(self) -> None:
        hub = self._hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token:
            hub.tokens.add(token)
        if hub.always is not None or hub.refusals:
            self._refuse(hub.always or hub.refusals.pop(0))
        elif path == "/api/validate-yaml":
            self._json({})
        elif token is None:
            self._refuse(Refusal(401))
        elif token in hub.read_only:
            self._refuse(Refusal(403))
        elif path == "/api/repos/create":
            self._create(hub, json.loads(body))
        elif match := _BATCH.fullmatch(path):
            self._batch(hub, json.loads(body))
        elif (match := _WRITE.fullmatch(path)) and match.group(1) in hub.repos:
            name, what, branch = match.groups()
            repo = hub.repos[name]
            if what == "branch":
                self._branch(repo, branch)
            elif repo.at(branch) is None:
                self._refuse(Refusal(404, {"X-Error-Code": "RevisionNotFound"}))
            elif what == "preupload":
                self._preupload(json.loads(body))
            elif hub.write_refusals:
                self._refuse(hub.write_refusals.pop(0))
            else:
                self._commit(hub, name, branch, [json.loads(line) for line in body.splitlines()])
        else:
            self._refuse(Refusal(404, {"X-Error-Code": "RepoNotFound"}))

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._hub.requests.append((self.command, urlsplit(self.path).path))
        digest = hashlib.sha256(data).hexdigest()
        if not self.path.startswith(f"/lfs/{digest}?"):
            self._refuse(Refusal(400))
            return
        self._hub.large[digest] = data
        self._send(200, b"", {})

    def _create(self, hub: Hub, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if name in hub.repos:
            self._json({"url": f"{hub.endpoint}/{name}", "error": "You already created this model repo"}, status=409)
            return
        repo = Repo({".gitattributes": b"*.safetensors filter=lfs\n"})
        repo.private = asked.get("visibility") == "private" or bool(asked.get("private"))
        hub.repos[name] = repo
        self._json({"url": f"{hub.endpoint}/{name}", "name": name})

    def _branch(self, repo: Repo, branch: str) -> None:
        if branch == "main" or branch in repo.branches:
            self._refuse(Refusal(409))
            return
        repo.branches[branch] = (repo.commit, dict(repo.files))
        self._json({}, status=201)

    def _preupload(self, asked: dict[str, Any]) -> None:
        found = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        self._json({"files": found})

    def _batch(self, hub: Hub, asked: dict[str, Any]) -> None:
        objects: list[dict[str, Any]] = []
        for item in asked["objects"]:
            objects.append(dict(item))
            if item["oid"] not in hub.large:
                # The address is signed: it stands for the token, and nobody else may see it.
                upload = {"href": f"{hub.endpoint}/lfs/{item['oid']}?{SIGNATURE}"}
                objects[-1]["actions"] = {"upload": upload}
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, hub: Hub, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        repo = hub.repos[name]
        found = repo.at(branch)
        assert found is not None
        files, written, removed = dict(found[1]), [], []
        for line in lines[1:]:
            value, path = line["value"], line["value"]["path"]
            if line["key"] == "file":
                files[path] = base64.b64decode(value["content"])
                written.append(path)
            elif line["key"] == "lfsFile":
                files[path] = hub.large[value["oid"]]
                written.append(path)
            else:
                gone = [one for one in files if one == path or one.startswith(path.rstrip("/") + "/")]
                if not gone:
                    self._refuse(Refusal(404, {"X-Error-Code": "EntryNotFound"}))
                    return
                removed += gone
                files = {one: data for one, data in files.items() if one not in gone}
        commit = hashlib.sha1(f"{len(hub.commits)}".encode(), usedforsecurity=False).hexdigest()
        if branch == "main":
            repo.move(commit, files)
        else:
            repo.branches[branch] = (commit, files)
        hub.commits.append(Commit(name, branch, tuple(written), tuple(removed)))
        self._json({"commitUrl": f"{hub.endpoint}/{name}/commit/{commit}", "commitOid": commit})

    def _describe(
        self, hub: Hub, name: str, what: str | None, revision: str | None, place: str | None, token: str | None
    ) -> None:
        repo = self._repo(hub, name, revision or "main", token)
        found = repo.at(revision or "main") if repo else None
        if found is None:
            return
        commit, files = found
        if what == "tree":
            inside = {path: data for path, data in files.items() if place is None or path.startswith(f"{place}/")}
            if place is not None and not inside:
                self._refuse(Refusal(404, {"X-Error-Code": "EntryNotFound"}))
                return
            self._json([{"type": "file", "path": path, **_sizes(data)} for path, data in inside.items()])
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

    def _json(self, content: object, *, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

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
    """As git names content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _sizes(data: bytes) -> dict[str, object]:
    return {"size": len(data), "oid": _etag(data)}
