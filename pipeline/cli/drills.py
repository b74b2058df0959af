"""Fault drills."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from refinedet.pipeline.runs.durations import describe_duration
from refinedet.pipeline.runs.errors import JobError, UserError

if TYPE_CHECKING:
    from refinedet.pipeline.drills.bench import Check


app = typer.Typer()


@app.command()
def drill(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="or `all`, the default; `list`")
    ] = None,
) -> None:
    """Break small real jobs on purpose, and see them recover."""
    from refinedet.pipeline.drills.bench import run_drills
    from refinedet.pipeline.drills.cases import DRILLS

    if names == ["list"]:
        for name, case in DRILLS.items():
            typer.echo(f"{name:<22} {case.__doc__}")
        return
    names = list(DRILLS) if names in (None, [], ["all"]) else names
    for name in names:
        if name not in DRILLS:
            raise UserError(f"There is no drill {name!r}; there are {', '.join(DRILLS)}.")

    def report(name: str, seconds: float, checks: list[Check]) -> None:
        passed = all(check.passed for check in checks)
        typer.echo(f"{'✓' if passed else '✗'} {name}  {describe_duration(seconds)}")
        for check in checks:
            mark = " " if check.passed else "✗"
            typer.echo(f"  {mark} {check.what}: expected {check.expected}; seen {check.seen}")

    if not run_drills({name: DRILLS[name] for name in names}, report):
        raise JobError("a drill failed; its runs are kept in the temporary directory refinedet-drill-*")
