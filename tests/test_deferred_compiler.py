"""Training does without torch's compiler, and whoever wants it still gets it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from refinedet.pipeline.deferred_compiler import defer_compiler
defer_compiler()
import torch, timm
from refinedet.model import RefineDet
from refinedet.pipeline.training.engine import _import_deepspeed
_import_deepspeed()
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.SGD([weight], lr=0.5)
weight.square().sum().backward()
optimizer.step()
optimizer.zero_grad()
torch.set_deterministic_debug_mode("error")
assert weight.tolist() == [0.0, 0.0]
assert "sympy" not in sys.modules, "the compiler was loaded"
double = torch.compile(lambda x: 2 * x, backend="eager")
assert double(torch.ones(1)).item() == 2
assert "sympy" in sys.modules
import torch._dynamo.utils
assert "Deferred" not in type(torch._dynamo).__name__ + type(torch._dynamo.utils).__name__
assert torch._dynamo.utils.counters["stats"]["calls_captured"] >= 1, "it was really compiled"
"""


@pytest.mark.dist
def test_training_does_without_the_compiler_and_it_is_there_when_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
