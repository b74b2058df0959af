"""BENCHMARKS.md's tables and the plots of docs/pictures, made from the JSON files of tests/bench/results.

    python -m tests.bench.tables [--check]

A result NAME.json stands in BENCHMARKS.md between `<!-- table: NAME -->` and `<!-- end -->`; what is between them is
written by this command, the rest by hand. Keys of a result:

command, commit, date, hardware, versions, spread
          null where it was not recorded; absent where a column of that name has it
workload  what was measured, in a sentence; may be absent
columns   heads of the table
rows      cells; numbers are printed with the digits that the file has

Instead of columns and rows `sweep` may hold what `refinedet compare SWEEP --json` prints.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
DOCUMENT = REPOSITORY / "BENCHMARKS.md"
PROVENANCE = ("command", "commit", "date", "hardware", "versions")
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->\n)", re.DOTALL)

Table = tuple[list[str], list[list[str]]]


class ResultError(ValueError):
    """A result that cannot be printed, in one sentence."""


def read_result(path: Path) -> dict[str, Any]:
    """A result, its numbers as they are written in the file."""
    try:
        result = json.loads(path.read_text(), parse_float=str, parse_int=str)
    except (OSError, json.JSONDecodeError) as error:
        raise ResultError(f"{path} is no result ({error}); a bench's --json writes one.") from None
    if "sweep" not in result and not {"columns", "rows"} <= result.keys():
        raise ResultError(f"{path} has neither `sweep` nor `columns` and `rows`.")
    heads = {head.lower() for head in result.get("columns", ())}
    missing = [key for key in (*PROVENANCE, "spread") if key not in result and key not in heads]
    if missing:
        raise ResultError(f"{path} lacks {', '.join(missing)}; write null for what was not recorded.")
    uneven = [row for row in result.get("rows", ()) if len(row) != len(result["columns"])]
    if uneven:
        raise ResultError(f"{path}: {len(uneven)} rows do not have {len(result['columns'])} cells, as {uneven[0]}.")
    return result


def render(result: dict[str, Any]) -> str:
    """Subject, method and place of a measurement, above its tables."""
    tables = sweep_tables(result["sweep"]) if "sweep" in result else [(result["columns"], result["rows"])]
    return "\n".join(_provenance(result) + [line for table in tables for line in ["", *_markdown(table)]]) + "\n"


def rebuild(document: str, folder: Path = RESULTS) -> str:
    """The document with every table as the results have it."""
    results = {path.stem: path for path in sorted(folder.glob("*.json"))}
    named = [found.group(2) for found in BLOCK.finditer(document)]
    if wrong := sorted(set(named) ^ set(results)) or [name for name in named if named.count(name) > 1]:
        raise ResultError(f"Tables that BENCHMARKS.md and {folder.name}/ do not both have once: {', '.join(wrong)}.")
    return BLOCK.sub(lambda found: found[1] + render(read_result(results[found[2]])) + found[3], document)


def sweep_tables(sweep: dict[str, Any]) -> list[Table]:
    """Variants of a sweep, and what is claimed of them."""
    names = list(dict.fromkeys(name for one in sweep["variants"] for name in one["scores"]))
    variants = [
        [
            one["variant"].replace("_", " "),
            *(mean_and_spread(one["scores"].get(name), 4) for name in names),
            "" if one["seconds"] is None else f"{float(one['seconds']) / 60:.1f}",
            one["done"],
        ]
        for one in sweep["variants"]
    ]
    claims = [
        [
            one["claim"].replace("_", " "),
            one["metric"].split(",")[0],
            mean_and_spread(one["difference"], 2),
            "" if one["paper"] is None else f"{float(one['paper']):+.1f}",
            one["verdict"],
        ]
        for one in sweep["claims"]
    ]
    return [
        (["variant", *names, "minutes of training", "runs"], variants),
        (["claim", "metric", "difference here, points", "in the paper, points of VOC's mAP", "verdict"], claims),
    ]


def mean_and_spread(found: dict[str, Any] | None, digits: int) -> str:
    if found is None:
        return ""
    spread = "" if found["spread"] is None else f" ± {float(found['spread']):.{digits}f}"
    return f"{float(found['mean']):.{digits}f}{spread}"


def _provenance(result: dict[str, Any]) -> list[str]:
    known: list[str] = []
    for key in PROVENANCE:
        if key not in result:
            continue
        value = result[key]
        if not value:
            known.append(f"{key} not recorded")
        elif key == "command":
            commands = [value] if isinstance(value, str) else value
            known.append(" and ".join(f"`{command}`" for command in commands))
        elif key == "versions":
            known.append(", ".join(f"{name} {version}" for name, version in value.items()))
        else:
            known.append(f"commit {value}" if key == "commit" else value)
    text = [f"{'; '.join(known)}."]
    if result.get("workload"):
        text.append(result["workload"])
    if "spread" in result:
        text.append(f"Spread: {result['spread'] or 'not recorded'}.")
    text[0] = text[0][:1].upper() + text[0][1:]
    return textwrap.wrap(" ".join(text), 120, break_long_words=False, break_on_hyphens=False)


def _markdown(table: Table) -> list[str]:
    columns, rows = table
    head, *body = (re.sub(r"  +", " ", f"| {' | '.join(cells)} |") for cells in [columns, *rows])
    return [head, "|" + "---|" * len(columns), *body]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where a file would change")
    arguments = parser.parse_args()
    from tests.bench.plots import draw_all  # matplotlib takes a second

    try:
        made = {DOCUMENT: rebuild(DOCUMENT.read_text()), **draw_all()}
    except ResultError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    changed = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    for path in changed:
        sys.stdout.write(f"{path.relative_to(REPOSITORY)}{' would change' if arguments.check else ''}\n")
        if not arguments.check:
            path.write_text(made[path])
    return 1 if arguments.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
