"""Progress of a job on the terminal: stage, share done, loss, images/s, time left; at the end a short table."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from types import TracebackType

from refinedet.pipeline.runs.durations import describe_duration
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

_PLAIN_INTERVAL_S = 15.0


class ProgressDisplay:
    """A bar on a terminal; elsewhere (a log, CI) a line now and then.

    Use as a context manager; `stage` begins a part, `update` sets its progress.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._bar = Progress(
            TextColumn("[bold]{task.description:<10}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:>5.0f}/{task.total:.0f} {task.fields[unit]}"),
            TextColumn("{task.fields[facts]}", style="cyan"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=False,
        )
        self._task: TaskID | None = None
        self._began = self._last_line = 0.0
        self._first: tuple[float, float] | None = None
        self._stage = ""
        self._last_text = ""

    def __enter__(self) -> ProgressDisplay:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def stage(self, name: str, total: float | None = None, unit: str = "") -> None:
        """Begin a stage of `total` steps; None: its length is not known."""
        self._stage, self._began, self._last_line, self._last_text = name, time.monotonic(), 0.0, ""
        self._first = None
        if self.console.is_terminal:
            self._task = self._bar.add_task(name, total=total or 1, unit=unit, facts="")
        elif total is None:
            self.console.print(f"{name} ...")

    def update(self, done: float, total: float, *, unit: str = "", **facts: str) -> None:
        """Show how far the stage is; `facts` are shown beside it, as in loss="1.23"."""
        text = "  ".join(f"{name} {value}" for name, value in facts.items())
        if self.console.is_terminal:
            if self._task is not None:
                self._bar.update(self._task, completed=done, total=total, unit=unit, facts=text)
            return
        now = time.monotonic()
        if self._first is None:  # what came before, such as placing workers, is no measure of the time left
            self._first = (now, done)
        if now - self._last_line < _PLAIN_INTERVAL_S and done < total:
            return
        since, at = self._first
        left = f"  {describe_duration((now - since) / (done - at) * (total - done))} left" if at < done < total else ""
        line = f"{self._stage:<10} {done:.0f}/{total:.0f} {unit}  {text}{left}"
        if line != self._last_text:
            self.console.print(line.rstrip(), markup=False, soft_wrap=True)
        self._last_line, self._last_text = now, line

    def done(self, text: str) -> None:
        """End a stage with what came of it."""
        if self.console.is_terminal and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        took = describe_duration(time.monotonic() - self._began)
        self.note(f"[green]✓[/] [bold]{self._stage:<10}[/] {text}  [dim]{took}[/]")

    def note(self, text: str) -> None:
        """A line that stays, above the bar."""
        self.console.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(f"[yellow]![/] {escape(text)}", soft_wrap=True)


def summary_table(title: str, columns: Iterable[str], rows: Iterable[Mapping[str, str]]) -> Table:
    """Rows by column name; the first column is left-aligned, numbers are right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    names = list(columns)
    for position, name in enumerate(names):
        table.add_column(name, justify="left" if position == 0 else "right")
    for row in rows:
        table.add_row(*(row.get(name, "") for name in names))
    return table
