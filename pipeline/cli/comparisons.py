"""Commands about several runs: `compare` and `runs`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from refinedet.pipeline.config.sweep_spec import Sweep, load_sweep
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.durations import describe_duration
from refinedet.pipeline.runs.errors import UserError
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from refinedet.pipeline.report.sweep_results import Summary

app = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN RUN...", help="two to six runs' directories; or a sweep's file, and KEY=VALUE"),
    ],
    as_json: Json = False,
    page: Annotated[str | None, typer.Option(help="also write them side by side as one HTML file")] = None,
) -> None:
    """Compare runs and their specs, or the variants of a sweep.

    Example: refinedet compare runs/full runs/no_tcb --page both.html
    """
    if runs[0].endswith((".yaml", ".yml")):
        if page:
            raise UserError("--page is for two to six runs; a sweep has a table, or --json.")
        print_sweep(load_sweep(runs[0], runs[1:]), as_json)
        return
    from refinedet.pipeline.report.run_data import read_runs

    folders = read_runs([storage.absolute(run) for run in runs])
    from refinedet.pipeline.report.run_comparison import build_comparison, compare_runs  # matplotlib takes a second

    found = compare_runs(folders)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        for title, rows in (("Results", found.results), ("Specs", found.spec), ("Classes that differ", found.classes)):
            if rows:
                columns = ["", *found.names, *(["difference"] if title != "Specs" else [])]
                cells = [[row.name, *row.values, *([row.difference] if title != "Specs" else [])] for row in rows]
                _print_table(title, columns, cells)
    if page:
        typer.echo(build_comparison(folders, storage.absolute(page)), err=as_json)


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


def print_sweep(sweep: Sweep, as_json: bool = False) -> None:
    """Print the variants of a sweep, and its claims."""
    from refinedet.pipeline.report.sweep_results import compare_sweep  # matplotlib takes a second

    found = compare_sweep(sweep)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=1))
        return
    names = list(dict.fromkeys(name for one in found.variants for name in one.scores))
    rows = [
        [one.variant, *(_mean_and_spread(one.scores.get(name)) for name in names), _minutes(one.seconds), str(one.done)]
        for one in found.variants
    ]
    _print_table("Variants: mean ± standard deviation", ["", *names, "training", "runs"], rows)
    claims = [
        [
            one.claim,
            one.metric,
            _mean_and_spread(one.difference, 2),
            "–" if one.paper is None else f"{one.paper:+.1f}",
            one.verdict,
        ]
        for one in found.claims
    ]
    if claims:
        _print_table("Claims: differences in points", ["", "metric", "here", "paper", "verdict"], claims)


def _mean_and_spread(found: Summary | None, digits: int = 4) -> str:
    if found is None:
        return "–"
    spread = "" if found.spread is None else f" ± {found.spread:.{digits}f}"
    return f"{found.mean:.{digits}f}{spread}"


def _minutes(seconds: float | None) -> str:
    return "–" if seconds is None else describe_duration(seconds)


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title or None, title_justify="left", box=None, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=False, markup=False).print(table)
