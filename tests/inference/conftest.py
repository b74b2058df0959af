"""A display without a monitor."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def display_server() -> Iterator[str]:
    """One for all tests: Tk ends a process whose display has gone, even after its windows."""
    if not shutil.which("Xvfb"):
        pytest.skip("needs Xvfb, a display without a monitor")
    reading, writing = os.pipe()
    command = ["Xvfb", "-displayfd", str(writing), "-screen", "0", "640x480x24"]
    with subprocess.Popen(command, pass_fds=[writing], stderr=subprocess.DEVNULL) as server:
        yield f":{os.read(reading, 20).decode().strip()}"
        server.terminate()
    os.close(reading)
    os.close(writing)


@pytest.fixture
def display(display_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a display of 640 x 480 pixels, empty and black, where this process and its children draw."""
    monkeypatch.setenv("DISPLAY", display_server)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    return display_server
