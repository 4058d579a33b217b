"""A small stand-in of the hub's HTTP interface, as huggingface_hub 2.4 asks it: repositories, files, commits, LFS."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_standin"


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    main: str | None = None

    def commit(self, changes: dict[str, bytes]) -> str:
        """Of changed files, on top of the main branch; a file of b"" is removed."""
        files = {**self.commits.get(self.main, {}), **changes}
        files = {name: content for name, content in files.items() if content}
        self.main = hashlib.sha1(repr((self.main, sorted(files.items()))).encode()).hexdigest()
        self.commits[self.main] = files
        return self.main


@dataclass
class Hub:
    """What is stored, and what was asked: "GET /owner/name/resolve/main/config.json"."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    address: str = ""

    def files(self, name: str) -> dict[str, bytes]:
        """Of the main branch."""
        repository = self.repositories[name]
        return repository.commits[repository.main]


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub at an address of this machine, while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(length)
        for pattern, method in _ROUTES:
            found = re.fullmatch(pattern, f"{self.command} {path}")
            if found:
                return getattr(self, method)(*found.groups(), body)
        self._send(404, {"error": "no such address"})

    def _chunk(self) -> bytes:
        chunk = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return chunk

    def _send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        sent = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(sent)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)

    @property
    def _allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str) -> Repository | None:
        """The repository; None, and the hub's answer, where there is none for who asks."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._allowed):
            self._send(401 if not self._allowed else 404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self._allowed:
            return self._send(401, {"error": "Invalid username or password."})
        status = 409 if name in self.hub.repositories else 200
        if status == 200:
            private = asked.get("visibility") == "private" or asked.get("private", False)  # the client's 1.5 says it so
            self.hub.repositories[name] = Repository(private)
            self.hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs"})
        self._send(status, {"url": f"{self.hub.address}/{name}"})

    def _info(self, name: str, _: bytes) -> None:
        if repository := self._repository(name):
            self._send(200, {"id": name, "sha": repository.main, "private": repository.private, "siblings": []})

    def _resolve(self, name: str, revision: str, file: str, _: bytes) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        commit = repository.main if revision == "main" else revision
        if commit not in repository.commits:
            return self._send(404, {}, {"X-Error-Code": "RevisionNotFound"})
        content = repository.commits[commit].get(file)
        if content is None:
            return self._send(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        tag = hashlib.sha256(content).hexdigest()
        self._send(200, content, {"X-Repo-Commit": commit, "ETag": f'"{tag}"'})

    def _validate(self, _: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def _preupload(self, name: str, body: bytes) -> None:
        files = json.loads(body)["files"]
        modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in files}
        answer = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        self._send(200, {"files": answer})

    def _batch(self, name: str, body: bytes) -> None:
        objects = json.loads(body)["objects"]
        upload = [{"upload": {"href": f"{self.hub.address}/lfs/{one['oid']}"}} for one in objects]
        self._send(200, {"objects": [{**one, "actions": two} for one, two in zip(objects, upload, strict=True)]})

    def _store(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, {"error": "another content than announced"})
        self.hub.objects[oid] = body
        self._send(200)

    def _commit(self, name: str, body: bytes) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        changes = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.hub.objects[value["oid"]]
        commit = repository.commit(changes)
        self._send(200, {"commitUrl": f"{self.hub.address}/{name}/commit/{commit}", "commitOid": commit})


_NAME = "([^/]+/[^/]+)"
_ROUTES = (
    ("POST /api/repos/create", "_create"),
    ("POST /api/validate-yaml", "_validate"),
    (f"GET /api/models/{_NAME}", "_info"),
    (f"POST /api/models/{_NAME}/preupload/main", "_preupload"),
    (f"POST /api/models/{_NAME}/commit/main", "_commit"),
    (f"POST /{_NAME}\\.git/info/lfs/objects/batch", "_batch"),
    ("PUT /lfs/([0-9a-f]+)", "_store"),
    (f"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", "_resolve"),
)
