"""Charts as inline SVG: thin lines, direct labels, colours from the page's style sheet (`--series-1` and so on)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_MAX_POINTS = 400


@dataclass(frozen=True)
class PlotArea:
    """Size and margins of a drawing, in its own units."""

    name: str
    width: int
    height: int
    left: int
    right: int
    top: int = 44
    bottom: int = 34

    @property
    def x_end(self) -> int:
        return self.width - self.right

    @property
    def y_end(self) -> int:
        return self.height - self.bottom


FRAMES = (PlotArea("wide", 560, 270, 46, 104), PlotArea("narrow", 328, 246, 40, 112, top=60))
"""Every chart is drawn in both; the style sheet shows the one whose text is readable on the screen."""

_Place = Callable[[float, float], tuple[float, float]]
"""values on the axes -> position in the drawing"""


@dataclass(frozen=True)
class Series:
    """One line. `colour` counts from 1; `faint` draws a thin unlabelled line behind; `dots` marks every point."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 1
    faint: bool = False
    dots: bool = False


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    note: str = "",
    x_name: str = "epoch",
    y_max: float | None = None,
    y_format: str = "{:.3g}",
    x_min: float | None = None,
    x_max: float | None = None,
    end_values: bool = True,
) -> str:
    """Lines over a common x axis, y from zero; each line is labelled at its end, with its last value.

    note        what the y axis counts, in words, beside the title
    end_values  False: the labels are the names alone
    The pointer, or the arrow keys on a focused chart, show the values at a position.
    """
    drawn = [_thinned(line) for line in series if len(line.x)]
    if not drawn:
        return ""
    x_low = x_min if x_min is not None else min(min(line.x) for line in drawn)
    x_high = x_max if x_max is not None else max(max(line.x) for line in drawn)
    if x_high <= x_low:
        x_high = x_low + 1
    ticks = nice_ticks(0.0, y_max if y_max is not None else max(max(line.y) for line in drawn))
    axes = (x_low, x_high, ticks, x_name)
    drawings = "".join(_drawing(frame, (title, note), drawn, axes, y_format, end_values) for frame in FRAMES)
    return f'<div class="chart-box">{drawings}</div>'


def _drawing(
    frame: PlotArea,
    heading: tuple[str, str],
    lines: Sequence[Series],
    axes: tuple[float, float, Sequence[float], str],
    y_format: str,
    end_values: bool,
) -> str:
    """heading  (title, note);  axes  (lowest x, highest x, y ticks, name of x)"""
    x_low, x_high, ticks, x_name = axes

    def place(x: float, y: float) -> tuple[float, float]:
        across = frame.left + (x - x_low) / (x_high - x_low) * (frame.x_end - frame.left)
        return across, frame.y_end - min(y / ticks[-1], 1.0) * (frame.y_end - frame.top)

    named = [line for line in lines if not line.faint]
    parts = [
        _heading(*heading, frame),
        _y_axis(ticks, place(x_low, 0)[0], place, x_low, frame),
        _x_axis(x_low, x_high, x_name, place, frame),
        *(_path(line, place) for line in sorted(lines, key=lambda line: not line.faint)),
        _end_labels(named, place, y_format if end_values else "", frame),
    ]
    hover = [
        {
            "name": line.name,
            "colour": line.colour,
            "points": [
                [round(value, 1) for value in place(x, y)] + [float(f"{x:.4g}"), y_format.format(y)]
                for x, y in zip(line.x, line.y, strict=True)
            ],
        }
        for line in named
    ]
    data = escape(json.dumps({"x": x_name, "top": frame.top, "bottom": frame.y_end, "lines": hover}), quote=True)
    return (
        f'<svg class="chart {frame.name}" viewBox="0 0 {frame.width} {frame.height}" role="img" tabindex="0" '
        f'aria-label="{escape(heading[0])}" data-lines="{data}">{"".join(parts)}<g class="readout"></g></svg>'
    )


