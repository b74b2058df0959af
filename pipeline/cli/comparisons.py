"""Commands about several runs: `compare` and `runs`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated

import typer
from refinedet.pipeline.runs import storage
from rich.console import Console
from rich.table import Table

app = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="two to six runs' directories")],
    as_json: Json = False,
    page: Annotated[str | None, typer.Option(help="also write them side by side as one HTML file")] = None,
) -> None:
    """Compare results of runs, and their specs.

    Example: refinedet compare runs/full runs/no_tcb --page both.html
    """
    from refinedet.pipeline.report.run_comparison import build_comparison, compare_runs  # matplotlib takes a second

    paths = [storage.absolute(run) for run in runs]
    found = compare_runs(paths)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        for title, rows in (("Results", found.results), ("Specs", found.spec), ("Classes that differ", found.classes)):
            if rows:
                columns = ["", *found.names, *(["difference"] if title != "Specs" else [])]
                cells = [[row.name, *row.values, *([row.difference] if title != "Specs" else [])] for row in rows]
                _print_table(title, columns, cells)
    if page:
        typer.echo(build_comparison(paths, storage.absolute(page)), err=as_json)


@app.command()
def runs(
    directory: Annotated[str, typer.Argument(metavar="[DIRECTORY]", help="where runs are kept, or a URI")] = "runs",
    as_json: Json = False,
) -> None:
    """List all runs of a directory as a table.

    Example: refinedet runs s3://bucket/runs --json
    """
    from refinedet.pipeline.report.run_comparison import run_rows

    rows = run_rows(storage.absolute(directory))
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    elif rows:
        _print_table("", list(rows[0]), [list(row.values()) for row in rows])
    else:
        typer.echo(f"{directory} holds no runs.")


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title or None, title_justify="left", box=None, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=False, markup=False).print(table)
