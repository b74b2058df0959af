"""An S3 endpoint on loopback that can be killed and started again: `python object_store.py PORT FOLDER`.

It serves one bucket, `bucket`, holding the files of FOLDER, before its port opens.
"""

from __future__ import annotations

import sys
from pathlib import Path

from moto.s3.models import s3_backends
from moto.server import main


def serve(port: str, folder: Path) -> None:
    backend = s3_backends["123456789012"]["aws"]
    backend.create_bucket("bucket", "us-east-1")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            backend.put_object("bucket", path.relative_to(folder).as_posix(), path.read_bytes())
    main(["--host", "127.0.0.1", "--port", port])


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