def share_bar(parts: Sequence[tuple[str, float, str]], *, label: str) -> str:
    """One bar of parts, (name, size, size in words), each labelled below; colours in order, quiet from the seventh."""
    total = sum(size for _, size, _ in parts)
    if total <= 0:
        return ""
    cells, keys = [], []
    for index, (name, size, words) in enumerate(parts, start=1):
        if size <= 0:
            continue
        colour = f"var(--series-{index})" if index <= 6 else "var(--quiet)"
        percent = 100 * size / total
        cells.append(
            f'<span style="flex:{size / total:.6f};background:{colour}" title="{escape(name)} {words}"></span>'
        )
        keys.append(
            f'<div class="key"><i style="background:{colour}"></i><b>{escape(name)}</b>'
            f'<span class="number">{percent:.1f} %</span><span class="muted number">{escape(words)}</span></div>'
        )
    return (
        f'<div class="share" role="img" aria-label="{escape(label)}">{"".join(cells)}</div>'
        f'<div class="keys">{"".join(keys)}</div>'
    )


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from `low` to at least `high`, about `count` steps of 1, 2, 2.5 or 5 times a power of ten."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low, low + 1.0]
    power = 10.0 ** math.floor(math.log10(span / count))
    pitch = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= span / count * 0.999)
    return [low + pitch * index for index in range(math.ceil(span / pitch - 1e-9) + 1)]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Exponential moving average with the weight of a `window` of values, unbiased at the start."""
    keep = 1 - 2 / (window + 1)
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result.append(mean / weight)
    return result


def _thinned(line: Series) -> Series:
    """At most `_MAX_POINTS` points: means over runs of neighbours, the last point kept as it is."""
    count = len(line.x)
    if count <= _MAX_POINTS:
        return line
    size = math.ceil((count - 1) / (_MAX_POINTS - 1))
    x, y = [], []
    for start in range(0, count - 1, size):
        stop = min(start + size, count - 1)
        x.append(sum(line.x[start:stop]) / (stop - start))
        y.append(sum(line.y[start:stop]) / (stop - start))
    return Series(line.name, [*x, line.x[-1]], [*y, line.y[-1]], line.colour, line.faint, line.dots)


def _heading(title: str, note: str, frame: PlotArea) -> str:
    beside = f'<tspan class="note" dx="8">{escape(note)}</tspan>' if note and frame.name == "wide" else ""
    below = f'<text class="note" x="0" y="32">{escape(note)}</text>' if note and frame.name == "narrow" else ""
    return f'<text class="title" x="0" y="16">{escape(title)}{beside}</text>{below}'


def _y_axis(ticks: Sequence[float], left: float, place: _Place, x_low: float, frame: PlotArea) -> str:
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    if (ticks[1] - ticks[0]) * 10**decimals % 1 > 1e-6:
        decimals += 1
    parts = []
    for tick in ticks:
        y = place(x_low, tick)[1]
        kind = "base" if tick == 0 else "grid"
        text = "0" if tick == 0 else f"{tick:.{decimals}f}" if decimals <= 4 else f"{tick:.0e}".replace("e-0", "e-")
        parts.append(f'<line class="{kind}" x1="{left:.1f}" x2="{frame.x_end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{left - 8:.1f}" y="{y + 4:.1f}">{text}</text>')
    return "".join(parts)


def _x_axis(low: float, high: float, name: str, place: _Place, frame: PlotArea) -> str:
    span = nice_ticks(0.0, high - low, 5 if frame.name == "wide" else 3)
    pitch = span[1] if high - low < 5 and name != "epoch" else max(1.0, round(span[1]))
    if high - low <= 1:
        pitch = span[1]
    first = math.ceil(low / pitch - 1e-9) * pitch
    ticks = [first + pitch * index for index in range(int((high - first) / pitch + 1e-9) + 1)]
    y = frame.y_end + 18
    parts = [f'<text class="tick mid" x="{place(tick, 0)[0]:.1f}" y="{y}">{tick:g}</text>' for tick in ticks]
    parts.append(f'<text class="tick" x="{frame.x_end + 18}" y="{y}">{escape(name)}</text>')
    return "".join(parts)


def _path(line: Series, place: _Place) -> str:
    points = [place(x, y) for x, y in zip(line.x, line.y, strict=True)]
    commands = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for x, y in points[1:]:
        commands.append(f"L{x:.1f} {y:.1f}")
    colour = f"var(--series-{line.colour})"
    kind = "faint" if line.faint else "line"
    svg = f'<path class="{kind}" style="stroke:{colour}" d="{"".join(commands)}"/>'
    if line.faint:
        return svg
    dotted = points if line.dots and len(points) <= 40 else points[-1:]
    return svg + "".join(f'<circle style="fill:{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in dotted)


def _end_labels(lines: Sequence[Series], place: _Place, y_format: str, frame: PlotArea) -> str:
    """Name and last value at the end of each line, pushed apart where they would overlap."""
    order = sorted(lines, key=lambda line: place(line.x[-1], line.y[-1])[1])
    positions = _spread([place(line.x[-1], line.y[-1])[1] for line in order], frame.top - 8, frame.y_end - 2)
    parts = []
    for line, y in zip(order, positions, strict=True):
        value = y_format.format(line.y[-1])
        anchor = max(place(line.x[-1], 0)[0], frame.x_end) + 10
        parts.append(
            f'<text class="label" x="{anchor:.1f}" y="{y + 4:.1f}" style="fill:var(--series-{line.colour})">'
            f'{escape(line.name)} <tspan class="value">{value}</tspan></text>'
        )
    return "".join(parts)


def _spread(positions: list[float], low: float, high: float) -> list[float]:
    """Ascending positions pushed apart, within [low, high], until lines of text at them do not overlap."""
    height = 15.0
    positions = list(positions)
    for _ in range(40):
        for first in range(len(positions) - 1):
            gap = positions[first + 1] - positions[first]
            if gap < height:
                positions[first] -= (height - gap) / 2
                positions[first + 1] += (height - gap) / 2
        positions = [min(max(position, low), high) for position in positions]
    return positions
