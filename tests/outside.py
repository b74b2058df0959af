"""Real photos and known answers that lie beside the repository, in ../shared, for whoever has them.

A test that reads them takes a made-up fixture of the tree too, so that it runs everywhere and skips nowhere.
"""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


def outside(*parts: str) -> list[Path]:
    """A file or directory of ../shared as a list of one, for `parametrize`; empty where it is missing."""
    path = SHARED.joinpath(*parts)
    return [path] if path.exists() else []
