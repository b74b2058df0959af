"""Workers without torch's compiler, which no stage of a job calls.

torchvision and the optimizers ask it small things as they are loaded: whether a device is supported, and not to trace
a function. Answering them by itself takes it six seconds of a core, in every worker, at every start.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

_PACKAGE, _UTILITIES = "torch._dynamo", "torch._dynamo.utils"


def defer_compiler() -> None:
    """Let torch's compiler be loaded when it is asked for anything but those small things; before torchvision is.

    Where it is loaded already nothing changes.
    """
    if _PACKAGE in sys.modules:
        return
    package = _Deferred(
        _PACKAGE,
        disable=_disable,
        graph_break=lambda *arguments, **options: None,  # which optimizers call in every step
        assume_constant_result=_assume_constant_result,
        trace_rules=SimpleNamespace(clear_lru_cache=lambda: None),  # torch.distributed clears it where it is loaded
    )
    found = importlib.util.find_spec(_PACKAGE)
    package.__path__ = list(found.submodule_search_locations or ()) if found else []
    package.__dict__["utils"] = _Deferred(_UTILITIES, is_compile_supported=lambda device: False)
    sys.modules[_PACKAGE] = package
    sys.modules[_UTILITIES] = package.__dict__["utils"]


class _Deferred(ModuleType):
    """Stands for a module: answers what it was given, and for all else loads the module and asks it."""

    def __init__(self, name: str, **answers: Any) -> None:
        super().__init__(name)
        self.__dict__.update(answers)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        for each in (_UTILITIES, _PACKAGE):
            if isinstance(sys.modules.get(each), _Deferred):
                del sys.modules[each]
        importlib.import_module(_PACKAGE)
        return getattr(importlib.import_module(self.__name__), name)


def _disable(fn: Any = None, *arguments: Any, **options: Any) -> Any:
    """A function that nobody compiles need not be kept from it."""
    return fn if fn is not None else lambda function: function


def _assume_constant_result(fn: Any) -> Any:
    fn._dynamo_marked_constant = True
    return fn
