"""Every image lies in exactly one piece; what was cut short or is another's is named and done again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refinedet.pipeline.evaluation.pieces import merge_pieces, read_piece, split_into_pieces, write_piece
from refinedet.pipeline.inference.detections import DetectionTable

ROWS = [
    {"image_id": 9, "category_id": 90, "bbox": [0.001, 1.5, 3.25, 4.0], "score": 0.12345678},
    {"image_id": 2, "category_id": 1, "bbox": [0.0, 0.0, 1e4, 4.0], "score": 1.0},
]


@given(st.integers(0, 500), st.integers(1, 100))
def test_pieces_cover_every_sample_once(num_samples, images_per_piece):
    pieces = split_into_pieces(num_samples, images_per_piece)
    assert [position for piece in pieces for position in piece.positions] == list(range(num_samples))
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    assert all(0 < len(piece.positions) <= images_per_piece for piece in pieces)


def test_a_piece_comes_back_as_it_was(tmp_path):
    (piece,) = split_into_pieces(2, 8)
    assert read_piece(str(tmp_path), piece) is None
    write_piece(str(tmp_path), piece, DetectionTable.of(ROWS), fingerprint="a")
    table = read_piece(str(tmp_path), piece, fingerprint="a")
    assert table is not None
    assert table.rows() == ROWS
    write_piece(str(tmp_path), piece, DetectionTable.empty())
    table = read_piece(str(tmp_path), piece)
    assert table is not None
    assert len(table) == 0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_piece_cut_short_is_named_and_missing(tmp_path, caplog, share):
    pieces = split_into_pieces(6, 2)
    for piece in pieces:
        write_piece(str(tmp_path), piece, DetectionTable.of(ROWS))
    assert None not in [read_piece(str(tmp_path), piece) for piece in pieces]
    file: Path = tmp_path / pieces[1].name
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert [piece for piece in pieces if read_piece(str(tmp_path), piece) is None] == [pieces[1]]
    assert f"{pieces[1].name} is damaged" in caplog.text


def test_a_piece_of_another_evaluation_is_done_again(tmp_path, caplog):
    (piece,) = split_into_pieces(2, 2)
    write_piece(str(tmp_path), piece, DetectionTable.of(ROWS), fingerprint="weights a")
    assert read_piece(str(tmp_path), piece, fingerprint="weights b") is None
    assert "another evaluation" in caplog.text
    (wider,) = split_into_pieces(3, 3)
    assert read_piece(str(tmp_path), wider, fingerprint="weights a") is None


def test_merging_does_not_depend_on_the_order_of_pieces():
    rng = np.random.default_rng(0)
    ids = rng.permutation(50)
    tables = [
        DetectionTable.of(
            [
                {"image_id": int(i), "category_id": 1, "bbox": [0, 0, 1, 1], "score": round(float(rng.random()), 1)}
                for i in part
                for _ in range(4)
            ]
        )
        for part in np.split(ids, 5)
    ]
    merged = merge_pieces(tables, ids.tolist())
    assert merged.image_id.tolist() == np.repeat(ids, 4).tolist()
    assert (np.diff(merged.score.reshape(50, 4), axis=1) <= 0).all()
    assert merge_pieces(tables[::-1], ids.tolist()).rows() == merged.rows()
    with pytest.raises(ValueError, match="unique"):
        merge_pieces(tables, [*ids.tolist(), 3])
