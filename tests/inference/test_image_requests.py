"""Requests of servers: MLflow's forms, and what is refused."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from refinedet.pipeline.data.images import turn_upright
from refinedet.pipeline.inference.image_requests import (
    DEFAULT_THRESHOLD,
    RequestError,
    decode_sent_image,
    parse_request,
)

FILE = cv2.imencode(".png", np.zeros((4, 5, 3), np.uint8))[1].tobytes()
IMAGE = base64.b64encode(FILE).decode()
ROWS = [{"image": IMAGE}, {"image": IMAGE}]
FORMS = {
    "inputs as rows": {"inputs": ROWS},
    "inputs as columns": {"inputs": {"image": [IMAGE, IMAGE]}},
    "instances": {"instances": ROWS},
    "records": {"dataframe_records": ROWS},
    "split": {"dataframe_split": {"columns": ["image"], "index": [0, 1], "data": [[IMAGE], [IMAGE]]}},
}


def parse(document: Any, threshold: str | None = None) -> tuple[list[bytes], float]:
    return parse_request(json.dumps(document).encode(), "application/json; charset=utf-8", threshold)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_images(form: str) -> None:
    assert parse(FORMS[form]) == ([FILE, FILE], DEFAULT_THRESHOLD)
    assert parse(FORMS[form] | {"params": {"score_threshold": 0.5, "batch_size": 2}}, "0.7") == ([FILE, FILE], 0.5)


def test_an_image_is_the_body() -> None:
    assert parse_request(FILE, "image/png", "0.25") == ([FILE], 0.25)
    assert parse_request(FILE, "image/png", "0") == ([FILE], 0.0)


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({}, "must be rows"),
        ({"inputs": ROWS, "instances": ROWS}, "must be rows"),
        ({"inputs": ROWS, "model": "x"}, "received the key 'model'"),
        ({"inputs": 3}, "must be rows"),
        ({"dataframe_split": {"columns": ["image"], "data": [[IMAGE, IMAGE]]}}, "dataframe_split must have columns"),
        ({"dataframe_split": {"columns": ["picture"], "data": [[IMAGE]]}}, "must be rows"),
        ({"inputs": ROWS, "params": [1]}, "params must be an object"),
        ({"inputs": ROWS, "params": {"batch_size": 65}}, "batch_size must be"),
        ({"inputs": ROWS, "params": {"iou": 1}}, "received 'iou'"),
        ({"inputs": ROWS * 33}, "Between 1 and 64 images"),
    ],
)
def test_another_document_is_refused(document: Any, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        parse(document)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_is_what_viewers_display(orientation: int) -> None:
    pixels = np.random.default_rng(orientation).integers(0, 255, (6, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(content, "JPEG", quality=95, exif=exif)
    stored, displayed = (decode_sent_image(content.getvalue(), "image", how) for how in ("stored", "displayed"))
    np.testing.assert_array_equal(displayed, turn_upright(stored, orientation))
    viewed = np.asarray(ImageOps.exif_transpose(Image.open(content)))
    assert np.abs(displayed.astype(int) - viewed).max() <= 4  # another decoder
