"""Law 1: the project stands on documented interfaces of other packages only. The syntax trees are read."""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for top in ("model", "pipeline") for path in (REPOSITORY / top).rglob("*.py"))
OURS = {"refinedet", "__future__"}
# Documented by Python despite the underscore.
DOCUMENTED = {"_exit", "_asdict", "_replace", "_fields", "_make", "_current_frames"}
INTERPRETER_STATE = {"sys.modules", "sys.meta_path", "sys.path", "sys.path_hooks"}
MUTATORS = {"append", "insert", "extend", "remove", "pop", "clear", "update", "setdefault", "__setitem__"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def has_private_segment(dotted: str) -> bool:
    return any(is_private(segment) for segment in dotted.split("."))


def foreign_names(tree: ast.AST) -> set[str]:
    """Names that a file binds by importing from packages other than its own."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname or a.name.split(".")[0] for a in node.names if a.name.split(".")[0] not in OURS}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] not in OURS:
            names |= {a.asname or a.name for a in node.names}
    return names


def own_private_names(tree: ast.AST) -> set[str]:
    """Private names that the file itself defines: functions, classes, attributes of self, fields."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("self", "cls")
        ):
            names.add(node.attr)
    return {name for name in names if is_private(name)}


def root_of(node: ast.AST) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def faults_of(source: str) -> Iterator[str]:
    """Each place at which a source uses or changes what other packages keep to themselves."""
    tree = ast.parse(source)
    foreign, own = foreign_names(tree), own_private_names(tree)
    for node in ast.walk(tree):
        where = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            yield from (f"{where}: import {a.name}" for a in node.names if has_private_segment(a.name))
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] not in OURS:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (f"{where}: from {name}" for name in names if has_private_segment(name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not mine and node.attr not in own and node.attr not in DOCUMENTED:
                yield f"{where}: {ast.unparse(node)}"
        elif isinstance(node, ast.keyword) and node.arg and is_private(node.arg) and node.arg not in own | DOCUMENTED:
            yield f"line {node.value.lineno}: {node.arg}="
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME and len(node.args) > 1:
            name, mine = node.args[1], ast.unparse(node.args[0]) in ("self", "cls")
            if not mine and isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield f"{where}: {ast.unparse(node)}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if text.isidentifier() or " " in text or "/" in text:
                continue
            if has_private_segment(text) and all(part.isidentifier() for part in text.split(".")):
                yield f"{where}: {text!r}"
        yield from (f"{where}: {text}" for text in changes_of(node, foreign))


def is_foreign_state(target: ast.expr, foreign: set[str]) -> bool:
    text = ast.unparse(target)
    if any(text.startswith(state) for state in INTERPRETER_STATE):
        return True
    if root_of(target) not in foreign or text.startswith(SWITCHES):
        return False
    return isinstance(target, ast.Attribute) or (isinstance(target, ast.Subscript) and "__dict__" in text)


def changes_of(node: ast.AST, foreign: set[str]) -> Iterator[str]:
    """Assignments to attributes of foreign modules and objects, and changes of the interpreter's import state."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign | ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    elif isinstance(node, ast.With | ast.AsyncWith):
        targets = [item.optional_vars for item in node.items if item.optional_vars]
    yield from (f"{ast.unparse(target)} =" for target in targets if is_foreign_state(target, foreign))
    if isinstance(node, ast.Call):
        text = ast.unparse(node.func)
        state, _, method = text.rpartition(".")
        if state in INTERPRETER_STATE and method in MUTATORS:
            yield f"{text}(...)"
        if text in ("setattr", "delattr") and node.args and root_of(node.args[0]) in foreign - set(dir(builtins)):
            yield f"{ast.unparse(node)}"


BY_NAME = {"getattr", "hasattr", "setattr", "delattr"}
# Documented switches of torch, which are set by assignment.
SWITCHES = ("torch.backends.", "os.environ")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_file_stands_on_public_ground(path: Path) -> None:
    assert not list(faults_of(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "source",
    [
        "import ray._private.worker",
        "from ray.train.v2._internal.execution import controller",
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "import torch\ntorch.compile = None",
        "import torch\ntorch.optim.SGD.step = None",
        "import torch\nstorage = torch.zeros(1).untyped_storage()._cdata",
        "import torch\ntorch.ops.mkldnn._is_mkldnn_bf16_supported()",
        "import torch\ntorch.__dict__['x'] = 1",
        "import torch\nsetattr(torch, 'compile', None)",
        "import sys\nsys.modules['mlflow'] = None",
        "import sys\nsys.path.insert(0, 'x')",
        "import sys\ndel sys.modules['mlflow']",
        "import sys\nsys.meta_path[:] = []",
        "import logging\nlogging.getLogger('ray._private.runtime_env')",
        "import ray\nray.init(_system_config={})",
        "import torch\ngetattr(torch, '_C')",
    ],
)
def test_the_law_is_not_blind(source: str) -> None:
    assert list(faults_of(source)), source


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n    def __init__(self, other):\n        self._x = other._x",
        "import os\nos._exit(1)",
        "import torch\ntorch.backends.cudnn.benchmark = True",
        "_private = 1\nprint(_private)",
        "text = 'a sentence with _words_ in it'",
    ],
)
def test_the_law_lets_ordinary_code_pass(source: str) -> None:
    assert not list(faults_of(source)), source


def test_no_two_files_import_each_other() -> None:
    """At any depth, imports inside functions included."""
    modules = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in SOURCES}
    modules = {name: path for name, path in modules.items() if path.name != "__init__.py"}
    imports = {name: imported_modules(name, path, set(modules)) for name, path in modules.items()}
    finished: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in finished:
            for imported in sorted(imports[name]):
                visit(imported, (*trail, name))
            finished.add(name)

    limit = sys.getrecursionlimit()
    assert len(modules) < limit
    for name in sorted(modules):
        visit(name, ())


def imported_modules(name: str, path: Path, known: set[str]) -> set[str]:
    """Modules that a file imports when it runs: what stands under TYPE_CHECKING is for type checkers alone."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for_types = {inner for guard in guards for statement in guard.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("refinedet.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").removeprefix("refinedet.")
            if node.level:
                package = name.split(".")[: -node.level]
                base = ".".join([*package, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return (found & known) - {name}
