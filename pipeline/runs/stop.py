"""Signals that stop a job: it saves, and ends as after `refinedet stop`.

This file sets an event; docs/architecture.md, "What a stop does", follows it to the checkpoint.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SAVING = "  stopping: saving first (Ctrl-C again ends at once, and loses the steps since the last save)"


@contextmanager
def stop_signals(report: Callable[[str], None], message: str = SAVING) -> Iterator[threading.Event]:
    """Event that SIGINT and SIGTERM set, with a message; a second SIGINT interrupts as usual.

    Outside the main thread, where Python cannot handle signals, they do not set it.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        report(message)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
