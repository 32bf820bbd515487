"""A Hugging Face Hub on loopback: listings, metadata and files as huggingface_hub 2.4 asks for them.

Two listeners, because the real one is two hosts: the Hub answers the API, small files and, for files in
LFS (every `.gguf`), a 302 with `X-Linked-*`; the CDN on another port has the bytes. A test adds repositories,
orders faults with `misbehave`, and reads `requests` afterwards. Any thread may use it; leaving the `with`
ends every connection.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from tests.support.hubrepos import NO_FAULT, Exchange, Fault, File, Listener, Repo, chunks

_CHUNK = 64 * 1024
_TIME = "2026-01-02T03:04:05.000Z"
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class HubServer:
    """The Hub; a context manager. `url` is its endpoint."""

    def __init__(self) -> None:
        self.requests: list[Exchange] = []
        self.throttle: int | None = None
        """Bytes a second of one connection."""
        self.down: int | None = None
        """The status of every API answer, as in an outage."""
        self.down_headers: dict[str, str] = {}
        self.api_delay_s = 0.0
        """Before every API answer."""
        self.redirect_api: str | None = None
        """Another origin that renamed repositories are redirected to."""
        self.raw_listing: bytes | None = None
        """Sent instead of the listing."""
        self.page_size = 1000
        """Of listings."""
        self.rejected_tokens: set[str] = set()
        """Known to nobody: 401."""
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        """Old id -> new id."""
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._faults: dict[tuple[str, str], list[Fault]] = {}
        self._n_etags = 0
        self._listeners = [_Listener(self, "hub", _answer_hub), _Listener(self, "cdn", _answer_cdn)]
        self.url, self.cdn_url = (f"http://127.0.0.1:{listener.server_port}" for listener in self._listeners)

    def __enter__(self) -> Self:
        for listener in self._listeners:
            listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all connections and both listeners; calls after it are refused by the system."""
        self.closing.set()
        for listener in self._listeners:
            listener.stop()
        self._listeners.clear()

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path],
        *,
        revision: str = "main",
        sha: str | None = None,
        gated: bool = False,
        private: bool = False,
        token: str | None = None,
        downloads: int = 0,
        likes: int = 0,
    ) -> str:
        """Add a repository, or commit to a revision of one; returns the commit. Old commits stay readable."""
        snapshot = {path: File.of(path, content) for path, content in files.items()}
        facts = json.dumps([repo_id, *((path, file.sha256) for path, file in snapshot.items())])
        commit = sha or hashlib.sha1(facts.encode()).hexdigest()
        with self.lock:
            old = self.repos.get(repo_id)
            commits = (old.commits if old else {}) | {commit: snapshot}
            revisions = {"main": commit} | (old.revisions if old else {}) | {revision: commit}
            self.repos[repo_id] = Repo(repo_id, commits, revisions, gated, private, token, downloads, likes)
        return commit

    def misbehave(self, repo_id: str, path: str, **fault: Any) -> Fault:
        """Order a fault (the fields of Fault) for a file; several are used up in order."""
        ordered = Fault(**fault)
        with self.lock:
            self._faults.setdefault((repo_id, path), []).append(ordered)
        return ordered

    def behave(self) -> None:
        """Withdraw all faults."""
        with self.lock:
            self._faults.clear()

    def take_fault(
        self, repo_id: str, path: str, listener: Listener, method: str, *, serves_bytes: bool
    ) -> Fault:
        """The fault that hits a request, counted down."""
        with self.lock:
            for fault in self._faults.get((repo_id, path), []):
                if fault.times != 0 and fault.hits(listener, method, serves_bytes):
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return NO_FAULT

    def etag(self, file: File, fault: Fault) -> str:
        """The ETag of a file's bytes, quoted."""
        text = file.sha256[:32] if file.is_lfs else file.blob_id
        if not fault.change_etag:
            return f'"{text}"'
        with self.lock:
            self._n_etags += 1
            return f'"{text}-{self._n_etags}"'

    def bytes_sent(self, path: str) -> int:
        """Bytes of a file's body sent so far, over all repositories and tries."""
        return sum(exchange.bytes_sent for exchange in self.file_requests(path))

    def file_requests(self, path: str, method: str = "GET") -> list[Exchange]:
        """What came for a file, oldest first, on both listeners."""
        with self.lock:
            seen = list(self.requests)
        return [one for one in seen if one.method == method and one.path.endswith(f"/{path}")]

    def tokens_seen(self, listener: Listener) -> set[str]:
        """Tokens that reached a listener."""
        with self.lock:
            return {one.token for one in self.requests if one.listener == listener and one.token}


