"""Two hundred requests that no server may answer with 200, made from one seed: images, documents, parameters, types."""

from __future__ import annotations

import base64
import json
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Hostile:
    """A request, and what is wrong with it.

    unparsed  MLflow's own server fails on it with 500 before the model gets anything: it has no type, or is JSON that
              Python's parser gives up on with another error than for a mistake of syntax
    """

    what: str
    body: bytes
    content_type: str | None = "application/json"
    unparsed: bool = False


def photo(suffix: str, side: int = 160) -> bytes:
    """An image file of noise over a gradient."""
    generator = np.random.default_rng(3)
    ramp = np.linspace(0, 200, side)[None, :, None]
    pixels = (ramp + generator.integers(0, 56, (side, side, 3))).astype(np.uint8)
    return cv2.imencode(suffix, pixels)[1].tobytes()


def png(width: int, height: int, *, whole: bool = False) -> bytes:
    """A PNG whose header claims that many pixels; `whole`: black ones, in few bytes."""
    rows = zlib.compress(b"\0" * ((width * 3 + 1) * height) if whole else b"\0" * 64, 9)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def document(image: object, **params: object) -> bytes:
    content: dict[str, object] = {"inputs": [{"image": image}]}
    return json.dumps(content | ({"params": params} if params else {})).encode()


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def hostile_requests(count: int = 200, seed: int = 19) -> list[Hostile]:
    """`count` different requests: all that are listed, then images cut at random places."""
    draw = random.Random(seed)
    found = [*_images(draw), *_parameters(), *_documents(), *_types()]
    files = {suffix: photo(suffix) for suffix in (".jpg", ".png", ".webp", ".bmp")}
    while len(found) < count:
        suffix = draw.choice(list(files))
        cut = files[suffix][: int(len(files[suffix]) * draw.uniform(0.05, 0.9))]
        as_file = draw.random() < 0.5
        kind = f"image/{'jpeg' if suffix == '.jpg' else suffix[1:]}"
        body, content_type = (cut, kind) if as_file else (document(text(cut)), "application/json")
        found.append(Hostile(f"{suffix} cut to {len(cut)} bytes", body, content_type))
    draw.shuffle(found)
    assert len(found) == count
    return found


def _images(draw: random.Random) -> Iterator[Hostile]:
    claims = [(9000, 9000), (20_000, 20_000), (65_535, 65_535), (2**31 - 1, 1), (1, 2**31 - 1), (0, 9), (9, 0)]
    bombs = {"bomb": png(8000, 8000, whole=True), **{f"claims {w} x {h}": png(w, h) for w, h in claims}}
    others = {
        "empty": b"",
        "magic of JPEG": b"\xff\xd8\xff",
        "magic of PNG": b"\x89PNG\r\n\x1a\n",
        "magic of WebP": b"RIFF\xff\xff\xff\xffWEBP",
        "GIF": b"GIF89a\x01\0\x01\0\0\0\0;",
        "TIFF": b"II*\0\x08\0\0\0\0\0",
        "ZIP": b"PK\x03\x04" + b"\0" * 40,
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "PDF": b"%PDF-1.7\n",
        "Python": b"import os",
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "zeros": b"\0" * 10_000,
        "21 MB": b"\xff\xd8\xff" + b"\0" * (21 * 2**20),
        **{f"random {size}": draw.randbytes(size) for size in (1, 7, 100, 10_000, 1_000_000)},
    }
    for what, content in {**bombs, **others}.items():
        yield Hostile(f"{what}, as a file", content, "image/png")
        yield Hostile(f"{what}, in base64", document(text(content)))


def _parameters() -> Iterator[Hostile]:
    good = text(photo(".png"))
    infinite = [float("nan"), float("inf"), float("-inf")]
    for value in (*infinite, -0.1, -1, 1.5, 1e300, "high", "", [], [0.5], {}, {"a": 1}):
        yield Hostile(f"score_threshold {value!r}", document(good, score_threshold=value))
    for value in (*infinite, -1, 0, 65, 10**9, 2.5, "many", [], {}):
        yield Hostile(f"batch_size {value!r}", document(good, batch_size=value))
    raw = '{"inputs": [{"image": "%s"}], "params": {"score_threshold": %s}}'
    for number in ("1e999", "-1e999", "9" * 5000):
        yield Hostile(f"score_threshold {number[:9]}", (raw % (good, number)).encode(), unparsed=len(number) > 4300)


def _documents() -> Iterator[Hostile]:
    good = text(photo(".png", 16))
    rows = [None, 3, "x", [], {}, [[]], [3], ["x"], [None], [{}], [{"picture": good}], {"picture": [good]}]
    for value in rows:
        yield Hostile(f"inputs {value!r:.40}", json.dumps({"inputs": value}).encode())
    images = [None, 3, 0.5, True, [], {}, [[1, 2], [3]], [[[0.5] * 3] * 4] * 4, [[[1] * 4] * 4] * 4, "no base64!", "é"]
    for value in images:
        yield Hostile(f"image {value!r:.40}", document(value))
    for value in ([], 3, "x", None, {"inputs": 1, "instances": 2}, {"columns": ["image"]}, {"a": 1}):
        yield Hostile(f"document {value!r:.40}", json.dumps(value).encode())
    tables = [None, 3, [], {}, {"columns": ["image"]}, {"columns": ["image"], "data": [[good, good]]}]
    for value in (*tables, {"columns": 3, "data": [[good]]}, {"columns": ["picture"], "data": [[good]]}):
        yield Hostile(f"dataframe_split {value!r:.60}", json.dumps({"dataframe_split": value}).encode())
    for form in ("instances", "dataframe_records"):
        for value in (None, 3, [], [3], [{"picture": good}], [{"image": "no base64!"}]):
            yield Hostile(f"{form} {value!r:.40}", json.dumps({form: value}).encode())
    for depth in (1000, 100_000, 1_000_000):
        yield Hostile(f"lists, {depth} deep", b'{"inputs": ' + b"[" * depth + b"]" * depth + b"}", unparsed=True)
        yield Hostile(
            f"objects, {depth} deep", b'{"inputs": ' + b'{"a":' * depth + b"1" + b"}" * (depth + 1), unparsed=True
        )
    yield Hostile("deep and open", b"[" * 5_000_000, unparsed=True)
    yield Hostile("65 images", json.dumps({"inputs": [{"image": good}] * 65}).encode())
    yield Hostile("10,000 images", json.dumps({"inputs": [{"image": good}] * 10_000}).encode())
    yield Hostile("30 MB of text", document("A" * 30_000_000))
    yield Hostile("a key of 10 MB", json.dumps({"k" * 10_000_000: 1}).encode())
    for broken in (b"", b"{", b"nonsense", b"\xff\xfe{\0}\0", b'{"inputs": [}', b'{"inputs": "\xff"}', b"\0" * 1000):
        yield Hostile(f"JSON {broken[:20]!r}", broken)
    yield Hostile("40 MB", b" " * 40_000_000 + b"{}")


def _types() -> Iterator[Hostile]:
    good = photo(".png", 16)
    for kind in ("text/plain", "text/html", "image/svg+xml", "image/gif", "multipart/form-data", "x", "", "; ;", None):
        yield Hostile(f"type {kind}", good, kind, unparsed=kind is None)
    yield Hostile("a file as JSON", good)
    yield Hostile("JSON as a file", document(text(good)), "image/png")
