"""Check that the data of a job exists, without reading it."""

from __future__ import annotations

import os

from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.data.index import INDEX
from refinedet.pipeline.data.readers import format_of, list_files, root_of
from refinedet.pipeline.data.remote import exists
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

_ONE_FILE = ("coco", "lvis", "cvat")
"""formats whose annotations are files that the spec names"""


def check_data(spec: JobSpec) -> None:
    """UserError where neither the shards of a job nor the data sets that they are written from exist here."""
    shards = Run(spec).shards
    if storage.is_local(shards) and os.path.isfile(shards):
        raise UserError(f"data.shards must be a directory, received the file {shards}.")
    for part in ("train", "val"):
        if storage.exists(storage.join(shards, part, INDEX)):
            continue
        for split in getattr(spec.data, part):
            root_of(spec.data, split)
            for _, path in list_files(spec.data, split) if format_of(spec.data, split) in _ONE_FILE else ():
                if not exists(path):
                    raise UserError(f"data.{part}: there is no {path}; give the file of the annotations.")
