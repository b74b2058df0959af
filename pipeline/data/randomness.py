"""Random numbers that are a pure function of named values, the same on every machine and in every process."""

from __future__ import annotations

import hashlib

import numpy as np


def keyed_generator(*key: int | str) -> np.random.Generator:
    """A generator that depends on `key` alone, as in (seed, epoch, sample key)."""
    return np.random.Generator(np.random.Philox(key=_digest(key)))


def keyed_permutation(size: int, *key: int | str) -> np.ndarray:
    """A permutation of 0 .. size - 1 that depends on `key` alone.

    It sorts the generator's raw output, which numpy keeps the same for ever; `Generator.permutation` may change.
    """
    raw = np.random.Philox(key=_digest(key)).random_raw(size)
    return stable_order(np.atleast_1d(raw))


def stable_order(values: np.ndarray) -> np.ndarray:
    """`np.argsort(values, kind="stable")`, in half the time where no two values are equal, as they hardly ever are."""
    order = np.argsort(values)
    ascending = values[order]
    return np.argsort(values, kind="stable") if (ascending[1:] == ascending[:-1]).any() else order


def keyed_integer(stop: int, *key: int | str) -> int:
    """A whole number 0 .. stop - 1 that depends on `key` alone."""
    return _digest(key) % stop


def _digest(key: tuple[int | str, ...]) -> int:
    text = "\x1f".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "big")
