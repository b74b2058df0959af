"""The command `refinedet`: its groups of commands, and the one place where an error becomes a sentence."""

from __future__ import annotations

import importlib.metadata
import itertools
import sys
from typing import Annotated

import typer
from refinedet.pipeline.cli import checks, comparisons, data, drills, jobs, results, serving
from refinedet.pipeline.runs.errors import describe_end
from typer.exceptions import TyperException

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
        status = app(prog_name="refinedet", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except TyperException as error:
        typer.echo(_describe_usage(error), err=True)
        sys.exit(2)
    except Exception as error:
        end = describe_end(error)
        if end is None:
            raise
        typer.echo(f"refinedet: {end.sentence}", err=True)
        sys.exit(end.status)
    sys.exit(status if isinstance(status, int) else 0)


def _describe_usage(error: TyperException) -> str:
    """One sentence on a mistake in the command line; the help itself, where a group got no command."""
    message = error.format_message()
    if "\n" in message.strip():
        return message
    command = getattr(getattr(error, "ctx", None), "command_path", "refinedet")
    names = getattr(getattr(error, "param", None), "opts", ())
    received = [value for option, value in itertools.pairwise(sys.argv) if option in names]
    shown = f", received {received[-1][:80]!r}" if received else ""
    return f"refinedet: {' '.join(message.split()).rstrip('.')}{shown}; see `{command} --help`."


if __name__ == "__main__":
    main()
