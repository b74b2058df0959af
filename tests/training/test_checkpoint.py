from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from refinedet.pipeline.config.spec import Training
from refinedet.pipeline.runs import storage
from refinedet.pipeline.training import saving
from refinedet.pipeline.training.checkpoint import Checkpoint, best_checkpoint, load_checkpoint
from refinedet.pipeline.training.owners import assign_owners
from refinedet.pipeline.training.records import Event
from refinedet.pipeline.training.saving import CheckpointWriter
from refinedet.pipeline.training.state import seed_everything
from refinedet.pipeline.training.world import World


@pytest.fixture
def writer(world: World, tmp_path: Path) -> Any:
    writer = CheckpointWriter(str(tmp_path), world, Training())
    yield writer
    writer.close()


def save(writer: CheckpointWriter, step: int, score: float | None = None) -> None:
    writer.start(step, {"weight/w": torch.full((4,), float(step))}, {"score": score})
    writer.settle()


def load(folder: Path, world: World) -> tuple[Checkpoint | None, list[Event]]:
    events: list[Event] = []
    return load_checkpoint(str(folder), world, events.append), events


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_last_and_the_best_are_kept(writer: CheckpointWriter, tmp_path: Path) -> None:
    for step, score in ((1, 0.5), (2, 0.9), (3, 0.1), (4, None), (5, 0.2)):
        save(writer, step, score)
    assert steps(tmp_path) == ["step-2", "step-4", "step-5"]
    assert best_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoints" / "step-2")


@pytest.mark.parametrize(("keep_last", "keep_best"), [(1, 3), (2, 5), (1, 0)])
def test_fewer_checkpoints_than_are_to_be_kept_are_all_kept(
    world: World, tmp_path: Path, keep_last: int, keep_best: int
) -> None:
    writer = CheckpointWriter(str(tmp_path), world, Training(keep_last=keep_last, keep_best=keep_best))
    for step in range(1, 6):
        save(writer, step, score=step / 10)
    writer.close()
    kept = max(keep_last, keep_best)
    assert steps(tmp_path) == [f"step-{step}" for step in range(6 - kept, 6)]


