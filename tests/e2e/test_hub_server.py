"""A hub on the loopback interface, as much of one as the hub client asks for, with its faults; and
a test that the client sees in it what was put there."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import attrs
from huggingface_hub import HfApi

API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<rev>[^/]+))?")
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)")


@attrs.define
class Repo:
    """A repository of the server.

    Attributes:
        commits: files by commit.
        refs: commit by branch or tag.
        status: answer everything with this status and the error code beside it.
        error: X-Error-Code that goes with `status`.
        file_status: the same for files, while the API answers.
        secret: the token that is asked for.
        cut: bytes after which a body breaks off, by file; a negative one breaks every time, a
            positive one once.
        stall: a file whose body stops half way until the server's `release` is set.
        sizes: sizes that the API claims, by file.
    """

    commits: dict[str, dict[str, bytes]] = attrs.field(factory=dict)
    refs: dict[str, str] = attrs.field(factory=dict)
    status: int = 0
    error: str = ""
    file_status: int = 0
    secret: str = ""
    cut: dict[str, int] = attrs.field(factory=dict)
    stall: str = ""
    sizes: dict[str, int] = attrs.field(factory=dict)

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Put files there as a new commit; returns it."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[ref] = commit
        return commit


def folder_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@attrs.define
class HubServer:
    """The server.

    Attributes:
        repos: by OWNER/NAME.
        asked: what it was asked: method, path, range.
        url: its address.
        stalled, release: a body has stopped half way; it may go on.
    """

    repos: dict[str, Repo] = attrs.field(factory=dict)
    asked: list[tuple[str, str, str]] = attrs.field(factory=list)
    url: str = ""
    stalled: threading.Event = attrs.field(factory=threading.Event)
    release: threading.Event = attrs.field(factory=threading.Event)

    def add(self, name: str, files: dict[str, bytes]) -> Repo:
        """A repository with one commit on main."""
        self.repos[name] = Repo()
        self.repos[name].commit(files)
        return self.repos[name]

    def fetched(self) -> list[str]:
        """Names of the files that were sent or begun, in order; forgets them."""
        paths = [path for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]
        self.asked.clear()
        return [path.rpartition("/")[2] for path in paths]


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:  # noqa: C901
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            """Nothing on stderr."""

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((self.command, path, self.headers.get("Range", "")))
            found = API.fullmatch(path) or FILE.fullmatch(path)
            repo = hub.repos.get(found["repo"]) if found else None
            if found is None or repo is None:
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            groups = found.groupdict()
            token = self.headers.get("Authorization", "")
            if repo.secret and token != f"Bearer {repo.secret}":
                return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"} if not token else {
                    "X-Error-Message": "Invalid credentials in Authorization header"})  # fmt: skip
            status = repo.status or ("file" in groups and repo.file_status)
            if status:
                return self._send(status, b"{}", {"X-Error-Code": repo.error, "Retry-After": "0"})
            revision = groups["rev"] or "main"
            commit = repo.refs.get(revision, revision)
            if commit not in repo.commits:
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            if "file" in groups:
                return self._file(repo, commit, groups["file"])
            listing = _tree(repo, commit) if groups["what"] == "tree" else _info(repo, commit)
            return self._send(200, json.dumps(listing).encode(), {})

        def _file(self, repo: Repo, commit: str, name: str) -> None:
            data = repo.commits[commit].get(name)
            headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if data is None:
                return self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
            headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            given = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(given[1]) if given else 0
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            cut = repo.cut.get(name, 0) if self.command == "GET" else 0
            if cut > 0:
                del repo.cut[name]
            if repo.stall == name and self.command == "GET":
                return self._stall(data, headers)
            return self._send(206 if start else 200, data[start:], headers, cut=abs(cut))

        def _stall(self, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            hub.stalled.set()
            hub.release.wait(30)
            self.close_connection = True

        def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int = 0) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            if cut:
                self.send_header("Connection", "close")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:cut] if cut else body)
            self.close_connection = bool(cut)

    return Handler


def _entries(repo: Repo, commit: str) -> Iterator[tuple[str, int, str]]:
    for name, data in sorted(repo.commits[commit].items()):
        yield name, repo.sizes.get(name, len(data)), hashlib.sha256(data).hexdigest()


def _info(repo: Repo, commit: str) -> dict[str, Any]:
    siblings = [
        {"rfilename": name, "size": size, "blobId": digest[:40],
         "lfs": {"sha256": digest, "size": size, "pointerSize": 130}}
        for name, size, digest in _entries(repo, commit)
    ]  # fmt: skip
    return {"id": "x/y", "sha": commit, "siblings": siblings, "tags": [], "private": False}


def _tree(repo: Repo, commit: str) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": name, "size": size, "oid": digest[:40],
         "lfs": {"oid": digest, "size": size, "pointerSize": 130}}
        for name, size, digest in _entries(repo, commit)
    ]  # fmt: skip


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A running server on a free port."""
    hub = HubServer()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


def test_the_hub_client_sees_what_is_there() -> None:
    with hub_server() as hub:
        repo = hub.add("lab/model", {"config.json": b"{}", "model.safetensors": b"123"})
        first = repo.refs["main"]
        repo.commit({"config.json": b"[]"}, ref="v2")
        api = HfApi(endpoint=hub.url)
        info = api.model_info("lab/model", files_metadata=True)
        assert info.sha == first
        assert {(s.rfilename, s.size) for s in info.siblings or ()} == {
            ("config.json", 2),
            ("model.safetensors", 3),
        }
        assert api.model_info("lab/model", revision="v2").sha == repo.refs["v2"]
