"""Large JSON files element by element: memory for one element at a time, not for the file."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from refinedet.pipeline.runs import storage

_CHUNK = 4 * 2**20
_SPACE = " \t\n\r"


def iterate_members(path: str) -> Iterator[tuple[str, Any, bool]]:
    """Members of the object that a JSON file holds: (name, element, True) for every element of an array, and
    (name, value, False) for any other value and for an empty array.

    Raises ValueError where the file is not one JSON object.
    """
    fs, inner = storage.filesystem(path)
    with fs.open(inner, "rb") as file:
        text = _Text(file)
        text.expect("{", "the file is no JSON object")
        if text.skip("}"):
            return
        while True:
            name = text.value()
            if not isinstance(name, str):
                raise ValueError(f"a name of a member must be text, received {name!r:.80}")
            text.expect(":", f"a colon is missing after {name!r:.80}")
            if not text.skip("["):
                yield name, text.value(), False
            elif text.skip("]"):
                yield name, [], False
            else:
                while True:
                    yield name, text.value(), True
                    if text.skip("]"):
                        break
                    text.expect(",", f"a comma is missing in {name!r:.80}")
            if text.skip("}"):
                break
            text.expect(",", f"a comma is missing after {name!r:.80}")
        text.expect("", "the file continues after its end")


class _Text:
    """A window of the file's text."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.window = ""
        self.at = 0
        self.ended = False
        self.decoder = json.JSONDecoder()
        self.characters = codecs.getincrementaldecoder("utf-8-sig")()

    def skip(self, mark: str) -> bool:
        """Go past `mark`, where it comes next; "" is the end of the file."""
        self._skip_space()
        if mark and self.window[self.at : self.at + 1] == mark:
            self.at += 1
            return True
        return not mark and self.at == len(self.window)

    def expect(self, mark: str, fault: str) -> None:
        if not self.skip(mark):
            raise ValueError(fault)

    def value(self) -> Any:
        """The next value."""
        self._skip_space()
        while True:
            try:
                found, end = self.decoder.raw_decode(self.window, self.at)
                if end < len(self.window) or not self._read():  # a number may continue
                    self.at = end
                    return found
            except ValueError:
                if not self._read():
                    raise

    def _skip_space(self) -> None:
        while True:
            while self.at < len(self.window) and self.window[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.window) or not self._read():
                return

    def _read(self) -> bool:
        """Take another chunk; False at the end of the file."""
        if self.ended:
            return False
        chunk = self.file.read(max(_CHUNK, len(self.window) - self.at))  # a value that is longer is read in few steps
        self.ended = not chunk
        self.window = self.window[self.at :] + self.characters.decode(chunk, final=self.ended)
        self.at = 0
        return not self.ended or bool(self.window)
