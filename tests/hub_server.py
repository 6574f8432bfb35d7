"""A local stand-in for the Hugging Face hub, enough to download and upload a model, with a log of requests.

with Hub({"tiny/bert": {"main": "c0" * 20, "c0" * 20: {"config.json": b"{}"}}}) as hub:
    os.environ["HF_ENDPOINT"] = hub.url

A repository maps a commit (40 hexadecimal digits) to its files and a branch or tag to a commit. As on the hub,
safetensors are in Git LFS, and files are sent from any byte on.
"""

import base64
import hashlib
import http.server
import json
import re
import threading

API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+?)(/(?P<kind>revision|tree)/(?P<revision>[^/?]+))?(\?.*)?")
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>[^?]+)(\?.*)?")
UPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/?]+)(?:\?.*)?")


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
        revision = match["revision"] or "main"
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
        info = {"id": match["repo"], "sha": commit, "siblings": [{"rfilename": path} for path in files]}
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
    return path.endswith(".safetensors")


def reply(value: dict) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def error(status: int, code: str, message: str) -> tuple[int, dict[str, str], bytes]:
    headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
    return status, headers, json.dumps({"error": message}).encode()


def git_id(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