def test_what_has_no_manifest_does_not_exist_and_is_cleared_away(
    writer: CheckpointWriter, world: World, tmp_path: Path
) -> None:
    save(writer, 1)
    storage.write_bytes(str(tmp_path / "checkpoints" / "step-2" / "part-00000-of-00001.safetensors"), b"half")
    found, events = load(tmp_path, world)
    assert (found.step if found else None, events) == (1, [])
    save(writer, 3)
    assert steps(tmp_path) == ["step-1", "step-3"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_by_name(
    writer: CheckpointWriter, world: World, tmp_path: Path, damage: str
) -> None:
    save(writer, 1)
    save(writer, 2)
    folder = tmp_path / "checkpoints" / "step-2"
    part = folder / "part-00000-of-00001.safetensors"
    content = bytearray(part.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        part.write_bytes(content)
    elif damage == "cut":
        part.write_bytes(content[:-1])
    elif damage == "remove":
        part.unlink()
    else:
        (folder / "manifest.json").write_text('{"step": 2,')
    found, (event,) = load(tmp_path, world)
    assert found is not None
    assert found.step == 1
    assert torch.equal(found.tensors["weight/w"], torch.ones(4))
    assert (event.kind, event.step, "step-2" in event.message) == ("passed_over", 2, True)
    assert {
        "flip": "does not match its digest",
        "cut": f"has {len(content) - 1} bytes",
        "remove": "is missing",
        "manifest": "manifest.json cannot be read",
    }[damage] in event.message


def test_a_damaged_checkpoint_is_set_aside_and_never_crowds_out_a_good_one(
    writer: CheckpointWriter, world: World, tmp_path: Path
) -> None:
    save(writer, 1)
    save(writer, 9)
    (tmp_path / "checkpoints" / "step-9" / "manifest.json").write_text("{")
    found, events = load(tmp_path, world)
    assert found is not None
    assert (found.step, [event.kind for event in events]) == (1, ["passed_over"])
    save(writer, 2)
    save(writer, 3)
    assert steps(tmp_path) == ["step-2", "step-3", "step-9"]
    save(writer, 10)
    assert steps(tmp_path) == ["step-10", "step-3"]


def test_a_short_outage_is_waited_out(
    writer: CheckpointWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = _fail_writes(monkeypatch, times=2)
    save(writer, 1)
    assert failures == []
    assert writer.committed_step == 1
    assert [event.kind for event in writer.news(1)] == ["saved"]


def test_a_long_outage_is_told_and_the_next_checkpoint_is_written(
    writer: CheckpointWriter, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(writer, 1)
    writer.news(1)
    _fail_writes(monkeypatch, times=1, outage_s=0.4)
    save(writer, 2)
    (event,) = writer.news(2)
    assert event.kind == "save_failed"
    assert "checkpoint of step 2 was not written (rank 0: " in event.message
    assert "no answer from storage for 0 s (OSError: the storage is away)" in event.message
    assert load(tmp_path, world)[0].step == 1  # type: ignore[union-attr]
    save(writer, 3)
    assert [event.kind for event in writer.news(3)] == ["saved"]


def _fail_writes(monkeypatch: pytest.MonkeyPatch, times: int, outage_s: float = 15.0) -> list[int]:
    left = list(range(times))
    write = storage.write_bytes

    def fail(path: str, content: bytes) -> None:
        if left:
            left.pop()
            raise OSError("the storage is away")
        write(path, content)

    monkeypatch.setattr(storage, "write_bytes", fail)
    monkeypatch.setattr(saving, "_OUTAGE_S", outage_s)
    return left


def test_owners_share_evenly() -> None:
    sizes = {f"p{number}": 100 + number for number in range(40)}
    owners = assign_owners(sizes, 4)
    loads = [sum(sizes[name] for name in sizes if owners[name] == rank) for rank in range(4)]
    assert max(loads) - min(loads) <= max(sizes.values())
    assert owners == assign_owners(dict(reversed(sizes.items())), 4)


def test_storage_that_does_not_answer_condemns_no_checkpoint(
    writer: CheckpointWriter, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(writer, 1)
    read = storage.read_bytes

    def fail(path: str) -> bytes:
        if path.endswith(".safetensors"):
            raise OSError("the storage is away")
        return read(path)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "read_bytes", fail)
        with pytest.raises(OSError, match=r"cannot be read now .*the storage is away.*run the same command again"):
            load(tmp_path, world)
    assert load(tmp_path, world)[0].step == 1  # type: ignore[union-attr]


def test_training_waits_for_storage_with_growing_pauses(
    writer: CheckpointWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    _fail_writes(monkeypatch, times=4, outage_s=0.4)
    monkeypatch.setattr(saving.time, "sleep", pauses.append)
    save(writer, 1)
    assert not writer.given_up
    save(writer, 2)
    assert writer.given_up
    events: list[Event] = []
    writer.wait_until_saved(lambda: save(writer, 2), events.append, lambda: False)
    assert (writer.failure, writer.committed_step, writer.given_up) == (None, 2, False)
    assert pauses == [10.0, 20.0, 40.0]
    assert [event.kind for event in events] == ["waiting"] * 3
    assert "checkpoint of step 2 was not written" in events[0].message
    assert "training waits 10 s and saves again, for 3600 s at most" in events[0].message


def test_random_numbers_are_a_function_of_the_seeds() -> None:
    import random

    import numpy as np

    def draw(*seeds: int) -> list[float]:
        seed_everything(*seeds)
        return [torch.rand(1).item(), float(np.random.rand()), random.random(), random.gauss(0, 1)]

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert not {*draw(1, 2, 3)} & {*draw(1, 2, 4), *draw(1, 3, 3), *draw(2, 2, 3)}