class _Listener(ThreadingHTTPServer):
    """One port; each connection has a thread, all joined by `stop`."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, hub: HubServer, name: Listener, answer: Callable[[_Handler], None]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.name, self.answer = hub, name, answer
        self._connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), name=f"hub-{name}")

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self) -> None:
        """Stop serving, end the connections, wait for their threads."""
        if self._thread.is_alive():
            self.shutdown()
            self._thread.join()
        with self.hub.lock:
            open_now = list(self._connections)
        for connection in open_now:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept, and remember the connection."""
        connection, address = super().get_request()
        with self.hub.lock:
            self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        """Close, and forget the connection."""
        with self.hub.lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are no news; anything else is printed, as a fault of this server."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection of either listener."""

    protocol_version = "HTTP/1.1"
    server: _Listener
    exchange: Exchange

    def do_GET(self) -> None:
        """Note the request and let the listener answer it."""
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.exchange = Exchange(
            self.server.name, self.command, unquote(parts.path), parse_qs(parts.query), headers
        )
        with self.server.hub.lock:
            self.server.hub.requests.append(self.exchange)
        self.server.answer(self)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def send_head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        """The head of an answer."""
        self.exchange.status = status
        self.send_response(status)
        for name, value in ({"Content-Length": str(length)} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()

    def send_body(self, chunk: bytes) -> None:
        """A part of a body, counted before the client can have it."""
        if self.command == "HEAD":
            return
        self.exchange.bytes_sent += len(chunk)
        try:
            self.wfile.write(chunk)
        except OSError:
            self.exchange.bytes_sent -= len(chunk)
            raise

    def send_json(self, value: Any, headers: Mapping[str, str] = {}) -> None:
        """A whole JSON answer."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_head(200, len(body), {"Content-Type": "application/json; charset=utf-8"} | dict(headers))
        self.send_body(body)

    def send_refusal(self, status: int, code: str = "", message: str = "", **more: str) -> None:
        """An error as the Hub words it: codes in headers, the text in JSON."""
        body = json.dumps({"error": message}).encode()
        headers = {"X-Error-Code": code, "X-Error-Message": message} | more
        self.send_head(status, len(body), {name: value for name, value in headers.items() if value})
        self.send_body(body)


# --- the Hub -----------------------------------------------------------------------------------


def _answer_hub(handler: _Handler) -> None:
    hub, path = handler.server.hub, handler.exchange.path
    if hub.api_delay_s and path.startswith("/api/"):
        hub.closing.wait(hub.api_delay_s)
    if handler.exchange.token in hub.rejected_tokens:
        handler.send_refusal(401, message="Invalid credentials in Authorization header")
    elif path.startswith("/api/") and hub.down is not None:
        handler.send_refusal(hub.down, message="The Hub is down", **hub.down_headers)
    elif path == "/api/models":
        _list_models(handler)
    elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
        _describe(handler, match[1], match[2] or "revision", match[3] or "main")
    elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
        _resolve(handler, match[1], match[2], match[3])
    else:
        handler.send_refusal(404, message="Sorry, we can't find the page you are looking for.")


def _find_repo(handler: _Handler, repo_id: str) -> Repo | None:
    """The repository, unless the caller may not know of it; then that was answered."""
    hub, token = handler.server.hub, handler.exchange.token
    if repo_id in hub.renamed:
        location = handler.path.replace(repo_id, hub.renamed[repo_id], 1)
        handler.send_head(307, 0, {"Location": (hub.redirect_api or "") + location})
        return None
    repo = hub.repos.get(repo_id)
    if repo is None or (repo.private and token != repo.token):
        handler.send_refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        return None
    return repo


def _list_models(handler: _Handler) -> None:
    hub, query = handler.server.hub, handler.exchange.query
    if hub.raw_listing is not None:
        handler.send_json(hub.raw_listing)
        return
    with hub.lock:
        repos = sorted(hub.repos.values(), key=lambda repo: -repo.downloads)
    wanted = query.get("search", [""])[0].lower()
    public = [repo for repo in repos if not repo.private and wanted in repo.id.lower()]
    start = int(query.get("cursor", ["0"])[0])
    end = start + min(int(query.get("limit", ["1000"])[0]), hub.page_size)
    more = urlencode(query | {"cursor": [str(end)]}, doseq=True)
    link = {"Link": f'<{hub.url}/api/models?{more}>; rel="next"'} if end < len(public) else {}
    handler.send_json([_summary(repo, query) for repo in public[start:end]], link)


def _summary(repo: Repo, query: dict[str, list[str]]) -> dict[str, Any]:
    """A repository in a listing: all the usual keys, or its id and those that `expand` names."""
    commit = repo.revisions["main"]
    known: dict[str, Any] = {
        "likes": repo.likes,
        "downloads": repo.downloads,
        "private": repo.private,
        "createdAt": _TIME,
        "tags": ["gguf"],
    }
    siblings = [{"rfilename": path} for path in repo.commits[commit]]
    extra = {"siblings": siblings, "gated": _gate(repo), "lastModified": _TIME, "sha": commit}
    wanted = query.get("expand", query.get("expand[]"))
    if wanted is not None:
        known = {key: value for key, value in (known | extra).items() if key in wanted}
    elif "full" in query:
        known |= extra
    return {"_id": "0", "id": repo.id, "modelId": repo.id} | known


def _gate(repo: Repo) -> str | bool:
    return "auto" if repo.gated else False


def _describe(handler: _Handler, repo_id: str, kind: str, revision: str) -> None:
    """`/api/models/ID`, also of a revision, and `/api/models/ID/tree/REVISION`."""
    repo = _find_repo(handler, repo_id)
    if repo is None:
        return
    commit = repo.commit(revision)
    if commit is None:
        handler.send_refusal(404, "RevisionNotFound", "Invalid rev id")
    elif kind == "tree":
        handler.send_json([_tree_entry(path, file) for path, file in repo.commits[commit].items()])
    else:
        has_blobs = "blobs" in handler.exchange.query
        siblings = [_sibling(path, file, has_blobs) for path, file in repo.commits[commit].items()]
        summary = _summary(repo, {"full": ["true"]})
        handler.send_json(
            summary | {"author": repo_id.split("/", maxsplit=1)[0], "sha": commit, "siblings": siblings}
        )


def _sibling(path: str, file: File, has_blobs: bool) -> dict[str, Any]:
    if not has_blobs:
        return {"rfilename": path}
    lfs = {"lfs": file.lfs} if file.is_lfs else {}
    return {"rfilename": path, "size": file.size, "blobId": file.blob_id} | lfs


def _tree_entry(path: str, file: File) -> dict[str, Any]:
    lfs = {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 134}} if file.is_lfs else {}
    return {"type": "file", "oid": file.blob_id, "size": file.size, "path": path} | lfs


def _resolve(handler: _Handler, repo_id: str, revision: str, path: str) -> None:
    """A file: its bytes, or where they are."""
    repo = _find_repo(handler, repo_id)
    if repo is None:
        return
    commit, token = repo.commit(revision), handler.exchange.token
    if repo.gated and (token is None or token != repo.token):
        gate = f"Access to model {repo_id} is restricted. Please log in."
        handler.send_refusal(403 if token else 401, "GatedRepo", gate)
    elif commit is None:
        handler.send_refusal(404, "RevisionNotFound", "Invalid rev id")
    elif path not in repo.commits[commit]:
        handler.send_refusal(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
    else:
        _resolve_file(handler, repo_id, commit, path, repo.commits[commit][path])


def _resolve_file(handler: _Handler, repo_id: str, commit: str, path: str, file: File) -> None:
    hub = handler.server.hub
    fault = hub.take_fault(repo_id, path, "hub", handler.command, serves_bytes=not file.is_lfs)
    if fault.status is not None:
        handler.send_refusal(fault.status, message="Ordered by a test", **fault.headers)
    elif file.is_lfs:
        location = f"{hub.cdn_url}/{repo_id}/{commit}/{quote(path)}?X-Amz-Signature=0"
        size = file.size if fault.lie_size is None else fault.lie_size
        linked = {"X-Linked-Size": str(size), "X-Linked-ETag": f'"{file.sha256}"'}
        headers = {"X-Repo-Commit": commit, "Location": fault.redirect or location} | linked
        handler.send_head(302, 0, headers)
    elif fault.redirect is not None:
        handler.send_head(302, 0, {"X-Repo-Commit": commit, "Location": fault.redirect})
    else:
        _send_file(handler, file, fault, {"X-Repo-Commit": commit})


# --- the bytes ---------------------------------------------------------------------------------


def _answer_cdn(handler: _Handler) -> None:
    hub = handler.server.hub
    owner, name, commit, path = (handler.exchange.path.lstrip("/").split("/", 3) + [""] * 4)[:4]
    repo_id = f"{owner}/{name}"
    repo = hub.repos.get(repo_id)
    file = repo.commits.get(commit, {}).get(path) if repo else None
    if file is None:
        handler.send_refusal(404, message="no such object")
        return
    fault = hub.take_fault(repo_id, path, "cdn", handler.command, serves_bytes=True)
    if fault.status is not None:
        handler.send_refusal(fault.status, message="Ordered by a test", **fault.headers)
    else:
        _send_file(handler, file, fault, {})


def _send_file(handler: _Handler, file: File, fault: Fault, headers: Mapping[str, str]) -> None:
    """RFC 9110: Range, If-Range, 200, 206, 416."""
    etag = handler.server.hub.etag(file, fault)
    headers = {"ETag": etag, "Accept-Ranges": "bytes", "Content-Type": "binary/octet-stream"} | dict(headers)
    asked = _RANGE.fullmatch(handler.exchange.range or "")
    holds = handler.exchange.headers.get("if-range", etag) == etag
    if asked is None or not holds or fault.no_range:
        length = file.size if fault.lie_length is None else fault.lie_length
        handler.send_head(200, length, headers)
        _send_bytes(handler, file, fault, 0, min(length, file.size), is_short=length > file.size)
        return
    start, end = int(asked[1]), min(int(asked[2] or file.size), file.size - 1) + 1
    if start >= end:
        handler.send_head(416, 0, headers | {"Content-Range": f"bytes */{file.size}"})
        return
    handler.send_head(206, end - start, headers | {"Content-Range": f"bytes {start}-{end - 1}/{file.size}"})
    _send_bytes(handler, file, fault, start, end, is_short=False)


def _send_bytes(handler: _Handler, file: File, fault: Fault, start: int, end: int, *, is_short: bool) -> None:
    """The body from `start` to `end` at the ordered pace; a body that ends too early closes the connection."""
    if handler.command == "HEAD":
        return
    closing = handler.server.hub.closing
    stop = min(end, *(start + cut for cut in (fault.cut_after, fault.stall_after) if cut is not None), end)
    handler.close_connection = is_short or stop < end
    size, pause_s = _pace(handler.server.hub, fault)
    for position in range(start, stop, size):
        length = min(size, stop - position)
        for chunk in chunks(file.content, position, length):
            is_last = fault.wrong_hash and position + length == file.size
            handler.send_body(chunk[:-1] + bytes([chunk[-1] ^ 1]) if is_last else chunk)
        if closing.wait(pause_s) if pause_s else closing.is_set():
            return
    if fault.stall_after is not None and stop < end:
        closing.wait()


def _pace(hub: HubServer, fault: Fault) -> tuple[int, float]:
    """Bytes at a time, and the pause after them in seconds."""
    if fault.drip is not None:
        return fault.drip
    if hub.throttle is not None:
        return max(1, hub.throttle // 50), 0.02
    return _CHUNK, 0.0
