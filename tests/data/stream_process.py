"""A training process of its own, for tests that end it or its store: `python stream_process.py OPTIONS_AS_JSON`.

Prints a line with the process ids of its workers, then one for each batch: epoch, index, keys.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time

from refinedet.pipeline.config.spec import Augmentation
from refinedet.pipeline.data.index import open_shards

from tests.data.streams import open_stream


def main() -> None:
    options = json.loads(sys.argv[1])
    url, pause = options.pop("url"), options.pop("pause")
    stream = open_stream(open_shards(url), augmentation=Augmentation(), input_size=64, **options)
    for number, batch in enumerate(stream):
        if not number:
            say([process.pid for process in multiprocessing.active_children()])
        say([batch.epoch, batch.index, sorted(batch.keys)])
        time.sleep(pause)


def say(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
