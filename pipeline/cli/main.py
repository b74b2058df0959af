"""The command `refinedet`: its groups of commands, and the one place where an error becomes a sentence."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Annotated

import typer
from refinedet.pipeline.cli import checks, comparisons, data, drills, jobs, results, serving
from refinedet.pipeline.runs.errors import describe_end

app = typer.Typer(
    help="RefineDet++ as a distributed training pipeline.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for group in (jobs, checks, data, results, serving, comparisons, drills):
    app.add_typer(group.app)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(importlib.metadata.version("refinedet"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version, and end")
    ] = False,
) -> None:
    """RefineDet++ as a distributed training pipeline."""


def main() -> None:
    """Entry point. Exit status: 0 done; 1 failed; 2 the user's mistake; 130 stopped, and saved."""
    try:
        app(prog_name="refinedet")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        end = describe_end(error)
        if end is None:
            raise
        typer.echo(f"refinedet: {end.sentence}", err=True)
        sys.exit(end.status)


if __name__ == "__main__":
    main()
