"""Execute the notebooks of the manual on a CPU, and keep what they show in them.

    python -m tests.docs.notebooks [NAME ...]

Each begins in an empty directory. What is kept of what they show: text, and pictures of at most 100 kB.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests.outside import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))
MOST_BYTES = 100_000


def execute(path: Path, timeout_s: int = 1200) -> nbformat.NotebookNode:
    """The notebook with new outputs; raise an error of a cell, or that it took longer than `timeout_s`."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        environment = {"REFINEDET_JOBS": str(REPOSITORY / "jobs"), "PATH": _path()}
        client = NotebookClient(
            notebook, timeout=timeout_s, coalesce_streams=True, resources={"metadata": {"path": folder}}
        )
        client.execute(env=os.environ | environment)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [_small(output) for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def _path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def _small(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    if "execution_count" in output:
        output.execution_count = None
    if "image/png" in output.get("data", {}):
        output.data = {"image/png": output.data["image/png"]}
        assert len(output.data["image/png"]) < MOST_BYTES, "a picture is too large for the repository: lower its dpi"
    return output


if __name__ == "__main__":
    for notebook in NOTEBOOKS:
        if not sys.argv[1:] or notebook.stem in sys.argv[1:]:
            nbformat.write(execute(notebook), notebook)
