"""The operators' library: its description of itself, and what happens where it is missing or broken."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from refinedet.model.ops import align_conv as align_conv_module
from refinedet.model.ops import library

from tests.model.ops.align_conv_cases import make_case


@pytest.fixture
def looked_up_afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Not cleared as the others are: torch 2.11 refuses a second registration of an operator in one process.
    monkeypatch.setattr(align_conv_module, "_register", align_conv_module._register.__wrapped__)
    caches = (library.describe_library, library.is_loaded, library.runs_on_gpu)
    for function in caches:
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in caches:
        function.cache_clear()


def test_describes_what_is_built() -> None:
    status = library.describe_library()
    if not status.loaded:
        pytest.skip(status.reason)
    assert status.path is not None
    assert status.path.is_file()
    assert status.reason.startswith("The operators are built for the CPU")
    assert status.oldest_torch == "2.11"
    assert bool(status.architectures) == (len(status.compilers) == 2)


@pytest.mark.usefixtures("looked_up_afresh")
def test_missing_library_is_one_warning_and_the_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "_places", lambda: [tmp_path / library.LIBRARY_NAME])
    case = make_case(dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        first = align_conv_module.align_conv(*case.arguments())
        second = align_conv_module.align_conv(*case.arguments())
    torch.testing.assert_close(first, align_conv_module.align_conv_reference(*case.arguments()))
    assert torch.equal(first, second)
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "The operators are not built (librefinedet.so is in none of the places of refinedet.model.ops)"
    ]
    assert library.BUILD_COMMAND in caplog.text


@pytest.mark.usefixtures("looked_up_afresh")
def test_broken_library_is_described_not_raised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / library.LIBRARY_NAME).write_bytes(b"not a library")
    monkeypatch.setattr(library, "_places", lambda: [tmp_path / library.LIBRARY_NAME])
    status = library.describe_library()
    assert not status.loaded
    assert "cannot be loaded on torch" in status.reason
    assert library.BUILD_COMMAND in status.reason


@pytest.mark.skipif(not library.describe_library().loaded, reason=library.describe_library().reason)
def test_found_from_anywhere(tmp_path: Path) -> None:
    code = "from refinedet.model.ops import library; print(library.describe_library().path)"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    if found.returncode != 0 and "No module named 'refinedet'" in found.stderr:
        pytest.skip("the package is not installed in this environment")
    assert found.stdout.strip() == str(library.describe_library().path), found.stderr


@pytest.mark.parametrize(
    ("architectures", "lowest"),
    [
        (("80-real", "90"), (8, 0)),
        (("90a-real", "86-virtual", "100"), (8, 6)),
        (("120",), (12, 0)),
        (("native",), (0, 0)),
        ((), (0, 0)),
    ],
)
def test_the_lowest_architecture_counts(architectures: tuple[str, ...], lowest: tuple[int, int]) -> None:
    assert library.lowest_capability(architectures) == lowest


@pytest.mark.usefixtures("looked_up_afresh")
@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((10, 0), True)])
def test_a_gpu_older_than_the_kernels_has_the_reference_and_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capability: tuple[int, int], runs: bool
) -> None:
    status = library.LibraryStatus(loaded=True, cuda=True, architectures=("80-real", "90"))
    monkeypatch.setattr(library, "describe_library", lambda: status)
    monkeypatch.setattr(align_conv_module, "_register", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    seen = [align_conv_module._is_ready("cuda", 0, torch.float32) for _ in range(2)]
    assert seen == [runs, runs]
    assert not align_conv_module._is_ready("cuda", 0, torch.float64)
    assert [record.message.split(",")[0] for record in caplog.records] == ["GPU 0 has compute capability 7.5"] * (
        not runs
    )


@pytest.mark.usefixtures("looked_up_afresh")
def test_a_gpu_without_kernels_is_refused_in_training_and_by_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    status = library.LibraryStatus(loaded=True, reason="The operators are built for the CPU.")
    monkeypatch.setattr(library, "describe_library", lambda: status)
    fault = library.describe_fault_on_gpu(0)
    assert fault.startswith("GPU 0 has no kernels: The operators are built for the CPU. Build them")
    assert not library.runs_on_gpu(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    doctor = pytest.importorskip("refinedet.pipeline.planning.doctor")
    finding = doctor._operators()
    assert finding.state == "missing"
    assert finding.text == fault


@pytest.mark.usefixtures("looked_up_afresh")
def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.find() is None:
        pytest.skip("the operators are not built")
    monkeypatch.setattr(library, "VERSION", "0")
    status = library.describe_library()
    assert not status.loaded
    assert "were built from another version of the sources; rebuild them with" in status.reason
