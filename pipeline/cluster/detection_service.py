"""The detector behind HTTP on Ray Serve: what a replica does with a request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.metrics import Counter
from refinedet.pipeline.inference import image_requests
from refinedet.pipeline.inference.image_requests import RequestError
from refinedet.pipeline.runs import storage
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

if TYPE_CHECKING:
    from refinedet.pipeline.inference.detect import Found

PAGE = Path(__file__).with_name("detection_page.html")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob:; connect-src 'self'"
_Encoded = tuple[str, bytes]
"""the image's name in messages, and its bytes"""


@dataclass(frozen=True)
class Settings:
    """Settings of a replica.

    threads  of torch; Ray leaves it at one
    wait_s   longest wait of an image for others to be detected with
    """

    device: str | None = None
    precision: str = "auto"
    batch_size: int = 8
    wait_s: float = 0.01
    threads: int = 1


class DetectionService:
    """`GET /` is a page to drop an image on, `GET /health` an answer without work, `POST /predict` detects.

    `POST /invocations` is the same, where clients of MLflow's servers send their requests.
    Images of requests that wait are detected together, up to `batch_size`. What cannot be answered is a status of 4xx
    with {"error": "one sentence"}.
    """

    def __init__(self, weights: str, settings: Settings) -> None:
        # Here, so that the driver, which imports this class too, does without: half a gigabyte.
        import torch
        from refinedet.pipeline.inference.predictor import Predictor

        torch.set_num_threads(settings.threads)
        batch_size = settings.batch_size
        self._predictor = Predictor.load(
            weights, device=settings.device, precision=settings.precision, batch_size=batch_size
        )
        self._categories = categories_of_detector(weights, self._predictor.names)
        self._parsing = asyncio.Semaphore(1)  # JSON of many megabytes, one at a time
        self._images = Counter("refinedet_served_images", description="images that were detected in")
        self._refused = Counter("refinedet_refused_requests", description="requests refused", tag_keys=("status",))
        batching: Any = self._detect  # `serve.batch` adds these two
        batching.set_max_batch_size(batch_size)
        batching.set_batch_wait_timeout_s(settings.wait_s)

    async def __call__(self, request: Request) -> Response:
        try:
            return await self._answer(request)
        except RequestError as error:
            self._refused.inc(tags={"status": str(error.status)})
            # The rest of a body that is too large is not read.
            closing = {"Connection": "close"} if error.status == 413 else None
            return JSONResponse({"error": str(error)}, status_code=error.status, headers=closing)

    async def _answer(self, request: Request) -> Response:
        path, method = request.url.path.rstrip("/") or "/", request.method
        wanted = {"/": "GET", "/health": "GET", "/predict": "POST", "/invocations": "POST"}.get(path)
        if wanted is None:
            raise RequestError(f"There is no path {path[:40]!r}; there are /, /health, /predict and /invocations.", 404)
        if method not in (wanted, "HEAD" if wanted == "GET" else wanted):
            raise RequestError(f"{path} takes {wanted}, received {method[:20]}.", 405)
        if path == "/":
            return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": _POLICY})
        if path == "/health":
            return JSONResponse({"status": "ok", "categories": len(self._categories)})
        return await self._predict(request)

    async def _predict(self, request: Request) -> Response:
        body = await _read_body(request)
        kind, asked = request.headers.get("content-type", ""), request.query_params.get("score_threshold")
        async with self._parsing:
            images, threshold = await asyncio.to_thread(image_requests.parse_request, body, kind, asked)
        del body
        detect: Any = self._detect  # takes one image, where the method takes many
        results = await asyncio.gather(*(detect((f"image {index}", image)) for index, image in enumerate(images)))
        found = [_found(result) for result in results]
        self._images.inc(len(found))
        return JSONResponse({"predictions": [self._describe(one, threshold) for one in found]})

    def _describe(self, found: Found, threshold: float) -> dict[str, Any]:
        order = found.scores.sort(descending=True, stable=True).indices
        found = found.select(order[found.scores[order] >= threshold])
        columns = (column.tolist() for column in (found.boxes, found.scores, found.labels))
        boxes, scores, labels = columns
        return image_requests.describe_objects(boxes, scores, labels, self._categories)

    @serve.batch
    async def _detect(self, images: list[_Encoded]) -> list[Found | RequestError]:
        """Detections of each encoded image, or why it cannot be decoded; beside the loop that takes requests."""
        return await asyncio.to_thread(self._detect_all, images)

    def _detect_all(self, images: Sequence[_Encoded]) -> list[Found | RequestError]:
        results: list[Found | RequestError] = []
        for group in _groups(images):
            results += self._detect_group(group)
        return results

    def _detect_group(self, images: Sequence[_Encoded]) -> list[Found | RequestError]:
        decoded: list[Any] = []
        for name, content in images:
            try:
                decoded.append(image_requests.decode_sent_image(content, name, self._predictor.exif))
            except RequestError as error:
                decoded.append(error)
        found = self._predictor.predict([image for image in decoded if not isinstance(image, RequestError)])
        return [image if isinstance(image, RequestError) else next(found) for image in decoded]


def categories_of_detector(weights: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Id and name of labels 1..C: the data set's own ids with a model packaged for MLflow, otherwise the labels."""
    description = storage.join(weights, "artifacts", "detector.json")
    if storage.exists(description):
        return storage.read_json(description)["categories"]
    return [{"id": label, "name": name} for label, name in enumerate(names, 1)]


def _groups(images: Sequence[_Encoded]) -> Iterator[list[_Encoded]]:
    """Images that are decoded together: no more pixels than one image may have."""
    group: list[_Encoded] = []
    pixels = 0
    for image in images:
        more = image_requests.check_header(image[1], image[0])  # passed once already
        if group and pixels + more > image_requests.MAX_SENT_PIXELS:
            yield group
            group, pixels = [], 0
        group.append(image)
        pixels += more
    if group:
        yield group


def _found(result: Found | RequestError) -> Found:
    if isinstance(result, RequestError):
        raise result
    return result


async def _read_body(request: Request) -> bytes:
    """The body; what is too large is refused by its header, or once that many bytes have come."""
    length = request.headers.get("content-length", "0")
    image_requests.check_body_size(int(length) if length.isdecimal() and len(length) < 20 else 10**19)
    body = bytearray()
    async for chunk in request.stream():
        image_requests.check_body_size(len(body) + len(chunk))
        body += chunk
    return bytes(body)
