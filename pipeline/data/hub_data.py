"""Data sets of the Hugging Face hub: their files, in the hub's cache of each node.

`hf://datasets/OWNER/NAME`, with `@REVISION` where one is meant, is the hub's own form of an address. The address of a
file names its commit, so that every node reads the same bytes. `HF_HOME` and `HF_TOKEN` are read by the hub's client.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NoReturn

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

PREFIX = "hf://datasets/"
_CONVERTED = "refs/convert/parquet"
"""branch of the hub's own copy, as parquet, of data sets that are kept in another form"""
_REFUSED = (RepositoryNotFoundError, GatedRepoError, RevisionNotFoundError, HFValidationError)


def is_hub(path: str) -> bool:
    return path.startswith(PREFIX)


def find_hub_files(root: str, patterns: Sequence[str]) -> list[str]:
    """Addresses of the files that match the first of `patterns` that any file matches, sorted; downloads them.

    Without a network the hub's cache is read. Raises UserError where neither has the data set.
    """
    repository, _, revision = root.rstrip("/").removeprefix(PREFIX).partition("@")
    refused: Exception | None = None
    for branch in [revision] if revision else [None, _CONVERTED]:
        try:
            folder = snapshot_download(repository, repo_type="dataset", revision=branch, allow_patterns=list(patterns))
        except (*_REFUSED, LocalEntryNotFoundError) as error:
            if not (branch == _CONVERTED and isinstance(error, RevisionNotFoundError)):
                refused = refused or error
            continue
        names = list(_files_below(folder))
        for pattern in patterns:
            if found := sorted(name for name in names if fnmatch.fnmatchcase(name, pattern)):
                return [f"{PREFIX}{repository}@{os.path.basename(folder)}/{name}" for name in found]
    if refused:
        _refuse(root, refused)
    return []


@lru_cache(maxsize=4096)
def local_copy(address: str) -> str:
    """Path of a file of `find_hub_files` on this node, downloaded where its cache does not have it; retried."""
    repository, _, rest = address.removeprefix(PREFIX).partition("@")
    commit, _, name = rest.partition("/")

    def download() -> str:
        try:
            return hf_hub_download(repository, name, repo_type="dataset", revision=commit)
        except LocalEntryNotFoundError as error:  # what a client raises that does not reach the hub
            raise ConnectionError(" ".join(str(error).split())) from error

    try:
        return storage.retry(download, address)
    except _REFUSED as error:
        _refuse(address, error)


def _files_below(folder: str) -> Iterator[str]:
    for top, _, names in os.walk(folder):
        for name in names:
            yield os.path.relpath(os.path.join(top, name), folder)


def _refuse(address: str, error: Exception) -> NoReturn:
    if isinstance(error, LocalEntryNotFoundError):
        raise UserError(
            f"{address} cannot be read: the hub does not answer, and its cache here does not hold the data set; run "
            "the command where there is a network, or fill the cache (HF_HOME) there"
        ) from None
    raise UserError(
        f"{address} cannot be read ({type(error).__name__}): check the name and the revision; for a private or gated "
        "data set set HF_TOKEN"
    ) from None
