"""The language of pages, comments, docstrings and messages, by the rules of `.vale/RefineDet`.

`python -m tests.docs.language` prints every finding; `make check` runs it. The rules are Vale's, for editors that have
it; here they are applied by regular expressions, since no package registry has Vale itself.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / ".vale" / "RefineDet"


@dataclass(frozen=True)
class Rule:
    """A rule file of Vale: patterns, each with the message for what it matches."""

    name: str
    patterns: tuple[tuple[re.Pattern[str], str], ...]

    @classmethod
    def load(cls, path: Path) -> Rule:
        rule = yaml.safe_load(path.read_text())
        flags = re.IGNORECASE if rule["ignorecase"] else 0
        if rule["extends"] == "substitution":
            pairs = {pattern: rule["message"].replace("%s", good, 1) for pattern, good in rule["swap"].items()}
        else:
            pairs = {pattern: rule["message"] for pattern in rule["tokens"]}
        return cls(
            path.stem,
            tuple((re.compile(rf"(?<![\w-])(?:{one})(?![\w-])", flags), text) for one, text in pairs.items()),
        )

    def findings(self, text: str) -> Iterator[str]:
        for pattern, message in self.patterns:
            for match in pattern.finditer(text):
                yield f"{self.name}: {message.replace('%s', match[0], 1)}"


@dataclass(frozen=True)
class Prose:
    """Text that people read, at a line of a file; `kind` is page, comment, docstring, first_line or message."""

    path: Path
    line: int
    kind: str
    text: str


def prose_of_page(path: Path) -> Iterator[Prose]:
    """The lines outside code blocks, without code in backquotes and targets of links."""
    code = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code:
            text = re.sub(r"`[^`]*`", "`x`", line)
            yield Prose(path, number, "page", re.sub(r"\]\([^)]*\)", "]", text))


def prose_of_python(path: Path) -> Iterator[Prose]:
    """Comments, docstrings (of attributes, too), and strings of at least three words."""
    source = path.read_text()
    tree = ast.parse(source)
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    firsts = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        if id(node) in docstrings:
            kind = "first_line" if id(node) in firsts else "docstring"
            for offset, line in enumerate(node.value.splitlines()):
                yield Prose(path, node.lineno + offset, kind, re.sub(r"`[^`]*`", "`x`", line))
                kind = "docstring"
        elif len(node.value.split()) >= 3 and "import " not in node.value:  # programs of tests
            yield Prose(path, node.lineno, "message", node.value)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Prose(path, token.start[0], "comment", re.sub(r"`[^`]*`", "`x`", token.string))


def prose_of_code(path: Path) -> Iterator[Prose]:
    """Comments of C++ (//) and YAML (#), without code in backquotes."""
    sign = "#" if path.suffix in {".yaml", ".yml", ".toml", ".sbatch"} else "//"
    for number, line in enumerate(path.read_text().splitlines(), 1):
        _, found, comment = line.partition(sign)
        if found and not comment.startswith("/"):
            yield Prose(path, number, "comment", re.sub(r"`[^`]*`", "`x`", comment))


def tracked() -> list[Path]:
    named = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in named.splitlines()]


READERS = {
    ".md": prose_of_page,
    ".py": prose_of_python,
    **dict.fromkeys((".cpp", ".h", ".cu", ".cuh", ".yaml", ".yml", ".sbatch"), prose_of_code),
}


def findings(paths: list[Path]) -> list[str]:
    """One line for each finding: file, line, rule and what to write."""
    rules = [Rule.load(path) for path in sorted(RULES.glob("*.yml"))]
    found = []
    for path in paths:
        reader = READERS.get(path.suffix)
        if reader is None or path.parts[len(ROOT.parts)] == ".vale" or path.name in ("job-spec.md", "test_language.py"):
            continue
        for prose in reader(path):
            for rule in rules:
                if rule.name == "Docstrings" and prose.kind != "first_line":
                    continue
                found += [f"{path.relative_to(ROOT)}:{prose.line}: {text}" for text in rule.findings(prose.text)]
    return found


if __name__ == "__main__":
    lines = findings(tracked())
    sys.stdout.writelines(f"{line}\n" for line in lines)
    sys.exit(1 if lines else 0)
