"""Every image lies in exactly one chunk; what was cut short or is another's is named and done again."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refinedet.pipeline.evaluation.chunks import ChunkResult, read_chunk, split_into_chunks, write_chunk
from refinedet.pipeline.inference.detections import DetectionTable

ROWS = [
    {"image_id": 9, "category_id": 90, "bbox": [0.001, 1.5, 3.25, 4.0], "score": 0.12345678},
    {"image_id": 2, "category_id": 1, "bbox": [0.0, 0.0, 1e4, 4.0], "score": 1.0},
]


@given(st.integers(0, 500), st.integers(1, 100))
def test_chunks_cover_every_sample_once(num_samples, images_per_chunk):
    chunks = split_into_chunks(num_samples, images_per_chunk)
    assert [position for chunk in chunks for position in chunk.positions] == list(range(num_samples))
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert all(0 < len(chunk.positions) <= images_per_chunk for chunk in chunks)


def test_a_chunk_comes_back_as_it_was(tmp_path):
    (chunk,) = split_into_chunks(2, 8)
    assert read_chunk(str(tmp_path), chunk) is None
    write_chunk(str(tmp_path), chunk, ChunkResult(DetectionTable.of(ROWS)), fingerprint="a")
    result = read_chunk(str(tmp_path), chunk, fingerprint="a")
    assert result is not None
    assert result.detections.rows() == ROWS
    write_chunk(str(tmp_path), chunk, ChunkResult(DetectionTable.empty()))
    result = read_chunk(str(tmp_path), chunk)
    assert result is not None
    assert len(result.detections) == 0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_chunk_cut_short_is_named_and_missing(tmp_path, caplog, share):
    chunks = split_into_chunks(6, 2)
    for chunk in chunks:
        write_chunk(str(tmp_path), chunk, ChunkResult(DetectionTable.of(ROWS)))
    assert None not in [read_chunk(str(tmp_path), chunk) for chunk in chunks]
    file: Path = tmp_path / chunks[1].name
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert [chunk for chunk in chunks if read_chunk(str(tmp_path), chunk) is None] == [chunks[1]]
    assert f"{chunks[1].name} is damaged" in caplog.text


def test_a_chunk_of_another_evaluation_is_done_again(tmp_path, caplog):
    (chunk,) = split_into_chunks(2, 2)
    write_chunk(str(tmp_path), chunk, ChunkResult(DetectionTable.of(ROWS)), fingerprint="weights a")
    assert read_chunk(str(tmp_path), chunk, fingerprint="weights b") is None
    assert "another evaluation" in caplog.text
    (wider,) = split_into_chunks(3, 3)
    assert read_chunk(str(tmp_path), wider, fingerprint="weights a") is None
