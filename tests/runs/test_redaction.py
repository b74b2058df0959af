from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refinedet.pipeline.runs.redaction import flatten, parameters, redact, redact_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://mlflow:hunter2@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("s3://bucket/coco", "s3://bucket/coco"),
        ("https://x/y?X-Amz-Signature=abc123&size=3", "https://x/y?X-Amz-Signature=***&size=3"),
        ("https://x/y?part=1&token=abc", "https://x/y?part=1&token=***"),
        ("key AKIAABCDEFGHIJKLMNOP here", "key *** here"),
        ("a -----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY----- b", "a *** b"),
        ("mail me@example.org about 3@4", "mail me@example.org about 3@4"),
    ],
)
def test_credentials_are_masked_and_the_rest_is_left(text, shown):
    assert redact_text(text) == shown


def test_a_value_under_a_secret_name_is_masked_at_any_depth():
    spec = {
        "a": [{"password": "x1"}],
        "AWS_SECRET_KEY": "x2",
        "api_key": "x3",
        "tokens": ["x4"],
        "max_tokens": 5,
    }
    shown = json.dumps(redact(spec))
    assert not any(secret in shown for secret in ("x1", "x2", "x3", "x4"))
    assert redact(spec)["max_tokens"] == 5


@given(st.text("abcdefgh0123456789", min_size=6), st.sampled_from(["http", "s3", "postgresql", "redis"]))
def test_no_password_of_a_uri_survives(password, scheme):
    shown = redact_text(f"{scheme}://user:{password}@host.example/path")
    assert shown == f"{scheme}://***@host.example/path"


def test_redacting_twice_is_redacting_once():
    spec = {"uri": "http://u:p@h/?sig=1", "token": "t", "n": [1, None, True]}
    assert redact(redact(spec)) == redact(spec)


def test_flatten_names_every_leaf_and_keeps_short_lists_whole():
    spec = {"data": {"train": [{"count": 3}, {"count": 4}]}, "decay": [80, 100], "labels": {}, "none": None}
    assert flatten(spec) == {
        "data.train.0.count": 3,
        "data.train.1.count": 4,
        "decay": [80, 100],
        "labels": {},
        "none": None,
    }
    assert "none" not in parameters(spec)
