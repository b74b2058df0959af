"""Pictures of MLflow's pages for the documentation, from a run on a server, by headless Chromium.

    python -m tests.docs.mlflow_pictures http://127.0.0.1:5000 [--run NAME] [--output docs/pictures]

Look at them before they are committed; pages of photos do not belong into the repository.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from mlflow import MlflowClient
from mlflow.entities import Run

WIDTH, SCALE = 1280, 1.0
SETTLE_S = 10.0
"""for charts and pictures of a page to come"""


@dataclass(frozen=True)
class Page:
    """A page of MLflow: its path, its height in pixels, and a script that runs before the picture is taken."""

    path: str
    height: int
    script: str = ""


def pages(client: MlflowClient, run: Run) -> dict[str, Page]:
    """The documentation's pictures of a run, by name."""
    here = f"experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    query = f"tags.`mlflow.parentRunId` = '{run.info.run_id}' and attributes.run_name = 'pictures'"
    (pictures, *_) = client.search_runs([run.info.experiment_id], query)
    of_pictures = f"experiments/{run.info.experiment_id}/runs/{pictures.info.run_id}"
    (version, *_) = client.search_model_versions(f"run_id = '{run.info.run_id}'")
    return {
        "mlflow-run": Page(here, 1300, click("Show more")),
        "mlflow-curves": Page(f"{here}/model-metrics", 1000),
        "mlflow-nodes": Page(f"{here}/system-metrics", 2350),
        "mlflow-data": Page(here, 1000, click("shapes train", exactly=False)),
        "mlflow-pictures": Page(f"{of_pictures}/model-metrics", 1000),
        "mlflow-model": Page(f"models/{version.name}/versions/{version.version}", 900),
    }


def click(text: str, *, exactly: bool = True) -> str:
    """Click on the first element of that text, or, not `exactly`, whose text begins so."""
    found = "one.textContent.trim() === wanted" if exactly else "one.textContent.trim().startsWith(wanted)"
    return (
        f"{{ const wanted = {json.dumps(text)}; [...document.querySelectorAll('span, div, button, a')]"
        f".find((one) => one.children.length === 0 && {found})?.click() }}"
    )


NO_ASSISTANT = "localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false')"


class Browser:
    """One tab, driven by the protocol that Chromium's own tools speak."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while (answer := await self._socket.receive_json()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    async def take(self, url: str, page: Page) -> bytes:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=WIDTH,
            height=page.height,
            deviceScaleFactor=SCALE,
            mobile=False,
        )
        await self.call("Page.navigate", url="about:blank")
        await self.call("Page.navigate", url=url)
        await asyncio.sleep(SETTLE_S)
        if page.script:
            await self.call("Runtime.evaluate", expression=page.script)
            await asyncio.sleep(SETTLE_S)
        shot = await self.call("Page.captureScreenshot", format="png")
        return base64.b64decode(shot["data"])


@contextmanager
def chromium() -> Iterator[str]:
    """Start it; yields the address of its protocol."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert program, "no Chromium is installed (apt-get install chromium)"
    with tempfile.TemporaryDirectory() as profile:
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(r"ws://(127\.0\.0\.1:\d+)/", line):
                    yield f"http://{found.group(1)}"
                    break
        finally:
            process.kill()
            process.wait()


async def take_all(address: str, server: str, wanted: dict[str, Page], output: Path) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{address}/json/list") as answer:
            tab = next(one for one in await answer.json() if one["type"] == "page")
        async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            browser = Browser(socket)
            await browser.call("Page.enable")
            await browser.take(server, Page("", 900, NO_ASSISTANT))
            await browser.take(f"{server}/#/experiments", Page("", 900, click("Model training")))
            for name, page in wanted.items():
                picture = await browser.take(f"{server}/#/{page.path}", page)
                (output / f"{name}.png").write_bytes(picture)
                print(f"{output / name}.png", f"{len(picture) / 1e3:.0f} kB")  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="MLflow's address")
    parser.add_argument("--run", default="quickstart", help="its name")
    parser.add_argument("--experiment", default="refinedet")
    parser.add_argument("--output", type=Path, default=Path("docs/pictures"))
    options = parser.parse_args()
    server = options.server.rstrip("/")
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name(options.experiment)
    assert experiment is not None, f"the server has no experiment {options.experiment!r}"
    (run, *_) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{options.run}'")
    with chromium() as address:
        asyncio.run(take_all(address, server, pages(client, run), options.output))


if __name__ == "__main__":
    main()
