"""The documentation stays true: its commands parse, its links and paths exist, its tables are the generated ones."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import nbformat
import pytest
import typer
from PIL import Image
from refinedet.model import RefineDet, RefineDetConfig
from refinedet.model.export import export_onnx
from refinedet.pipeline.cli.main import app
from refinedet.pipeline.config.reference import describe_spec
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.runs.settings import describe_variables

from tests.docs.notebooks import NOTEBOOKS, execute

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("infra/*.md"), *ROOT.glob("csrc/*.md")])
JOBS = sorted(path for path in ROOT.glob("jobs/**/*.yaml") if path.parent.name != "sweeps")


def blocks(text: str) -> list[str]:
    """The lines of all code blocks, continued lines joined."""
    code = "\n".join(re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    return code.replace("\\\n", " ").splitlines()


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for line in blocks(page.read_text()):
            for part in re.split(r"\s{6,}(?=refinedet )|\s\|\s|\s&\s*$|;", line):
                match = re.match(r"\s*(?:\.venv/bin/)?refinedet (.*)", part.partition(" #")[0])
                if match:
                    found.append((page.name, match[1].strip()))
    return found


def test_pages_hold_commands() -> None:
    assert len(commands()) > 20


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: str(value)[:60])
def test_every_command_parses(page: str, line: str) -> None:
    command: click.Command = typer.main.get_command(app)
    arguments = shlex.split(line)
    context = click.Context(command, info_name="refinedet")
    while isinstance(command, click.Group) and arguments:
        name = arguments.pop(0)
        found = command.get_command(context, name)
        assert found is not None, f"{page}: there is no command {name!r}"
        command, context = found, click.Context(found, info_name=name, parent=context)
    command.parse_args(context, arguments)  # raises click.UsageError for an unknown option or a missing argument


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_pages_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            path = page.parent / target.partition("#")[0]
            assert path.exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_pages_name_exist(page: Path) -> None:
    """Paths in backquotes that begin with a directory of the repository."""
    for path in re.findall(r"`((?:model|pipeline|csrc|jobs|infra|tests|docs)/[\w./-]+)`", page.read_text()):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_reference_of_the_spec_is_generated_and_leaves_no_key_unexplained() -> None:
    assert (ROOT / "docs" / "job-spec.md").read_text() == describe_spec(), (
        "refinedet schema --format markdown > docs/job-spec.md"
    )
    for line in describe_spec().splitlines():
        if line.startswith("| `"):
            assert not line.endswith("|  |"), f"a docstring is missing: {line}"


def test_every_section_of_the_spec_is_in_the_reference() -> None:
    text = describe_spec()
    for name in JobSpec.model_fields:
        assert f"`{name}`" in text
    assert "| `theta` |" in text, "the detector's keys are explained in its docstring"


def test_the_table_of_the_environment_is_generated() -> None:
    assert describe_variables() in (ROOT / "docs" / "environment.md").read_text()


def test_the_navigation_of_the_site_holds_every_page() -> None:
    named = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    notebooks = {f"notebooks/{notebook.stem}.md" for notebook in NOTEBOOKS}  # made pages by docs/notebooks/pages.py
    assert named == {page.name for page in ROOT.glob("docs/*.md")} | notebooks


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_hold_what_they_show_and_little_else(notebook: Path) -> None:
    content = notebook.read_text()
    assert len(content) < 200_000, "python -m tests.docs.notebooks"
    assert '"outputs": [\n    {' in content, "it shows nothing: python -m tests.docs.notebooks"
    assert str(ROOT) not in content
    assert "/tmp/" not in content


def test_the_detector_by_hand_still_shows_what_its_notebook_holds() -> None:
    (path,) = (notebook for notebook in NOTEBOOKS if notebook.stem == "detector-by-hand")
    assert texts(execute(path)) == texts(nbformat.read(path, as_version=4))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1800)  # it launches a job, a minute on an idle machine
def test_the_notebook_that_reads_a_run_executes() -> None:
    (path,) = (notebook for notebook in NOTEBOOKS if notebook.stem == "a-run-read")
    assert texts(execute(path)) == texts(nbformat.read(path, as_version=4))


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    return [output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output]


def run_python_of(page: str, where: Path) -> str:
    """The output of a page's first block of Python, executed in a directory."""
    code = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_of_the_library_page_runs(tmp_path: Path) -> None:
    run_python_of("docs/library.md", tmp_path)
    assert (tmp_path / "detector").is_dir()


@pytest.mark.slow  # a step of a large detector
def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    run_python_of("README.md", tmp_path)
    assert (tmp_path / "detector").is_dir()


def test_an_exported_detector_runs_as_its_page_shows(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "photos" / "images").mkdir(parents=True)
    Image.new("RGB", (90, 60), (200, 40, 40)).save(tmp_path / "photos" / "images" / "beach.jpg")
    config = RefineDetConfig(num_classes=2, input_size=64, backbone="resnet18", tcb_channels=16, score_threshold=0.0)
    detector = RefineDet(config, categories=("cat", "dog")).eval()
    detector.save_pretrained(tmp_path / "runs" / "photos")
    export_onnx(detector, tmp_path / "detector.onnx", 64, 64)
    first = run_python_of("docs/own-data.md", tmp_path).splitlines()[0]
    assert first.startswith(("cat ", "dog "))


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_jobs_open_with_what_a_reader_needs(job: Path) -> None:
    if job.parent.name != "base":
        opening = job.read_text().split("\nname:")[0]
        assert opening.startswith("# ")
        assert "Command" in opening
