"""A local server that speaks the hub's protocol as far as an upload needs it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """Repositories in memory. token: the only one that may write. breaks: PUTs of large files that end half-way."""

    def __init__(self, token: str) -> None:
        self.token, self.breaks, self.public = token, 0, False
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.lfs: set[str] = set()  # names of files that are large
        self.commits: list[list[str]] = []
        self.sent = 0  # bytes of large files
        self.address = ""

    def tree(self) -> list[dict[str, Any]]:
        return [self._entry(name, data) for name, data in sorted(self.files.items())]

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"type": "file", "path": name, "size": len(data), "oid": blob}
        if name in self.lfs:
            digest = hashlib.sha256(data).hexdigest()
            return {**entry, "oid": "0" * 40, "lfs": {"oid": digest, "size": len(data), "pointerSize": 134}}
        return entry

    def post(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            made, known = json.loads(body), bool(self.made)
            self.made.append(made)
            name = f"{made['organization']}/{made['name']}"
            return (409 if known else 200), {"url": f"{self.address}/{name}", "error": "You already created this repo"}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": self._mode(f), "shouldIgnore": False} for f in files]
            return 200, {"files": modes}
        if path.endswith("/objects/batch"):
            objects = [self._action(one) for one in json.loads(body)["objects"]]
            return 200, {"transfer": "basic", "objects": objects}
        if "/commit/" in path:
            return 200, self._commit([json.loads(line) for line in body.splitlines()])
        return 404, {"error": "no such path"}

    def _mode(self, file: dict[str, Any]) -> str:
        return "lfs" if file["path"].endswith(".safetensors") else "regular"

    def _action(self, one: dict[str, Any]) -> dict[str, Any]:
        if one["oid"] in self.large:
            return one
        return {**one, "actions": {"upload": {"href": f"{self.address}/lfs/{one['oid']}"}}}

    def _commit(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        names = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.large[value["oid"]]
                self.lfs.add(value["path"])
            else:
                continue
            names.append(value["path"])
        self.commits.append(names)
        return {
            "commitUrl": f"{self.address}/me/mine/commit/{len(self.commits):040d}",
            "commitOid": f"{len(self.commits):040d}",
            "success": True,
        }


@contextlib.contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """The hub as a server at `hub.address` while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def refused(self) -> bool:
            given = self.headers.get("Authorization")
            if given == f"Bearer {hub.token}":
                return False
            self.answer(401, {"error": f"Invalid credentials: {given}"})
            return True

        def do_GET(self) -> None:
            if self.refused():
                return
            if "/tree/" in self.path:
                self.answer(200, hub.tree())
            else:
                self.answer(200, {"id": "me/mine", "private": not hub.public, "sha": "0" * 40, "siblings": []})

        def do_POST(self) -> None:
            body = self.body()
            if not self.refused():
                self.answer(*hub.post(self.path, body))

        def do_PUT(self) -> None:
            if hub.breaks:
                hub.breaks -= 1
                self.rfile.read(1000)
                self.close_connection = True
                self.connection.close()
                return
            body = self.body()
            hub.sent += len(body)
            hub.large[self.path.removeprefix("/lfs/")] = body
            self.answer(200, {})

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
