"""A local stand-in for the Hugging Face hub, enough to download and upload a model, or to download a dataset.

with Hub({"tiny/bert": {"main": "c0" * 20, "c0" * 20: {"config.json": b"{}"}}}) as hub:
    os.environ["HF_ENDPOINT"] = hub.url

A repository maps a commit (40 hexadecimal digits) to its files and a branch or tag to a commit; that of a dataset is
named "datasets/BeIR/scifact". As on the hub, safetensors and .gz are in Git LFS, and files are sent from any byte on.
All requests are logged.
"""

import base64
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path
from typing import NamedTuple

from naming import names

REPO = "(?P<repo>(datasets/)?[^/]+/[^/]+?)"
API = re.compile(rf"/api/(models/)?{REPO}(/(?P<kind>revision|tree)/(?P<revision>[^/?]+))?(\?.*)?")
RESOLVE = re.compile(rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>[^?]+)(\?.*)?")
UPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/?]+)(?:\?.*)?")

# A process that runs commands, each in a fork of its own, whose modules are imported already. Retries do not wait.
SHELL = """
import json, os, sys, time
import embedft.commands.evaluate, embedft.commands.info, embedft.encoders.loading
from embedft.cli import main
from huggingface_hub import errors, snapshot_download, utils
for line in sys.stdin:
    words, *files = json.loads(line)
    if not (child := os.fork()):
        for number, path in enumerate(files, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        time.sleep = lambda seconds: None
        code = main(words)
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Hub:
    """A server thread that runs inside its `with` block, or until `stop`. `log` holds each request's (method, path).

    By (repository, path) of a file, `cut` has the byte at which each of its next connections breaks, and `sizes` the
    size that is claimed for it.
    """

    def __init__(self, repositories: dict[str, dict[str, str | dict[str, bytes]]]):
        self.repositories, self.log, self.read_only = repositories, [], False
        self.cut: dict[tuple[str, str], list[int]] = {}
        self.sizes: dict[tuple[str, str], int] = {}
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.log.append((self.command, self.path))
                status, headers, body = hub.answer(self.path)
                match, start, end = RESOLVE.fullmatch(self.path), 0, len(body)
                file = (match["repo"], match["path"]) if match else ("", "")
                size = hub.sizes.get(file, len(body))
                if self.command == "GET":
                    start = int(re.sub(r"\D", "", self.headers.get("Range", "0")))
                    size = len(body) - start
                    if hub.cut.get(file):
                        end, self.close_connection = hub.cut[file].pop(0), True
                if start:
                    status, headers = 206, headers | {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(size)}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body[start:end])

            do_HEAD = do_GET

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hub.log.append((self.command, self.path))
                status, headers, reply = hub.accept(self.path, body)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(reply))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def stop(self) -> None:
        """Stops the server; it refuses connections from here on."""
        self.server.shutdown()
        self.server.server_close()

    @property
    def downloaded(self) -> list[str]:
        """Paths of the files whose content was sent."""
        matches = (RESOLVE.fullmatch(path) for method, path in self.log if method == "GET")
        return sorted(match["path"] for match in matches if match)

    def accept(self, url: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a request that creates a repository, asks how to upload, or commits files."""
        if self.read_only:
            return error(401, "Unauthorized", "Invalid username or password.")
        if url == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(name, {"main": "0" * 40, "0" * 40: {}, "asked": asked})
            return reply({"url": f"{self.url}/{name}"})
        if url == "/api/validate-yaml":
            return reply({"errors": [], "warnings": []})
        name, kind, branch = UPLOAD.fullmatch(url).groups()
        if kind == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return reply({"files": [file | {"shouldIgnore": False} for file in files]})
        lines, commit = [json.loads(line) for line in body.splitlines()], "1" * 40
        added = [line["value"] for line in lines if line["key"] == "file"]
        self.repositories[name][commit] = {file["path"]: base64.b64decode(file["content"]) for file in added}
        self.repositories[name][branch] = commit
        return reply({"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit, "success": True})

    def answer(self, url: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a request."""
        match = API.fullmatch(url) or RESOLVE.fullmatch(url)
        repository = self.repositories.get(match["repo"]) if match else None
        if repository is None:
            return error(401, "RepoNotFound", "Invalid username or password.")
        revision = urllib.parse.unquote(match["revision"] or "main")
        commit = repository.get(revision) if isinstance(repository.get(revision), str) else revision
        files = repository.get(commit)
        if files is None:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if match.re is RESOLVE:
            body = files.get(match["path"])
            if body is None:
                return error(404, "EntryNotFound", "Entry not found")
            etag = hashlib.sha256(body).hexdigest() if is_large(match["path"]) else git_id(body)
            headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}
            return 200, headers, body
        if match["kind"] == "tree":
            entries = [self.entry(match["repo"], path, body) for path, body in files.items()]
            return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
        info = {"id": match["repo"].removeprefix("datasets/"), "sha": commit}
        info["siblings"] = [{"rfilename": path} for path in files]
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()

    def entry(self, repo: str, path: str, body: bytes) -> dict:
        """A file in a listing."""
        size = self.sizes.get((repo, path), len(body))
        entry = {"type": "file", "path": path, "size": size, "oid": git_id(body)}
        if is_large(path):
            entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": size, "pointerSize": 134}
        return entry


def is_large(path: str) -> bool:
    """Whether a file is in Git LFS."""
    return path.endswith((".safetensors", ".gz"))


def reply(value: dict) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def error(status: int, code: str, message: str) -> tuple[int, dict[str, str], bytes]:
    headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
    return status, headers, json.dumps({"error": message}).encode()


def git_id(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


class Answer(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


class Shell:
    """A process that runs commands in a folder, with a hub and a cache, each in a fork that has its imports."""

    def __init__(self, hub: Hub, folder: Path, **more: str):
        self.folder, self.cache = folder, folder / "home" / "hub"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "PYTHONPATH": path} | more
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": folder}
        self.process = subprocess.Popen([sys.executable, "-c", SHELL], env=environment, **pipe)

    def __enter__(self) -> "Shell":
        return self

    def __exit__(self, *error) -> None:
        self.process.communicate()

    def run(self, *words: str) -> Answer:
        """Runs `embedft` with these words."""
        files = [self.folder / "out", self.folder / "err"]
        self.process.stdin.write(json.dumps([words, *map(str, files)]) + "\n")
        self.process.stdin.flush()
        return Answer(int(self.process.stdout.readline()), *(file.read_text() for file in files))

    def info(self, name: str, *options: str) -> Answer:
        return self.run("info", name, "--device", "cpu", *options)

    def cached(self, name: str) -> dict[str, bytes]:
        """The files of a model's snapshots, by their names."""
        places = (self.cache / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/*")
        return {path.name: path.read_bytes() for path in places if path.is_file()}


def assert_refused(answer: Answer, *facts: object) -> None:
    """The command ended with one line about these facts."""
    assert answer.code == 2
    assert re.match("embedft [a-z]+: error: ", answer.err), answer.err
    assert answer.err.count("\n") == 1, answer.err
    assert names(answer.err, *facts), answer.err
