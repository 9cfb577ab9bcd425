"""A server on this machine that speaks the parts of the Hugging Face Hub's interface that its own client needs here.

Reading: repositories, trees, files with ranges. Writing: commits, with small files in them and large ones by LFS. For
tests: nothing is authenticated but the token, and everything is in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = 4096
"""Bytes from which a file goes by LFS."""
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Repository:
    """A model repository.

    Attributes:
        gated: whether nobody may read its files.
        commits: content by file name, for each commit hash, oldest first.
        messages: of the commits.
    """

    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        """What the branch ``main`` has."""
        return self.commits[next(reversed(self.commits))] if self.commits else {}

    def commit(self, files: Mapping[str, bytes], message: str) -> str:
        """Replace everything; returns the commit's hash."""
        digest = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[digest] = dict(files)
        self.messages.append(message)
        return digest

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """A commit's hash and files, by hash or as ``main``."""
        digest = next(reversed(self.commits)) if revision == "main" else revision
        return (digest, self.commits[digest]) if digest in self.commits else None


class LocalHub:
    """The server; a context manager.

    Args:
        token: what whoever writes must present.

    Attributes:
        url: to be given to the client as its endpoint.
        repositories: by ``OWNER/NAME``.
        requests: method and path of every request so far.
    """

    def __init__(self, token: str = "hf_test") -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.large: dict[str, bytes] = {}
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> LocalHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()

    def add(self, name: str, files: Mapping[str, bytes] | None = None, *, gated: bool = False) -> Repository:
        """Make a repository with one commit."""
        self.repositories[name] = Repository(gated)
        self.repositories[name].commit(files or {".gitattributes": b""}, "first")
        return self.repositories[name]


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


def _checked_card(text: str) -> dict[str, list[str]]:
    """What the Hub says of a model card's head; it takes no upload with a card whose head is not right."""
    head = yaml.safe_load(text.split("---\n")[1])
    if not isinstance(head, dict) or not all(isinstance(tag, str) for tag in head.get("tags", [])):
        raise _Refused(400, "", "Invalid metadata in README.md")
    return {"errors": [], "warnings": []}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: LocalHub

    def log_message(self, *_: Any) -> None:  # quiet
        pass

    def _serve(self) -> None:
        hub, parts = self.server_hub, urlsplit(self.path)
        path = unquote(parts.path).strip("/").split("/")
        hub.requests.append(f"{self.command} {unquote(parts.path)}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if path[0] == "large":
                hub.large[path[1]] = body
                self._answer(200, b"")
            elif path == ["api", "validate-yaml"]:
                self._json(_checked_card(json.loads(body)["content"]))
            elif path[:2] == ["api", "models"]:
                self._json(self._api("/".join(path[2:4]), path[4:], body))
            elif path[1].endswith(".git"):
                self._json(self._batch(json.loads(body)))
            else:
                self._file("/".join(path[:2]), path[3], "/".join(path[4:]))
        except _Refused as error:
            self._answer(error.status, b"{}", {"X-Error-Code": error.code, "X-Error-Message": str(error)})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    # --- what is asked ----------------------------------------------------------------------------------------------

    def _repository(self, name: str) -> Repository:
        found = self.server_hub.repositories.get(name)
        if found is None:
            raise _Refused(401, "RepoNotFound", "Repository not found")
        return found

    def _commit(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        found = self._repository(name).at(revision)
        if found is None:
            raise _Refused(404, "RevisionNotFound", "Invalid rev id")
        return found

    def _api(self, name: str, rest: list[str], body: bytes) -> Any:
        what, revision = rest[0] if rest else "", rest[1] if len(rest) > 1 else "main"
        if what in ("preupload", "commit") and self.headers.get("Authorization") != f"Bearer {self.server_hub.token}":
            raise _Refused(403, "", "you have no right to write here")
        digest, files = self._commit(name, revision)
        if what in ("", "revision"):
            siblings = [{"rfilename": path} for path in files]
            gated = "manual" if self._repository(name).gated else False
            return {"id": name, "sha": digest, "private": False, "gated": gated, "tags": [], "siblings": siblings}
        if what == "tree":
            return _tree(files, "/".join(rest[2:]), "recursive=true" in self.path.lower())
        if what == "paths-info":
            asked = parse_qs(body.decode())["paths"]
            return [entry for path in asked for entry in _tree_of(files, path)]
        if what == "preupload":
            sizes = {one["path"]: one["size"] for one in json.loads(body)["files"]}
            modes = {path: "lfs" if size >= LARGE else "regular" for path, size in sizes.items()}
            return {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}
        if what != "commit":
            raise _Refused(404, "", f"this Hub has no {what}")
        return self._apply(name, files, [json.loads(line) for line in body.splitlines()])

    def _apply(self, name: str, files: Mapping[str, bytes], operations: list[Any]) -> Any:
        now, message = dict(files), ""
        for operation in operations:
            value = operation["value"]
            match operation["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    now[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    now[value["path"]] = self.server_hub.large[value["oid"]]
                case "deletedFile":
                    del now[value["path"]]
                case "deletedFolder":
                    folder = value["path"].rstrip("/") + "/"
                    now = {path: data for path, data in now.items() if not path.startswith(folder)}
        digest = self._repository(name).commit(now, message)
        return {"commitUrl": f"{self.server_hub.url}/{name}/commit/{digest}", "commitOid": digest}

    def _batch(self, wanted: Any) -> Any:
        objects = []
        for one in wanted["objects"]:
            upload = {"href": f"{self.server_hub.url}/large/{one['oid']}"}
            objects.append({**one, "actions": {"upload": upload}})
        return {"transfer": "basic", "objects": objects}

    def _file(self, name: str, revision: str, path: str) -> None:
        digest, files = self._commit(name, revision)
        if self._repository(name).gated:
            raise _Refused(403, "GatedRepo", "Access to this model is restricted")
        if path not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        data = files[path]
        head = {"X-Repo-Commit": digest, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        given = self.headers.get("Range")
        if given is None:
            self._answer(200, data, head)
            return
        first, _, last = given.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        head["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        self._answer(206, part, head)

    # --- answers ----------------------------------------------------------------------------------------------------

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, head: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (head or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _tree(files: Mapping[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    inside = [path for path in files if path.startswith(prefix)]
    if not inside and folder:
        raise _Refused(404, "EntryNotFound", "Entry not found")
    names = dict.fromkeys(path if recursive else prefix + path[len(prefix) :].partition("/")[0] for path in inside)
    return [entry for name in names for entry in _tree_of(files, name)]


def _tree_of(files: Mapping[str, bytes], path: str) -> list[dict[str, Any]]:
    """The entry of a file or folder; empty if there is none."""
    digest = hashlib.sha1(path.encode()).hexdigest()
    commit = {"id": digest, "title": "", "date": DATE}
    if path not in files:
        found = any(name.startswith(f"{path}/") for name in files)
        return [{"type": "directory", "oid": digest, "path": path, "lastCommit": commit}] if found else []
    data = files[path]
    entry = {"type": "file", "oid": digest, "size": len(data), "path": path, "lastCommit": commit}
    if len(data) >= LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return [entry]
