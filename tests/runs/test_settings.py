"""Environment variables are read in one file, and listed in one table."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from refinedet.pipeline.runs import settings

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = "pipeline/runs/settings.py"
NAME_OF_A_VARIABLE = re.compile(r"(RAY|REFINEDET|MLFLOW|MALLOC|PYTHON|DS|CUBLAS|CUDA|OMP|GIT|AWS)_?[A-Z][A-Za-z_]+")


def test_nothing_else_reads_the_environment() -> None:
    for path in (path for top in ("model", "pipeline") for path in (REPOSITORY / top).rglob("*.py")):
        name = path.relative_to(REPOSITORY).as_posix()
        if name == SETTINGS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
            assert not reads, f"{name}:{node.lineno}: read it in {SETTINGS}"  # type: ignore[attr-defined]
            if isinstance(node, ast.Constant) and NAME_OF_A_VARIABLE.fullmatch(str(node.value)):
                assert node.value in settings.VARIABLES, f"{name}:{node.lineno}: list {node.value} in {SETTINGS}"


def test_the_documentation_is_the_table() -> None:
    assert (REPOSITORY / "docs" / "environment.md").read_text().endswith(settings.describe_variables())
    assert len(settings.VARIABLES) == settings.describe_variables().count("\n") - 2


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
