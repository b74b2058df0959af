"""Charts as inline SVG: thin lines, direct labels, colours from the page's style sheet (`--series-1` and so on)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 104, 44, 34
_MAX_POINTS = 400

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
    labels_at: float | None = None,
) -> str:
    """Lines over a common x axis, y from zero; each line is labelled at its end with its last value.

    note       what the y axis counts, in words, beside the title
    labels_at  put the names on the lines at this x instead, without values
    """
    drawn = [_thinned(line) for line in series if len(line.x)]
    if not drawn:
        return ""
    x_low = x_min if x_min is not None else min(min(line.x) for line in drawn)
    x_high = x_max if x_max is not None else max(max(line.x) for line in drawn)
    if x_high <= x_low:
        x_high = x_low + 1
    ticks = nice_ticks(0.0, y_max if y_max is not None else max(max(line.y) for line in drawn))
    y_high = ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)
        return across, HEIGHT - _BOTTOM - min(y / y_high, 1.0) * (HEIGHT - _TOP - _BOTTOM)

    parts = [
        _heading(title, note),
        _y_axis(ticks, place(x_low, 0)[0], place, x_low),
        _x_axis(x_low, x_high, x_name, place),
    ]
    for line in sorted(drawn, key=lambda line: not line.faint):
        parts.append(_path(line, place, ends=labels_at is None))
    named = [line for line in drawn if not line.faint]
    parts.append(_end_labels(named, place, y_format) if labels_at is None else _line_labels(named, place, labels_at))
    hover = [
        {
            "name": line.name,
            "colour": line.colour,
            "points": [
                [round(value, 1) for value in place(x, y)] + [round(x, 4), y_format.format(y)]
                for x, y in zip(line.x, line.y, strict=True)
            ],
        }
        for line in drawn
        if not line.faint
    ]
    data = escape(json.dumps({"x": x_name, "top": _TOP, "bottom": HEIGHT - _BOTTOM, "lines": hover}), quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'data-lines="{data}">{"".join(parts)}<g class="readout"></g></svg>'
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


def _heading(title: str, note: str) -> str:
    words = f'<tspan class="note" dx="8">{escape(note)}</tspan>' if note else ""
    return f'<text class="title" x="0" y="16">{escape(title)}{words}</text>'


def _y_axis(ticks: Sequence[float], left: float, place: _Place, x_low: float) -> str:
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    if (ticks[1] - ticks[0]) * 10**decimals % 1 > 1e-6:
        decimals += 1
    parts = []
    for tick in ticks:
        y = place(x_low, tick)[1]
        kind = "base" if tick == 0 else "grid"
        text = "0" if tick == 0 else f"{tick:.{decimals}f}" if decimals <= 4 else f"{tick:.0e}".replace("e-0", "e-")
        parts.append(f'<line class="{kind}" x1="{left:.1f}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{left - 8:.1f}" y="{y + 4:.1f}">{text}</text>')
    return "".join(parts)


def _x_axis(low: float, high: float, name: str, place: _Place) -> str:
    span = nice_ticks(0.0, high - low, 5)
    pitch = span[1] if high - low < 5 and name != "epoch" else max(1.0, round(span[1]))
    if high - low <= 1:
        pitch = span[1]
    first = math.ceil(low / pitch - 1e-9) * pitch
    ticks = [first + pitch * index for index in range(int((high - first) / pitch + 1e-9) + 1)]
    y = HEIGHT - _BOTTOM + 18
    parts = [f'<text class="tick mid" x="{place(tick, 0)[0]:.1f}" y="{y}">{tick:g}</text>' for tick in ticks]
    parts.append(f'<text class="tick" x="{WIDTH - _RIGHT + 18}" y="{y}">{escape(name)}</text>')
    return "".join(parts)


def _path(line: Series, place: _Place, *, ends: bool) -> str:
    points = [place(x, y) for x, y in zip(line.x, line.y, strict=True)]
    commands = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for x, y in points[1:]:
        commands.append(f"L{x:.1f} {y:.1f}")
    colour = f"var(--series-{line.colour})"
    kind = "faint" if line.faint else "line"
    svg = f'<path class="{kind}" style="stroke:{colour}" d="{"".join(commands)}"/>'
    if line.faint or not ends:
        return svg
    dotted = points if line.dots and len(points) <= 40 else points[-1:]
    return svg + "".join(f'<circle style="fill:{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in dotted)


def _end_labels(lines: Sequence[Series], place: _Place, y_format: str) -> str:
    """Name and last value at the end of each line, pushed apart where they would overlap."""
    order = sorted(lines, key=lambda line: place(line.x[-1], line.y[-1])[1])
    positions = _spread([place(line.x[-1], line.y[-1])[1] for line in order], _TOP - 8, HEIGHT - _BOTTOM - 2)
    parts = []
    for line, y in zip(order, positions, strict=True):
        value = y_format.format(line.y[-1])
        end = place(line.x[-1], 0)[0]
        anchor = max(end, WIDTH - _RIGHT) + 10
        parts.append(
            f'<text class="label" x="{anchor:.1f}" y="{y + 4:.1f}" style="fill:var(--series-{line.colour})">'
            f'{escape(line.name)} <tspan class="value">{value}</tspan></text>'
        )
    return "".join(parts)


def _line_labels(lines: Sequence[Series], place: _Place, at: float) -> str:
    """Names above the lines where x is `at`."""
    points = []
    for line in lines:
        index = min(range(len(line.x)), key=lambda index: abs(line.x[index] - at))
        points.append((place(line.x[index], line.y[index]), line))
    points.sort(key=lambda pair: pair[0][1])
    heights = _spread([y - 7 for (_, y), _ in points], _TOP, HEIGHT - _BOTTOM - 7)
    return "".join(
        f'<text class="label" x="{x + 4:.1f}" y="{height:.1f}" style="fill:var(--series-{line.colour})">'
        f"{escape(line.name)}</text>"
        for ((x, _), line), height in zip(points, heights, strict=True)
    )


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
