"""Servers on loopback, one of which speaks as much of the Hugging Face Hub as data sets need."""

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

Server = TypeVar("Server", bound=http.server.HTTPServer)


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Within the block, the server answers."""
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Hub(http.server.ThreadingHTTPServer):
    """A data set of the Hub, and what was asked for.

    files      path in the repository -> contents
    announced  file name -> SHA-256 to announce instead of the right one
    breaks     downloads to break off in the middle
    """

    def __init__(self, repository: str, revision: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repository, self.revision, self.files = repository, revision, files
        self.commit = "0" * 40 if revision == "main" else revision
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.announced: dict[str, str] = {}
        self.breaks = 0
        self.requests: list[str] = []
        self.downloads: list[str] = []

    def metadata(self, path: str) -> bytes | None:
        """The answer of the API, or None where the path is no question to it."""
        prefix = f"/api/datasets/{self.repository}"
        if path == f"{prefix}/tree/{self.revision}":
            files = [{"type": "file", "path": p, "size": 1, "oid": "0"} for p in self.files]
            return json.dumps(files).encode()
        if path == f"{prefix}/revision/{self.revision}":
            siblings = [{"rfilename": name} for name in self.files]
            answer = {"id": self.repository, "sha": self.commit, "siblings": siblings}
            return json.dumps(answer).encode()
        return None


class HubHandler(http.server.BaseHTTPRequestHandler):
    def answer(self, body: bool) -> None:
        hub = self.server
        assert isinstance(hub, Hub)
        path = self.path.partition("?")[0]
        hub.requests.append(path)
        headers = {"Content-Type": "application/json"}
        data, breaks = hub.metadata(path), False
        if data is None:
            prefix = f"/datasets/{hub.repository}/resolve/{hub.revision}/"
            data = hub.files.get(path.removeprefix(prefix)) if path.startswith(prefix) else None
            if data is None:
                self.send_error(404)
                return
            name = re.sub(".*/", "", path)
            digest = hub.announced.get(name, hashlib.sha256(data).hexdigest())
            headers = {
                "X-Repo-Commit": hub.commit,
                "X-Linked-Etag": f'"{digest}"',
                "X-Linked-Size": str(len(data)),
                "ETag": f'"{digest}"',
            }
            if body:
                hub.downloads.append(name)
                breaks = hub.breaks > 0
        self.send_response(200)
        for header, value in headers.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if breaks:
            hub.breaks -= 1
            data = data[: len(data) // 2]
            self.close_connection = True
        if body:
            self.wfile.write(data)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass
