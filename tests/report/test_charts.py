from __future__ import annotations

import itertools
import json
import re
from html import unescape
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refinedet.pipeline.report.charts import Series, line_chart, nice_ticks, share_bar, smoothed

finite = st.floats(1e-6, 1e9, allow_nan=False)


@given(finite)
def test_ticks_are_few_round_and_reach_the_top(high):
    ticks = nice_ticks(0.0, high)
    assert ticks[0] == 0
    assert ticks[-1] >= high * (1 - 1e-9)
    assert ticks[-2] < high
    assert 2 <= len(ticks) <= 6


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.integers(1, 10))
def test_smoothing_stays_within_the_values(values, window):
    result = smoothed(values, window)
    assert len(result) == len(values)
    assert min(values) - 1e-6 <= min(result) <= max(result) <= max(values) + 1e-6


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=20))
def test_a_chart_is_xml_whatever_it_shows(points):
    points = sorted(points)
    svg = line_chart("Loss <&>", [Series('a "b" <c>', [x for x, _ in points], [y for _, y in points])], note="n & m")
    assert ElementTree.fromstring(svg).tag == "div"


def test_a_long_line_is_thinned_but_ends_where_it_ended():
    svg = line_chart("Loss", [Series("total", range(40_001), [0.5] * 40_000 + [0.9])])
    lines = json.loads(unescape(re.search(r'data-lines="([^"]*)"', svg).group(1)))["lines"]
    assert len(lines[0]["points"]) <= 401
    assert lines[0]["points"][-1][2:] == [40_000, "0.9"]


def test_labels_that_would_overlap_are_pushed_apart():
    svg = line_chart("Loss", [Series(name, [0, 1], [1.0, 0.5]) for name in "abcde"])
    for drawing in svg.split("<svg")[1:]:
        heights = sorted(float(y) for y in re.findall(r'class="label" x="[^"]*" y="([^"]*)"', drawing))
        assert len(heights) == 5
        assert all(second - first >= 12 for first, second in itertools.pairwise(heights))


@pytest.mark.parametrize("series", [[], [Series("a", [], [])]])
def test_nothing_to_show_is_no_chart(series):
    assert line_chart("Loss", series) == ""


def test_shares_add_up_to_the_whole():
    html = share_bar([("forward", 3, "3 s"), ("backward", 1, "1 s"), ("idle", 0, "0 s")], label="time")
    shares = [float(share) for share in re.findall(r"flex:([0-9.]+)", html)]
    assert shares == [0.75, 0.25]
    assert "75.0 %" in html
    assert share_bar([("idle", 0, "0 s")], label="time") == ""


def test_labels_at_the_top_lie_below_the_note_under_the_title():
    chart = line_chart("T", [Series(f"line {number}", [0, 1], [1.0, 1.0]) for number in range(4)], note="long")
    narrow = chart.partition('class="chart narrow"')[2]
    note = float(re.search(r'class="note" x="0" y="(\d+)"', narrow).group(1))
    labels = [float(y) for y in re.findall(r'class="label" x="[\d.]+" y="([\d.]+)"', narrow)]
    assert len(labels) == 4
    assert min(labels) - 12 > note, "12 units are the height of a letter"
