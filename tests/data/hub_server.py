"""A small Hugging Face hub: it serves directories as data sets, by the addresses of the hub's client."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@contextmanager
def hub_server(branches: dict[tuple[str, str], Path]) -> Iterator[str]:
    """Serve directories, by (data set, branch), until the context ends; yields the endpoint (HF_ENDPOINT)."""
    commits = {place: hashlib.sha1("/".join(place).encode()).hexdigest() for place in branches}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            for (name, branch), root in branches.items():
                commit = commits[name, branch]
                files = {str(file.relative_to(root)): file for file in sorted(root.rglob("*")) if file.is_file()}
                if path in (f"/api/datasets/{name}/revision/{at}" for at in (branch, commit)):
                    siblings = [{"rfilename": file} for file in files]
                    return self._answer(json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())
                if path in (f"/api/datasets/{name}/tree/{at}" for at in (branch, commit)):
                    tree = [{"type": "file", "path": file, "size": files[file].stat().st_size, "oid": _oid(files[file])}
                            for file in files]  # fmt: skip
                    return self._answer(json.dumps(tree).encode())
                for file in files:
                    if path == f"/datasets/{name}/resolve/{commit}/{file}":
                        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(files[file])}"'}
                        return self._answer(files[file].read_bytes(), headers)
            known = any(path.startswith(f"/api/datasets/{name}/") for name, _ in branches)
            return self._answer(b"{}", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"}, status=404)

        do_HEAD = do_GET

        def _answer(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
