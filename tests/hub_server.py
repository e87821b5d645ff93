"""A Hub on the loopback, for the real ``huggingface_hub`` client: of one user, an organisation, and nobody else's network.

It keeps what the client sends and checks it as the Hub would: tokens, names, YAML, sizes and SHA-256 of LFS objects, the parent
of a commit. Repositories have a history, branches and tags. LFS objects are served by a redirect to another origin, which
must not see a token. Faults can be ordered: answers with an error, and connections that are cut.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_write": ("zoe", "write"), "hf_read": ("zoe", "read"), "hf_other": ("max", "write")}
ORGS = {"zoe": ["lab"], "max": []}
LFS = (".safetensors", ".png", ".bin", ".pt")
LIBRARIES = {"peft", "transformers"}


class Refused(Exception):
    """An answer with an error."""

    def __init__(self, status: int, message: str, code: str = "", **body) -> None:
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass(frozen=True)
class Entry:
    """A file of a commit."""

    oid: str  # git's SHA-1, of an LFS file its pointer's; here of the content in both cases
    sha256: str
    size: int
    lfs: bool

    @property
    def facts(self) -> dict:
        known = {"oid": self.oid, "size": self.size}
        return known | ({"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": 130}} if self.lfs else {})


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, Entry]


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit]  # oldest first
    branches: dict[str, str]
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        return self.commits[oid]


CUT, LATE, RIVAL = 0, -1, -2


@dataclass
class Fault:
    """What is to go wrong with the next requests of a kind.

    Attributes:
        request: regular expression over ``METHOD /path``.
        status: of the answer; ``CUT`` the connection, while the body is read, or ``LATE``, when all is done; or ``RIVAL``,
            whose commit comes first.
        times: how often.
        headers: of the answer.
    """

    request: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class HubServer(ThreadingHTTPServer):
    """The state of the Hub; start it by :func:`running`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}"  # another origin for the client
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # by SHA-256
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.plain = False  # a compatible server that knows less: nothing of access, and no checksums of small files
        self.damaged: set[str] = set()  # files that are given out with another last byte
        self.lock = threading.RLock()

    def handle_error(self, request, client_address) -> None:
        """A cut connection is no news; anything else is an answer 500, which the test sees."""

    def order(self, *faults: Fault) -> None:
        with self.lock:
            self.faults, self.requests, self.damaged, self.plain = list(faults), [], set(), False

    def count(self, request: str) -> int:
        """Requests of a kind since the last order."""
        return sum(bool(re.search(request, one)) for one in self.requests)

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        return self.objects[self.repos[repo_id].find(revision).files[path].sha256]

    def files(self, repo_id: str, revision: str = "main") -> set[str]:
        return set(self.repos[repo_id].find(revision).files) - {".gitattributes"}

    def add(self, repo: Repo, branch: str, title: str, files: dict[str, Entry]) -> Commit:
        commit = Commit(hashlib.sha1(f"{id(repo)} {len(repo.commits)} {title}".encode()).hexdigest(), title, files)
        repo.commits[commit.oid] = commit
        repo.branches[branch] = commit.oid
        return commit

    def store(self, content: bytes, *, lfs: bool) -> Entry:
        sha256 = hashlib.sha256(content).hexdigest()
        self.objects[sha256] = content
        return Entry(hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), sha256, len(content), lfs)

    def write(self, repo_id: str, files: dict[str, bytes]) -> None:
        """Put files into a repository behind the clients' backs."""
        repo = self.repos.setdefault(repo_id, Repo(False, {}, {}))
        held = repo.find("main").files if repo.branches else {}
        added = {path: self.store(content, lfs=path.endswith(LFS)) for path, content in files.items()}
        self.add(repo, "main", "by hand", held | added)


@contextmanager
def running() -> Iterator[HubServer]:
    """A server that is gone at the end of the block."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


def check_card(content: str) -> list[str]:
    """What the Hub finds wrong with the metadata of a card."""
    found = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        return [f"YAML: {' '.join(str(error).split())}"]
    if not isinstance(data, dict):
        return ["metadata must be an object"]
    lists = ("tags", "metrics", "datasets")
    wrong = [f'"{name}" must be an array' for name in lists if not isinstance(data.get(name, []), list)]
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(data.get("base_model", "a"))):
        wrong.append(f'"base_model" with value "{data["base_model"]}" is not valid')
    if "model-index" in data and not all(one.get("name") and one.get("results") for one in data["model-index"]):
        wrong.append('"model-index[0].results" is required')
    return wrong


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20  # seconds for a client that says nothing
    server: HubServer

    def log_message(self, *args) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self) -> None:
        path, length = urlsplit(self.path).path, int(self.headers.get("Content-Length", 0))
        request = f"{self.command} {path}" + (" in part" if "Range" in self.headers else "")
        with self.server.lock:
            self.server.requests.append(request)
            fault = next((one for one in self.server.faults if one.times and re.search(one.request, request)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.status == CUT:
            self.rfile.read(min(length, 1024))
            return self.cut()
        body = self.rfile.read(length)
        if fault is not None and fault.status > 0:
            return self.answer(fault.status, {"error": "ordered"}, fault.headers)
        if fault is not None and fault.status == RIVAL:
            with self.server.lock:
                self.server.write("/".join(path.split("/")[3:5]), {".gitignore": b"a rival's"})
        try:
            with self.server.lock:
                status, content, headers = self.route(path, body)
        except Refused as error:
            known = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            return self.answer(error.status, {"error": error.message, **error.body}, known)
        if fault is not None and fault.status == LATE:
            return self.cut()
        self.answer(status, content, headers)

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status: int, content: dict | list | bytes, headers: dict[str, str]) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def route(self, path: str, body: bytes) -> tuple[int, dict | list | bytes, dict[str, str]]:
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                names = {name: unquote(value) for name, value in found.groupdict().items()}
                answer = method(self, body=body, **names)
                return answer if isinstance(answer, tuple) else (200, answer, {})
        raise Refused(404, f"no such request: {self.command} {path}")

    # Who asks

    def user(self) -> tuple[str, str] | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return None
        if token not in TOKENS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return TOKENS[token]

    def writer(self, owner: str) -> None:
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if user[1] != "write" or owner not in (user[0], *ORGS[user[0]]):
            raise Refused(403, f'You don\'t have the rights to write under the namespace "{owner}"')

    def repo(self, repo_id: str, *, write: bool = False) -> Repo:
        user, owner, repo = self.user(), repo_id.split("/")[0], self.server.repos.get(repo_id)
        if repo is None or (repo.private and (user is None or owner not in (user[0], *ORGS[user[0]]))):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.writer(owner)
        return repo

    # What is asked

    def whoami(self, body: bytes) -> dict:
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in ORGS[user[0]]]
        return {"type": "user", "name": user[0], "orgs": orgs, "auth": {"accessToken": {"role": user[1]}}}

    def create(self, body: bytes) -> dict:
        asked, user = json.loads(body), self.user()
        owner = asked.get("organization") or (user[0] if user else "")
        repo_id = f"{owner}/{asked['name']}"
        self.writer(owner)
        if asked["name"].lower() == "models":
            raise Refused(400, "This name is reserved")
        if asked["name"] == "taken":
            raise Refused(409, "conflicts with existing repository Taken")
        if repo_id in self.server.repos:
            raise Refused(409, "You already created this model repo", url=f"{self.server.endpoint}/{repo_id}")
        repo = self.server.repos[repo_id] = Repo(asked.get("visibility") == "private", {}, {})
        attributes = self.server.store(b"*.safetensors filter=lfs\n", lfs=False)
        self.server.add(repo, "main", "initial commit", {".gitattributes": attributes})
        return {"url": f"{self.server.endpoint}/{repo_id}"}

    def validate(self, body: bytes) -> dict:
        if wrong := check_card(json.loads(body)["content"]):
            raise Refused(400, "Invalid metadata", errors=[{"message": text} for text in wrong], warnings=[])
        return {"errors": [], "warnings": []}

    def preupload(self, body: bytes, repo_id: str, revision: str) -> dict:
        held, files = self.repo(repo_id, write=True).find(revision).files, []
        for file in json.loads(body)["files"]:
            entry = held.get(file["path"])
            oid = None if entry is None else entry.sha256 if entry.lfs else entry.oid
            mode = "lfs" if file["path"].endswith(LFS) else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def batch(self, body: bytes, repo_id: str) -> dict:
        self.repo(repo_id, write=True)
        objects = []
        for one in json.loads(body)["objects"]:
            upload = {"href": f"{self.server.storage}/storage/{one['oid']}?size={one['size']}"}
            verify = {"href": f"{self.server.endpoint}/api/verify/{repo_id}"}
            known = one["oid"] in self.server.objects
            objects.append(one | ({} if known else {"actions": {"upload": upload, "verify": verify}}))
        return {"transfer": "basic", "objects": objects}

    def put(self, body: bytes, oid: str) -> dict:
        (size,) = parse_qs(urlsplit(self.path).query)["size"]
        if "Authorization" in self.headers:
            raise Refused(400, "a token was sent to the storage")
        if len(body) != int(size) or hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "the object is not what was announced")
        self.server.objects[oid] = body
        return {}

    def verify(self, body: bytes, repo_id: str) -> dict:
        self.repo(repo_id, write=True)
        asked = json.loads(body)
        if len(self.server.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "no such object")
        return {}

    def commit(self, body: bytes, repo_id: str, revision: str) -> dict:
        repo = self.repo(repo_id, write=True)
        if revision not in repo.branches:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        head = repo.find(revision)
        (header, *operations) = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit", head.oid) != head.oid:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = self.server.store(base64.b64decode(value["content"]), lfs=False)
            elif operation["key"] == "lfsFile":
                content = self.server.objects.get(value["oid"])
                if content is None or len(content) != value["size"]:
                    raise Refused(400, f"LFS object of {value['path']} is missing")
                files[value["path"]] = self.server.store(content, lfs=True)
            elif operation["key"] == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise Refused(400, f"cannot do {operation['key']}")
        card = files.get("README.md")
        if card is not None and (wrong := check_card(self.server.objects[card.sha256].decode())):
            raise Refused(400, wrong[0])
        commit = self.server.add(repo, revision, header["value"]["summary"], files)
        return {"commitOid": commit.oid, "commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{commit.oid}"}

    def info(self, body: bytes, repo_id: str, revision: str = "main") -> dict:
        repo = self.repo(repo_id)
        commit, blobs = repo.find(revision), "blobs" in parse_qs(urlsplit(self.path).query)
        siblings = []
        for path, entry in commit.files.items():
            lfs = {"lfs": {"sha256": entry.sha256, "size": entry.size, "pointerSize": 130}} if entry.lfs else {}
            known = {"size": entry.size} if self.server.plain else {"blobId": entry.oid, "size": entry.size}
            siblings.append({"rfilename": path} | (known | lfs if blobs else {}))
        return {"id": repo_id, "sha": commit.oid, "private": repo.private, "tags": [], "siblings": siblings}

    def tree(self, body: bytes, repo_id: str, revision: str) -> list:
        files = self.repo(repo_id).find(revision).files
        return [{"type": "file", "path": path} | entry.facts for path, entry in files.items()]

    def refs(self, body: bytes, repo_id: str) -> dict:
        repo = self.repo(repo_id)
        return {"converts": []} | {
            kind: [{"name": name, "ref": f"refs/{short}/{name}", "targetCommit": oid} for name, oid in named.items()]
            for kind, short, named in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
        }

    def tag(self, body: bytes, repo_id: str, revision: str) -> dict:
        repo, name = self.repo(repo_id, write=True), json.loads(body)["tag"]
        if name in repo.tags:
            raise Refused(409, "Tag reference exists already")
        repo.tags[name] = repo.find(revision).oid
        return {}

    def branch(self, body: bytes, repo_id: str, name: str) -> dict:
        repo = self.repo(repo_id, write=True)
        if name in repo.branches:
            raise Refused(409, "Reference already exists")
        if not re.fullmatch(r"[\w./-]+", name):
            raise Refused(400, f'Invalid rev id "{name}"')
        repo.branches[name] = repo.find(json.loads(body).get("startingPoint", "main")).oid
        return {}

    def access(self, body: bytes, repo_id: str) -> dict:
        if self.server.plain:
            raise Refused(404, "no such request")
        self.repo(repo_id, write=True)
        return {}

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str):
        commit = self.repo(repo_id).find(revision)
        known = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        entry = commit.files[path]
        if entry.lfs:
            linked = {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
            return 302, {}, known | linked | {"Location": f"{self.server.storage}/storage/{entry.sha256}"}
        content = self.server.objects[entry.sha256]
        content = content[:-1] + b"?" if path in self.server.damaged else content
        return 200, content, known | {"ETag": f'"{entry.oid}"'}

    def fetch(self, body: bytes, oid: str):
        if "Authorization" in self.headers:
            raise Refused(400, "a token was sent to the storage")
        content = self.server.objects[oid]
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
            return 206, content[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return 200, content, {"ETag": f'"{oid}"'}


REPO, REVISION = r"(?P<repo_id>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, Callable]] = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /storage/(?P<oid>\w+)", Handler.put),
    (r"(GET|HEAD) /storage/(?P<oid>\w+)", Handler.fetch),
    (rf"POST /api/verify/{REPO}", Handler.verify),
    (rf"POST /api/models/{REPO}/commit/{REVISION}", Handler.commit),
    (rf"GET /api/models/{REPO}", Handler.info),
    (rf"GET /api/models/{REPO}/revision/{REVISION}", Handler.info),
    (rf"GET /api/models/{REPO}/tree/{REVISION}", Handler.tree),
    (rf"GET /api/models/{REPO}/refs", Handler.refs),
    (rf"POST /api/models/{REPO}/tag/{REVISION}", Handler.tag),
    (rf"POST /api/models/{REPO}/branch/(?P<name>[^/]+)", Handler.branch),
    (rf"GET /api/models/{REPO}/auth-check/write", Handler.access),
    (rf"(GET|HEAD) /{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]
