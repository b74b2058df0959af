"""An S3 endpoint on loopback that can be killed and started again: `python object_store.py PORT FOLDER [SUFFIX COUNT]`.

It serves one bucket, `bucket`, holding the files of DIRECTORY, before its port opens. With SUFFIX it dies in the middle
of its COUNT-th answer with the content of an object of that suffix.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import run_simple


def serve(port: str, folder: Path, suffix: str = "", count: str = "0") -> None:
    backend = s3_backends["123456789012"]["aws"]
    backend.create_bucket("bucket", "us-east-1")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            backend.put_object("bucket", path.relative_to(folder).as_posix(), path.read_bytes())
    application: Any = DomainDispatcherApplication(create_backend_app)
    application = _dying(application, suffix, int(count)) if suffix else application
    run_simple("127.0.0.1", int(port), application, threaded=True, request_handler=MotoRequestHandler)


def _dying(application: Any, suffix: str, count: int) -> Callable[..., Any]:
    answers = itertools.count(1)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        last = environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(suffix) and next(answers) == count
        body = application(environ, start_response)
        return _half(b"".join(body)) if last else body

    return answer


def _half(body: bytes) -> Iterator[bytes]:
    yield body[: len(body) // 2]
    os._exit(1)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
