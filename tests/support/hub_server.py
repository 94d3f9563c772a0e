"""A small Hugging Face Hub on 127.0.0.1, for the real `huggingface_hub` client and Diffusers' `from_pretrained`.

It serves repos with the branch `main` only: whoami, create, write check, preupload, LFS batch and upload, commit, info,
tree, and download with ETags and ranges, as the clients 1.x and 2.x use them. Dataset repos can only be read: a test
fills them with `add_dataset` and `put`, and their LFS files are sent from a host of another name, as by the Hub. Xet, a
separate storage protocol that the client prefers if `hf_xet` is installed, is not supported: the `hub` fixture disables
it (`HF_HUB_DISABLE_XET=1`), and the client falls back to LFS.

To use the fixture in a test file: `from tests.support.hub_server import hub`. `hub.env()` returns the environment
variables for a subprocess.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

WRITE_TOKEN, READ_TOKEN, OTHER_TOKEN = "hf_" + "w" * 34, "hf_" + "r" * 34, "hf_" + "o" * 34
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
KINDS = "/api/(?:models|datasets)"
LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".pt", ".npy")
LFS_OF_DATASETS = (".tar", ".parquet")


@dataclass
class Blob:
    oid: str  # git's SHA-1 of the content; for LFS files an arbitrary value
    size: int
    sha256: str
    lfs: bool


@dataclass
class Repo:
    """A model or dataset repo: its commits, oldest first, each with the complete tree as path -> Blob."""

    private: bool = False
    commits: list[tuple[str, str, dict[str, Blob]]] = field(default_factory=list)  # sha, message, tree

    def commit(self, message: str, tree: dict[str, Blob]) -> str:
        sha = hashlib.sha1(f"{message}{len(self.commits)}{sorted(tree)}".encode()).hexdigest()
        self.commits.append((sha, message, tree))
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, Blob]] | None:
        if revision in ("main", "refs/heads/main"):
            return self.commits[-1][0], self.commits[-1][2]
        return next(((sha, tree) for sha, _, tree in self.commits if sha == revision), None)


@dataclass
class Request:
    method: str
    path: str
    user: str | None
    status: int = 0


class HubError(Exception):
    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class HubServer:
    """The server, with methods for tests to inspect and control it."""

    def __init__(self, folder: Path):
        self.blobs = folder
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.repos: dict[str, Repo] = {}
        self.users = {WRITE_TOKEN: ("ada", "write"), READ_TOKEN: ("ada", "read"), OTHER_TOKEN: ("bob", "write")}
        self.organizations = {"ada": ["museum"], "bob": []}
        self.requests: list[Request] = []
        self.gate = threading.Event()  # while it is cleared, requests wait whose method and path match `held`
        self.gate.set()
        self.held = "/preupload/|/commit/"
        self.before: Callable[[Request], None] = lambda request: None  # called before a request is answered
        self.after: Callable[[Request], None] = lambda request: None  # called after it was done, before the answer
        self._failures: list[tuple[re.Pattern[str], int]] = []
        self._lock = threading.Lock()
        self.connections: list[socket.socket] = []
        self._server = _QuietServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.storage = f"http://localhost:{self._server.server_address[1]}/storage"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def fail_next(self, count: int, status: int = 500, match: str = "") -> None:
        """Answer the next `count` requests whose path matches the regular expression with `status`."""
        self._failures += [(re.compile(match), status)] * count

    def stop(self) -> None:
        """Stop as in a crash: connections are refused from now on."""
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in self.connections:  # the client keeps them open, and their threads would still answer
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def env(self, token: str | None = WRITE_TOKEN, home: Path | None = None) -> dict[str, str]:
        """Return environment variables that make a process use this server; `home` is the folder of its cache."""
        variables = {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        variables["HF_HUB_OFFLINE"] = "0"  # the other tests run offline
        if token:
            variables["HF_TOKEN"] = token
        if home:
            variables["HF_HOME"] = str(home)
        return variables

    def files(self, repo_id: str) -> dict[str, bytes]:
        """Return the files in the current main branch of a repo."""
        tree = self.repos[repo_id].commits[-1][2]
        return {path: (self.blobs / blob.sha256).read_bytes() for path, blob in tree.items()}

    def add_dataset(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> str:
        """Create a dataset repo, and return its first commit."""
        repo = self.repos[repo_id] = Repo(private=private)
        return repo.commit("files", {path: self.store(content, path) for path, content in files.items()})

    def put(self, repo_id: str, path: str, content: bytes | None) -> None:
        """Change a file in a repo, or delete it, in a commit that no client made."""
        repo = self.repos[repo_id]
        tree = dict(repo.commits[-1][2])
        if content is None:
            del tree[path]
        else:
            tree[path] = self.store(content, path)
        repo.commit(f"{path} changed", tree)

    def messages(self, repo_id: str) -> list[str]:
        return [message for _, message, _ in self.repos[repo_id].commits]

    def injected_failure(self, path: str) -> int | None:
        with self._lock:
            for number, (pattern, status) in enumerate(self._failures):
                if pattern.search(path):
                    del self._failures[number]
                    return status
        return None

    def store(self, data: bytes, path: str = "") -> Blob:
        sha256 = hashlib.sha256(data).hexdigest()
        (self.blobs / sha256).write_bytes(data)
        oid = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        return Blob(oid, len(data), sha256, lfs=path.endswith(LFS_OF_DATASETS))

    def readable(self, repo_id: str, user: str | None) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not self.owns(user, repo_id.split("/")[0])):
            raise HubError(401 if user is None else 404, "RepoNotFound", "Repository not found")
        return repo

    def owns(self, user: str | None, namespace: str) -> bool:
        return user is not None and namespace in (user, *self.organizations[user])


Answer = tuple[int, Any, dict[str, str]]  # status, body (bytes or JSON), headers


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing when a client disconnects."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Otherwise the second part of an answer waits for 40 ms, until the client has acknowledged the first.
    disable_nagle_algorithm = True
    user: str | None
    role: str | None

    def setup(self) -> None:
        super().setup()
        self.hub.connections.append(self.connection)

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        self.user, self.role = self.hub.users.get(token, (None, None))
        self.body = self._read_body()
        request = Request(self.command, path, self.user)
        self.hub.requests.append(request)
        self.hub.before(request)
        if re.search(self.hub.held, f"{self.command} {path}"):
            self.hub.gate.wait()
        failure = self.hub.injected_failure(path)
        try:
            if failure is not None:
                raise HubError(failure, "", "injected")
            if token and self.user is None:
                raise HubError(401, "", "Invalid credentials in Authorization header")
            status, body, headers = self._route(path)
        except HubError as error:
            status, body = error.status, {"error": str(error)}
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
        request.status = status
        self.hub.after(request)
        self._send(status, body, headers)

    def _route(self, path: str) -> Answer:
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                return answer(self, **match.groupdict())
        raise HubError(404, "", f"no such route: {self.command} {path}")

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, body: Any, headers: dict[str, str]) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if not isinstance(body, bytes):
            headers = {"Content-Type": "application/json", **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # --- accounts and repos ---

    def whoami(self) -> Answer:
        if self.user is None:
            raise HubError(401, "", "Invalid user token")
        access = {"displayName": "test", "role": self.role}
        organizations = [{"name": name, "type": "org"} for name in self.hub.organizations[self.user]]
        account = {"type": "user", "name": self.user, "orgs": organizations, "auth": {"accessToken": access}}
        return 200, account, {}

    def create_repo(self) -> Answer:
        options = json.loads(self.body)
        if self.user is None:
            raise HubError(401, "", "Invalid username or password.")
        namespace = options.get("organization") or self.user
        repo_id = f"{namespace}/{options['name']}"
        if self.role != "write" or not self.hub.owns(self.user, namespace):
            raise HubError(403, "", f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        url = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repos:
            return 409, {**url, "error": "You already created this model repo"}, {}
        private = options.get("visibility") == "private" or bool(options.get("private"))
        repo = self.hub.repos[repo_id] = Repo(private=private)
        repo.commit("initial commit", {".gitattributes": self.hub.store(b"*.safetensors filter=lfs\n")})
        return 200, url, {}

    def auth_check(self, repo: str, write: str | None = None) -> Answer:
        self.hub.readable(repo, self.user)
        if write:
            self._check_write(repo)
        return 200, {}, {}

    def _check_write(self, repo_id: str) -> Repo:
        repo = self.hub.readable(repo_id, self.user)
        if self.role != "write" or not self.hub.owns(self.user, repo_id.split("/")[0]):
            raise HubError(403, "", "Forbidden: you must use a write token to upload to a repository.")
        return repo

    def validate_yaml(self) -> Answer:
        content = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}, {}
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return 200, {"errors": [], "warnings": warnings}, {}

    # --- writing ---

    def preupload(self, repo: str, revision: str) -> Answer:
        _, tree = self._revision(self._check_write(repo), revision)
        files = []
        for file in json.loads(self.body)["files"]:
            path, known = file["path"], tree.get(file["path"])
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = known and (known.sha256 if known.lfs else known.oid)
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}, {}

    def lfs_batch(self, repo: str) -> Answer:
        self._check_write(repo)
        objects = []
        for requested in json.loads(self.body)["objects"]:
            known = (self.hub.blobs / requested["oid"]).exists()
            upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{requested['oid']}"}}
            objects.append({**requested} if known else {**requested, "actions": upload})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def lfs_upload(self, oid: str) -> Answer:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "", f"the content's SHA-256 is not {oid}")
        (self.hub.blobs / oid).write_bytes(self.body)
        return 200, b"", {"ETag": f'"{oid}"'}

    def commit(self, repo: str, revision: str) -> Answer:
        target = self._check_write(repo)
        tree = dict(self._revision(target, revision)[1])
        message = ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            message = self._apply(operation["key"], operation["value"], tree) or message
        sha = target.commit(message, tree)
        return 200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}"}, {}

    def _apply(self, key: str, value: dict[str, Any], tree: dict[str, Blob]) -> str | None:
        """Apply one operation of a commit to `tree`; if it is the header, return the commit message."""
        path = value.get("path", "")
        if key == "header":
            return value["summary"]
        if key == "file":
            tree[path] = self.hub.store(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if not (self.hub.blobs / value["oid"]).exists():
                raise HubError(400, "", f"LFS object {value['oid']} was never uploaded")
            tree[path] = Blob(value["oid"][:40], value["size"], value["oid"], lfs=True)
        elif key == "deletedFile":
            tree.pop(path, None)
        elif key == "deletedFolder":
            for name in [name for name in tree if name.startswith(path.rstrip("/") + "/")]:
                del tree[name]
        else:
            raise HubError(400, "", f"unknown operation {key}")
        return None

    # --- reading ---

    def _revision(self, repo: Repo, revision: str) -> tuple[str, dict[str, Blob]]:
        commit = repo.at(revision)
        if commit is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def info(self, repo: str, revision: str | None = None) -> Answer:
        target = self.hub.readable(repo, self.user)
        sha, tree = self._revision(target, revision or "main")
        siblings = [{"rfilename": path, "size": blob.size} for path, blob in sorted(tree.items())]
        about = {"private": target.private, "disabled": False, "gated": False, "downloads": 0, "likes": 0, "tags": []}
        return 200, {"_id": repo, "id": repo, "modelId": repo, "sha": sha, "siblings": siblings, **about}, {}

    def tree(self, repo: str, revision: str, path: str | None = None) -> Answer:
        _, tree = self._revision(self.hub.readable(repo, self.user), revision)
        prefix = f"{path.strip('/')}/" if path else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("1", "true")
        entries: dict[str, dict[str, Any]] = {}
        for name in sorted(name for name in tree if name.startswith(prefix)):
            parts = name[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                folder = prefix + "/".join(parts[:depth])
                if recursive or depth == 1:
                    entries[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
            if recursive or len(parts) == 1:
                entries[name] = _tree_entry(name, tree[name])
        if path and not entries:
            raise HubError(404, "EntryNotFound", f"{path} does not exist")
        return 200, list(entries.values()), {}

    def paths_info(self, repo: str, revision: str) -> Answer:
        _, tree = self._revision(self.hub.readable(repo, self.user), revision)
        try:
            paths = json.loads(self.body)["paths"]
        except ValueError:
            paths = parse_qs(self.body.decode())["paths"]
        return 200, [_tree_entry(path, tree[path]) for path in paths if path in tree], {}

    def refs(self, repo: str) -> Answer:
        sha, _ = self._revision(self.hub.readable(repo, self.user), "main")
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": sha}
        return 200, {"branches": [branch], "converts": [], "tags": []}, {}

    def resolve(self, repo: str, revision: str, path: str) -> Answer:
        sha, tree = self._revision(self.hub.readable(repo, self.user), revision)
        if path not in tree:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        blob = tree[path]
        data = (self.hub.blobs / blob.sha256).read_bytes()
        etag = blob.sha256 if blob.lfs else blob.oid
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if path.endswith(LFS_OF_DATASETS) and self.command == "GET":
            return 302, b"", {**headers, "Location": f"{self.hub.storage}/{blob.sha256}"}
        return self._content(data, headers)

    def stored(self, sha256: str) -> Answer:
        if self.headers.get("Authorization"):
            raise HubError(400, "", "a token was sent to the storage")
        return self._content((self.hub.blobs / sha256).read_bytes(), {"ETag": f'"{sha256[:32]}"'})

    def _content(self, data: bytes, headers: dict[str, str]) -> Answer:
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part and self.command == "GET":
            start, end = int(part[1]), min(int(part[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return 206, data[start : end + 1], headers
        return 200, data, headers


def _tree_entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
    return entry


ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("GET", rf"/api/models/{REPO}/auth-check(?P<write>/write)?", _Handler.auth_check),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_upload),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("GET", rf"{KINDS}/{REPO}", _Handler.info),
    ("GET", rf"{KINDS}/{REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", rf"{KINDS}/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", _Handler.tree),
    ("POST", rf"{KINDS}/{REPO}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("GET", rf"{KINDS}/{REPO}/refs", _Handler.refs),
    ("GET HEAD", rf"(?:/datasets)?/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("GET", r"/storage/(?P<sha256>[0-9a-f]{64})", _Handler.stored),
]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub; this process uses it as the user ada, with write access and an empty cache."""
    from huggingface_hub import constants

    server = HubServer(tmp_path / "hub_server")
    for name, value in server.env(home=tmp_path / "hf_home").items():
        monkeypatch.setenv(name, value)
    # The client reads the variables when it is imported, which may be before.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf_home" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf_home" / "token"))
    yield server
    server.stop()


if __name__ == "__main__":  # to try things by hand: python -m tests.support.hub_server
    import tempfile

    running = HubServer(Path(tempfile.mkdtemp(prefix="hub_server_")))
    print(" ".join(f"{name}={value}" for name, value in running.env().items()), flush=True)
    threading.Event().wait(float(os.environ.get("HUB_SECONDS", "3600")))
