"""Everything in this directory needs a GPU; `make gpu-check` runs it.

Without a GPU the tests skip. With one, a missing kernel is a failure: a suite that skips it would count as success.
"""

from __future__ import annotations

import pytest
import torch
from refinedet.model.ops import library


@pytest.fixture(autouse=True)
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert library.describe_library().cuda, library.describe_library().reason
    assert library.runs_on_gpu(torch.cuda.current_device()), library.describe_library().reason
    return torch.device("cuda")
