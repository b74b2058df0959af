"""Data sets of the Hugging Face hub, from a hub of our own: init, shards, the hub's cache without a network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from refinedet.pipeline.data.huggingface import find_files
from refinedet.pipeline.runs.errors import UserError

from tests.cluster.commands import run_commands
from tests.data.hub_server import hub_server
from tests.data.test_formats import images, write_plain_parquet
from tests.data.test_shards import files_of

__all__ = ["images"]  # a fixture


HUB = "hf://datasets/acme"


@pytest.mark.parametrize("branch", ["main", "refs/convert/parquet"])
def test_a_data_set_of_the_hub_is_that_of_its_directory(tmp_path: Path, images: dict[str, bytes], branch: str) -> None:
    write_plain_parquet(tmp_path / "set", images)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("photos")
    if branch != "main":  # the hub's own copy lies so
        (tmp_path / "set" / "default" / "train").mkdir(parents=True)
        (file,) = (tmp_path / "set" / "data").iterdir()
        file.rename(tmp_path / "set" / "default" / "train" / "0000.parquet")
    branches = {("acme/owls", "main"): tmp_path / "empty", ("acme/owls", branch): tmp_path / "set"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment["HF_HOME"] = str(tmp_path / "cache")
    with hub_server(branches) as endpoint:
        environment["HF_ENDPOINT"] = endpoint
        commands = [["init", f"{HUB}/owls"], ["shard", "owls.yaml", f"data.root={HUB}/cats"]]
        made, absent = run_commands(commands, tmp_path, environment)
    assert made.status == 0, made.stderr
    assert f"root: {HUB}/owls" in (tmp_path / "owls.yaml").read_text()
    assert absent.status == 2
    assert f"{HUB}/cats cannot be read (RepositoryNotFoundError): check the name" in absent.stderr
    commands = [  # without the hub now
        ["shard", "owls.yaml", "data.shards=hub"],
        ["shard", "owls.yaml", "data.shards=here", f"data.root={tmp_path}/set"],
        ["shard", "owls.yaml", "data.shards=none", f"data.root={HUB}/dogs"],
    ]
    hub, here, unknown = run_commands(commands, tmp_path, environment)
    assert (hub.status, here.status) == (0, 0), hub.stderr + here.stderr
    cached, local = (
        {name: content for name, content in files_of(tmp_path / shards / "train").items() if name.endswith(".tar")}
        for shards in ("hub", "here")
    )
    assert cached == local
    assert [*cached] == ["shard-000000.tar"]
    assert unknown.status == 2
    assert f"{HUB}/dogs cannot be read: the hub does not answer, and its cache here does not hold" in unknown.stderr


def test_a_split_of_several_configurations_is_refused(tmp_path: Path, images: dict[str, bytes]) -> None:
    for name in ("owls", "foxes"):
        write_plain_parquet(tmp_path / name, images)
        (tmp_path / name / "data").rename(tmp_path / name / "train")
    with pytest.raises(UserError, match=r"several configurations \(foxes, owls\): name one with `set`, as foxes/train"):
        find_files(str(tmp_path), "train")
    assert len(find_files(str(tmp_path), "foxes/train")) == 1
