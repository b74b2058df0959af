"""A Ray node for one launch that does not start."""

from __future__ import annotations

import sys

import pytest
from refinedet.pipeline.cluster import local_node as module
from refinedet.pipeline.runs.errors import JobError


def test_a_node_that_does_not_start_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(module, "_DEADLINE_S", 0.1)
    with pytest.raises(JobError, match=r"^Ray did not start on this machine: status 1; end what else .*again$"):
        module.local_node().__enter__()
