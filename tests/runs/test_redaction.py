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
        ("postgresql://m:a/b@db", "postgresql://***@db"),
        ("postgresql://m:a@b@db/x", "postgresql://***@db/x"),
        ("https://u:p@h/a and s3://bucket/b and http://v:q/r@k", "https://***@h/a and s3://bucket/b and http://***@k"),
        ("https://tok3n@host/x.git", "https://***@host/x.git"),
        ("databricks://dapi0123456789abcdef0123456789abcdef", "databricks://***"),
        ("databricks://dapi0123456789abcdef-2@host", "databricks://***@host"),
        ("s3://bucket/coco", "s3://bucket/coco"),
        ("http://mlflow:5000/#/experiments/1/runs/2", "http://mlflow:5000/#/experiments/1/runs/2"),
        ("sqlite:////runs/mlflow.db", "sqlite:////runs/mlflow.db"),
        ("https://x/y?X-Amz-Signature=abc123&size=3", "https://x/y?X-Amz-Signature=***&size=3"),
        ("https://x/y?part=1&token=abc", "https://x/y?part=1&token=***"),
        ("key AKIAABCDEFGHIJKLMNOP here", "key *** here"),
        ("github_pat_11ABCDEFG0aBcDeFgHiJkL_mNoPqRsTuVwXyZ", "***"),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "***"),
        ("glpat-AbCdEfGh12345678_-9", "***"),
        ("use sk-proj-AbCdEfGh1234567890 now", "use *** now"),
        ("sk-ant-api03-AbCdEfGh1234567890", "***"),
        ("Authorization: Bearer abc.def-123", "Authorization: ***"),
        ("{'Authorization': 'Basic dXNlcjpwdw=='}", "{'Authorization': '***'}"),
        ("curl -H 'authorization:Token x1y2'", "curl -H 'authorization:***'"),
        ("sent bearer abcdefgh12345", "sent bearer ***"),
        ('{"password": "hunter2", "user": "a"}', '{"password": "***", "user": "a"}'),
        ('{"tokenizer": "bert", "passes": "three"}', '{"tokenizer": "bert", "passes": "three"}'),
        ("MLFLOW_TRACKING_PASSWORD=hunter2 python", "MLFLOW_TRACKING_PASSWORD=*** python"),
        ("aws_secret_access_key = wJalrXUtnFEMI", "aws_secret_access_key = ***"),
        ("AccountName=a;AccountKey=abc+/==;End", "AccountName=a;AccountKey=***;End"),
        ("a -----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY----- b", "a *** b"),
        ("mail me@example.org about 3@4", "mail me@example.org about 3@4"),
        ("task-1234567890abcdefgh disk-0123456789abcdef0", "task-1234567890abcdefgh disk-0123456789abcdef0"),
        ("multiscale.passes=3 max_detections=100", "multiscale.passes=3 max_detections=100"),
    ],
)
def test_credentials_are_masked_and_the_rest_is_left(text, shown):
    assert redact_text(text) == shown
    assert redact_text(shown) == shown


def test_what_the_environment_holds_is_masked_anywhere(monkeypatch):
    monkeypatch.setenv("TEAM_DB_PASSWORD", "correct horse")
    monkeypatch.setenv("OTHER_API_KEY", "correct horse battery")
    monkeypatch.setenv("SHORT_TOKEN", "ab")
    monkeypatch.setenv("SECRET_FILE", "/run/secrets/file")
    assert redact_text("failed: correct horse battery, correct horse, ab, /run/secrets/file") == (
        "failed: ***, ***, ab, /run/secrets/file"
    )
    assert redact({"note <correct horse>": ["correct horse"]}) == {"note <***>": ["***"]}


@pytest.mark.parametrize("name", ["password", "Pass", "DB_PASSWD", "hf-token", "clientSecret", "AWS_ACCESS_KEY_ID"])
def test_all_text_below_a_secret_name_is_masked(name):
    assert redact({name: {"a": ["x", {"b": "y"}], "n": 3}}) == {name: {"a": ["***", {"b": "***"}], "n": 3}}


@pytest.mark.parametrize("name", ["passes", "bypass_check", "tokenizer", "keyboard", "encompassing", "key"])
def test_ordinary_names_are_left(name):
    assert redact({name: "value"}) == {name: "value"}


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
