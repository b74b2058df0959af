"""A public name means one thing: it is defined in one file, and no two rooms have a file of the same name."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for top in ("model", "pipeline") for path in (REPOSITORY / top).rglob("*.py"))
# One command is one function of the same name in `cli/`; a metric, a hook of faults and a program are found by name.
BY_NAME = {"METRIC", "app", "hook", "logger", "main", "T"}
COMMANDS = REPOSITORY / "pipeline" / "cli"
# A reference in PyTorch or NumPy has the name of its operator.
REFERENCES = {"merge_reference.py"}
# Reads and writes with the one retry, under the names of `runs/storage.py`.
RETRIED = {"remote.py"}


def public_names(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            continue
        yield from (name for name in names if not name.startswith("_") and name not in BY_NAME)


def test_a_public_name_is_defined_once() -> None:
    counted = (path for path in SOURCES if path.parent != COMMANDS and path.name not in REFERENCES | RETRIED)
    places = Counter(name for path in counted for name in set(public_names(path)))
    assert not [name for name, count in places.items() if count > 1]


def test_no_two_rooms_have_a_file_of_one_name() -> None:
    files = Counter(path.name for path in SOURCES if not path.name.startswith("__"))
    assert not [name for name, count in files.items() if count > 1]
