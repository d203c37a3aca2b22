"""A Hugging Face hub of a few repositories on this machine, for the real client of the hub.

It speaks what `snapshot_download`, `create_repo` and `create_commit` speak: revisions, trees, files
by HEAD and GET with their commit and ETag, uploads by git-lfs and commits as lines of JSON.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKEN = "hf_only_here"


class Hub:
    """Repositories by name: their files by commit, oldest first.

    Attributes:
      repositories: name -> commit -> file name -> content.
      private: names of repositories that were made private.
      asked: (method, path) of every request.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.asked: list[tuple[str, str]] = []
        self.large: dict[str, bytes] = {}

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        """Adds a commit, of all files of the repository; returns its hash."""
        commits = self.repositories.setdefault(name, {})
        text = repr((len(commits), sorted(files.items())))
        sha = hashlib.sha1(text.encode()).hexdigest()
        commits[sha] = files
        return sha

    def files(self, name: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        """(commit, files) of a revision; None: there is none."""
        commits = self.repositories[name]
        sha = list(commits)[-1] if revision == "main" else revision
        return (sha, commits[sha]) if sha in commits else None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def _say(self, code: int, content: object = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _no(self, code: int, why: str) -> None:
        self._say(code, {"error": why}, X_Error_Code=why, X_Error_Message=why)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.asked.append((self.command, self.path))
        path = self.path.split("?")[0]
        file = re.fullmatch(r"/([\w-]+/[\w-]+)/resolve/([^/]+)/(.+)", path)
        about = re.fullmatch(r"/api/models/([\w-]+/[\w-]+)(?:/(revision|tree)/([^/]+))?/?", path)
        name, revision = (file[1], file[2]) if file else (about[1], about[3] or "main")
        if name not in self.hub.repositories:
            return self._no(404, "RepoNotFound")
        if (found := self.hub.files(name, revision)) is None:
            return self._no(404, "RevisionNotFound")
        sha, files = found
        if file:
            if file[3] not in files:
                return self._no(404, "EntryNotFound")
            content = files[file[3]]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self._say(200, content, X_Repo_Commit=sha, ETag=etag)
        if about[2] == "tree":
            tree = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in files.items()
            ]
            return self._say(200, tree)
        siblings = [{"rfilename": n} for n in files]
        return self._say(200, {"id": name, "sha": sha, "siblings": siblings})

    def do_PUT(self) -> None:
        content = self._body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.large[oid] = content
        self._say(200)

    def do_POST(self) -> None:
        self.hub.asked.append((self.command, self.path))
        body, path = self._body(), self.path.split("?")[0]
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._no(401, "Unauthorized")
        if path == "/api/validate-yaml":
            return self._say(200, {})
        if path.endswith("/objects/batch"):
            return self._say(
                200, {"objects": [self._place(o) for o in json.loads(body)["objects"]]}
            )
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            address = {"url": f"http://{self.headers['Host']}/{name}"}
            if name in self.hub.repositories:
                return self._say(409, address)
            self.hub.commit(name, {".gitattributes": b""})
            if wanted.get("visibility") == "private" or wanted.get("private"):
                self.hub.private.add(name)
            return self._say(200, address)
        name, what = re.fullmatch(
            r"/api/models/([\w-]+/[\w-]+)/(preupload|commit)/main", path
        ).groups()
        if what == "preupload":
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            files = [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": mode[f["path"].endswith(".safetensors")]}
                for f in files
            ]  # fmt: skip
            return self._say(200, {"files": files})
        sha = self._commit(name, [json.loads(line) for line in body.splitlines()])
        url = f"http://{self.headers['Host']}/{name}/commit/{sha}"
        return self._say(200, {"commitUrl": url, "commitOid": sha, "success": True})

    def _place(self, wanted: dict) -> dict:
        href = f"http://{self.headers['Host']}/large/{wanted['oid']}"
        return {**wanted, "actions": {"upload": {"href": href}}}

    def _commit(self, name: str, lines: list[dict]) -> str:
        files = dict(self.hub.files(name)[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        return self.hub.commit(name, files)


@contextmanager
def serving() -> Iterator[tuple[Hub, str]]:
    """A hub and its address; nothing answers there afterwards."""
    hub = Hub()
    handler = type("HandlerOfOne", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield hub, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
