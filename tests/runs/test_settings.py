"""Environment variables are read in one file, and listed in one table."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from refinedet.pipeline.runs import settings

REPOSITORY = Path(__file__).resolve().parents[2]
# The entry point runs before anything else is imported; redaction compares with every value. The others hand the
# environment to processes that they start, or set what their library reads before it loads.
ALLOWED = {"runs/settings.py", "runs/redaction.py", "cluster/entrypoint.py"}


def test_nothing_else_reads_the_environment() -> None:
    for path in (REPOSITORY / "pipeline").rglob("*.py"):
        name = path.relative_to(REPOSITORY / "pipeline").as_posix()
        if name in ALLOWED:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
            assert not reads, f"{name}:{node.lineno}: read it in pipeline/runs/settings.py"  # type: ignore[attr-defined]


def test_the_documentation_is_the_table() -> None:
    assert (REPOSITORY / "docs" / "environment.md").read_text().endswith(settings.describe())
    assert len(settings.VARIABLES) == settings.describe().count("\n") - 2


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in settings.VARIABLES.values():
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    settings.provide("mlflow")
    assert settings.read("MLFLOW_HTTP_REQUEST_TIMEOUT") == "7"
    assert settings.read("MLFLOW_DISABLE_TELEMETRY") == "true"
    assert settings.read("RAY_API_SERVER_ADDRESS") == "http://127.0.0.1:8265"
    assert settings.read("MLFLOW_TRACKING_URI") is None
    with pytest.raises(KeyError):
        settings.read("NOT_LISTED")
