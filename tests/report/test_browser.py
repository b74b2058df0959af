"""The report in a browser: what a reader sees at the widths of a phone, a tablet and a desk."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape

import numpy as np
import pytest
from refinedet.pipeline.report.report import build_report
from refinedet.pipeline.report.run_comparison import build_comparison
from refinedet.pipeline.report.run_data import read_runs

from tests.report.synthetic import images, write_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (apt-get install chromium)"),
]
COCO_NAMES = (*(f"class number {index}" for index in range(78)), "extraordinarily long class name", "bus")

# Runs in the page that holds the report in a frame of the width to be measured.
MEASURE = """
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => setTimeout(() => {
  const page = frame.contentDocument, view = frame.contentWindow, faults = [];
  const seen = (element) => element.getClientRects().length > 0;
  const width = page.documentElement.clientWidth;
  if (page.documentElement.scrollWidth > width) faults.push(`the page is ${page.documentElement.scrollWidth} wide`);
  for (const table of page.querySelectorAll("table")) {
    const heads = [...table.querySelectorAll("thead th")].filter(seen);
    for (const row of table.querySelectorAll("tbody tr")) {
      const cells = [...row.children].filter(seen);
      if (!heads.length || !seen(row)) continue;
      if (heads.length !== cells.length) faults.push(`${heads.length} headings over ${cells.length} cells`);
      heads.forEach((head, index) => {
        const above = head.getBoundingClientRect(), below = cells[index]?.getBoundingClientRect();
        if (below && Math.abs(above.left - below.left) + Math.abs(above.right - below.right) > 2)
          faults.push(`${head.textContent} is not above ${cells[index].textContent}`);
      });
    }
  }
  let texts = 0;
  for (const text of page.querySelectorAll("svg text, td, th, figcaption, dd, .tile, h1, h2, h3, p")) {
    if (!seen(text) || text.closest(".scroll, pre")) continue;
    texts += 1;
    const box = text.getBoundingClientRect();
    if (box.left < -1 || box.right > width + 1) faults.push(`cut: ${text.textContent.slice(0, 40)}`);
    const size = parseFloat(view.getComputedStyle(text).fontSize);
    const scale = text.ownerSVGElement ? text.getScreenCTM().a : 1;
    if (text.textContent.trim() && size * scale < 10) faults.push(`${size * scale} px: ${text.textContent}`);
  }
  for (const chart of page.querySelectorAll("svg.chart")) {
    const boxes = [...chart.querySelectorAll("text")].filter(seen).map((text) => [text, text.getBoundingClientRect()]);
    boxes.forEach(([text, box], index) => boxes.slice(index + 1).forEach(([other, next]) => {
      const wide = Math.min(box.right, next.right) - Math.max(box.left, next.left);
      const high = Math.min(box.bottom, next.bottom) - Math.max(box.top, next.top);
      if (wide > 1 && high > 5) faults.push(`${text.textContent} lies on ${other.textContent}`);
    }));
  }
  const verdict = page.querySelector(".verdict").getBoundingClientRect();
  const chart = [...page.querySelectorAll("svg[data-lines]")].find(seen);
  chart.focus();
  chart.dispatchEvent(new view.KeyboardEvent("keydown", { key: "ArrowLeft" }));
  const colours = [view.getComputedStyle(page.body).color, view.getComputedStyle(page.body).backgroundColor];
  document.body.dataset.result = JSON.stringify({
    faults: [...new Set(faults)].slice(0, 20), texts, width, colours, verdict: verdict.top,
    focused: page.activeElement === chart, readout: chart.querySelector(".readout").textContent,
    broken: [...page.images].filter((image) => !image.naturalWidth).length, pictures: page.images.length,
  });
}, 300));
frame.srcdoc = JSON.parse(document.querySelector("script").textContent);
"""


def _measure(page: str, width: int, tmp_path, *, dark: bool = False) -> dict:
    """The browser's layout of `page` in a frame `width` pixels wide."""
    harness = tmp_path / f"harness{width}.html"
    frame = f'<iframe style="width:{width}px;height:900px;border:0"></iframe>'
    content = json.dumps(page).replace("</", "<\\/")
    scripts = f'<script type="application/json">{content}</script><script>{MEASURE}</script>'
    harness.write_text(f"<!doctype html><meta charset=utf-8><body>{frame}{scripts}</body>")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += ["--window-size=1600,1200", "--virtual-time-budget=20000", "--dump-dom"]
    if dark:
        command.append("--blink-settings=preferredColorScheme=0")
    done = subprocess.run([*command, harness.as_uri()], capture_output=True, text=True, timeout=200)
    found = re.search(r'<body data-result="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found.group(1)))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    write_run(folder, num_images=12, size=64, num_steps=240)
    build_report(str(folder), load_images=images(folder))
    return (folder / "report.html").read_text()


@pytest.mark.parametrize("width", [360, 400, 768, 1400])
def test_every_heading_is_above_its_column_and_nothing_is_cut(page, width, tmp_path):
    found = _measure(page, width, tmp_path)
    assert found["width"] == width
    assert found["faults"] == []
    assert found["texts"] > 100
    assert found["pictures"] > 30
    assert found["broken"] == 0
    assert 0 < found["verdict"] < 400
    assert found["focused"]
    assert "recall" in found["readout"], "the arrow keys read a chart"


@pytest.mark.parametrize("width", [360, 768, 1400])
def test_eighty_classes_fit_too(width, tmp_path):
    write_run(tmp_path / "run", num_images=12, size=48, num_steps=24, classes=COCO_NAMES)
    build_report(str(tmp_path / "run"), load_images=images(tmp_path / "run"))
    assert _measure((tmp_path / "run" / "report.html").read_text(), width, tmp_path)["faults"] == []


def test_dark_and_light_are_both_readable(page, tmp_path):
    def luminance(colour: str) -> float:
        parts = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    inks = []
    for dark in (False, True):
        ink, paper = (luminance(colour) for colour in _measure(page, 768, tmp_path, dark=dark)["colours"])
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 7
        inks.append(ink)
    assert inks[1] > inks[0], "the dark page has light ink"


@pytest.mark.parametrize("width", [360, 1400])
def test_runs_side_by_side_fit_too(width, tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path / name, num_images=4, size=32, num_steps=24)
    path = build_comparison(read_runs([str(tmp_path / "one"), str(tmp_path / "two")]), str(tmp_path / "both.html"))
    with open(path) as file:
        assert _measure(file.read(), width, tmp_path)["faults"] == []


def test_a_run_of_coco_is_a_page_of_at_most_8_mb(tmp_path):
    write_run(tmp_path / "run", num_images=5000, size=64, num_steps=2000, classes=COCO_NAMES)
    build_report(str(tmp_path / "run"), load_images=_photos)
    page = (tmp_path / "run" / "report.html").read_bytes()
    assert len(page) <= 8e6


def _photos(image_ids):
    """Photos as noisy as COCO's, of its size."""
    found = {}
    for image_id in image_ids:
        rng = np.random.default_rng(image_id)
        coarse = rng.integers(0, 255, (60, 80, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        found[image_id] = (coarse + rng.integers(0, 40, coarse.shape, np.uint8)).astype(np.uint8)
    return found
