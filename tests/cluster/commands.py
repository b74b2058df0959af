"""Several `refinedet` commands, one after the other, in one process: each with its own output and exit status.

Starting Python and importing torch takes longer than most mistakes take to be met.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Done:
    """The end of a command. Output is what it and what it started wrote, whatever the library."""

    status: int
    stdout: str
    stderr: str


def run_commands(
    commands: Sequence[Sequence[str]], cwd: Path, environment: Mapping[str, str] | None = None
) -> list[Done]:
    """Run `refinedet ...` for each list of arguments, in `cwd`."""
    with tempfile.TemporaryDirectory() as folder:
        asked = json.dumps({"commands": [list(map(str, command)) for command in commands], "folder": folder})
        done = subprocess.run(
            [sys.executable, "-m", "tests.cluster.commands"],
            input=asked,
            cwd=cwd,
            env={**(environment or os.environ), "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        told = Path(folder)
        return [
            Done(
                int((told / f"{number}.status").read_text()),
                (told / f"{number}.stdout").read_text(),
                (told / f"{number}.stderr").read_text(),
            )
            for number in range(len(commands))
        ]


def _main() -> None:
    asked = json.loads(sys.stdin.read())
    from refinedet.pipeline.cli.main import main

    for number, arguments in enumerate(asked["commands"]):
        path = os.path.join(asked["folder"], str(number))
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(f"{path}.{name}", os.O_WRONLY | os.O_CREAT)
            os.dup2(file, descriptor)
            os.close(file)
        sys.argv = ["refinedet", *arguments]
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        Path(f"{path}.status").write_text(str(status))


if __name__ == "__main__":
    _main()
