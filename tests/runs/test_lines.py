"""The lines that a run keeps of its training, while its storage comes and goes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from refinedet.pipeline.runs import lines, storage
from refinedet.pipeline.runs.lines import LinesLog


def read(text: str) -> list[int]:
    return [json.loads(line)["step"] for line in text.splitlines()]


def test_lines_wait_while_storage_is_away_and_none_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    log = LinesLog(str(folder / "metrics.jsonl"))
    log.append({"step": 1})
    folder.rename(tmp_path / "away")
    with caplog.at_level(logging.WARNING):
        for step in (2, 3, 4):
            log.append({"step": step})
    assert sum("its lines wait" in record.message for record in caplog.records) == 1, "said once"
    (tmp_path / "away").rename(folder)
    log.append({"step": 5})
    log.close()
    assert read((folder / "metrics.jsonl").read_text()) == [1, 2, 3, 4, 5]


def test_lines_behind_a_uri_are_uploaded_and_survive_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    target = "memory://recorder/events.jsonl"
    monkeypatch.setattr(lines, "_UPLOAD_INTERVAL_S", -1.0)
    log = LinesLog(target)
    log.append({"step": 1})
    with monkeypatch.context() as outage:
        outage.setattr(storage, "write_bytes", lambda *_: 1 / 0)  # whatever a library raises
        log.append({"step": 2})
    log.append({"step": 3})
    assert read(storage.read_bytes(target).decode()) == [1, 2, 3]
    log.close()
    again = LinesLog(target)
    again.append({"step": 4})
    again.close()
    assert read(storage.read_bytes(target).decode()) == [1, 2, 3, 4]
