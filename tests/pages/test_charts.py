"""Charts: ticks, binning, smoothing, and what is left out of the frame."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmrec_jax.pages.charts import (
    MAX_POINTS,
    Interval,
    Mark,
    Series,
    bin_points,
    choose_ticks,
    draw_difference,
    draw_histogram,
    draw_intervals,
    draw_lines,
    draw_radar,
    find_cap,
    format_number,
    smooth_points,
)

finite = st.floats(-1e9, 1e9, allow_nan=False).map(lambda value: 0.0 if abs(value) < 1e-9 else value)


@given(finite, finite)
def test_ticks_enclose_the_range_evenly_and_are_few(a, b):
    low, high = min(a, b), max(a, b)
    ticks = choose_ticks(low, high)
    slack = 1e-6 * (ticks[1] - ticks[0])
    assert 2 <= len(ticks) <= 7 and ticks[0] <= low + slack and ticks[-1] >= high - slack
    assert all(math.isclose(after - before, ticks[1] - ticks[0], rel_tol=1e-3) for before, after in itertools.pairwise(ticks))


@given(st.integers(1, 2000))
def test_bins_keep_the_mean_of_equal_bins_and_never_exceed_the_limit(count):
    points = [(float(x), float(x * x)) for x in range(count)]
    binned = bin_points(points)
    assert len(binned) == min(count, MAX_POINTS) and [x for x, _ in binned] == sorted(x for x, _ in binned)
    if count <= MAX_POINTS:
        assert binned == points
    if count % MAX_POINTS == 0:
        assert math.isclose(sum(y for _, y in binned) / len(binned), sum(y for _, y in points) / count)


def test_running_mean_keeps_constants_and_does_not_shift_a_slope():
    assert smooth_points([(x, 3.0) for x in range(9)], window=4) == [(x, 3.0) for x in range(9)]
    assert smooth_points([(x, float(x)) for x in range(9)], window=3)[1:-1] == [(x, float(x)) for x in range(1, 8)]
    assert smooth_points([(0, 1.0), (1, 5.0)], window=1) == [(0, 1.0), (1, 5.0)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.4123, "0.412"),
        (-0.31, "−0.31"),
        (1240.4, "1,240"),
        (1e-5, "1e−5"),
        (2.19e-6, "2.19e−6"),
        (-1e-5, "−1e−5"),
        (25e3, "25k"),
    ],
)
def test_format_number(value, text):
    assert format_number(value) == text


def test_a_first_step_that_compiles_is_left_out_of_frame_and_mean_and_said_to_be():
    values = [30.0] + [0.5] * 50
    assert find_cap(values) == pytest.approx(2.0) and find_cap(values[1:]) == math.inf and find_cap([1.0, 100.0]) == math.inf
    picture = str(draw_lines([Series("update", "grpo", range(51), values)], title="Time"))
    assert "↑ 1 beyond the frame, up to 30" in picture
    assert "update: 0.5 at step 1, about 0.5 at the end" in picture


@given(st.lists(st.one_of(st.none(), st.floats(width=32)), max_size=40), st.booleans())
def test_lines_draw_whatever_is_finite_inside_the_frame(values, share):
    values = [value if value is None or not math.isfinite(value) else max(-1e12, min(1e12, value)) for value in values]
    if share:
        values = [value if value is None or not math.isfinite(value) else abs(value) / 1e12 for value in values]
    picture = draw_lines([Series("a", "sft", range(len(values)), values)], title="t", share=share)
    if not any(value is not None and math.isfinite(value) for value in values):
        assert picture == ""
        return
    root = ElementTree.fromstring(picture)
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    for line in root.iter("polyline"):
        for x, y in (map(float, point.split(",")) for point in line.attrib["points"].split()):
            assert 0 <= x <= width and 0 <= y <= height
    assert "nan" not in picture and "inf" not in picture


def test_intervals_name_every_row_and_the_bound_and_escape_labels():
    rows = [Interval("Random", "floor", 0.1, 0.1, 0.1, hollow=True), Interval("<b>&a very long name", "other", 0.4, 0.35, 0.45)]
    picture = draw_intervals(rows, title="HR@1", bound=0.6)
    root = ElementTree.fromstring(picture)
    circles = {circle.attrib["class"]: float(circle.attrib["cx"]) for circle in root.iter("circle")}
    bound = next(line for line in root.iter("line") if line.attrib["class"] == "bound")
    assert circles["hollow ink-floor"] < circles["dot ink-other"] < float(bound.attrib["x1"])
    assert "<b>" not in picture and "oracle 0.600" in picture and len(re.findall("<title>", picture)) == 2
    assert draw_intervals([], title="HR@1", bound=0.6) == ""


def test_differences_share_one_scale_and_lie_on_their_side_of_zero():
    def places(*values):
        root = ElementTree.fromstring(draw_difference(*values, least=-0.1, most=0.3, ink="grpo"))
        zero, whisker = root.iter("line")
        return [
            float(zero.attrib["x1"]),
            float(whisker.attrib["x1"]),
            float(next(root.iter("circle")).attrib["cx"]),
            float(whisker.attrib["x2"]),
        ]

    above, below = places(0.2, 0.1, 0.3), places(-0.05, -0.1, -0.01)
    assert above == sorted(above) and above[0] == below[0]
    assert below[1] < below[2] < below[3] < below[0]


def parse(picture: str) -> ElementTree.Element:
    return ElementTree.fromstring(picture)


def test_a_histogram_has_a_bar_a_filled_bin_and_a_labelled_line_a_mark():
    marks = [Mark("inner", "sft", 0.6), Mark("outer <b>", "oracle", 0.9)]
    root = parse(draw_histogram([0.0, 0.25, 0.5, 0.75, 1.0], [3, 0, 8, 1], title="s <i>", ink="grpo", marks=marks))
    bars = [one for one in root.iter() if one.get("class", "").startswith("column")]
    assert len(bars) == 3
    heights = [float(bar.get("height", "0")) for bar in bars]
    assert heights[1] == max(heights) and math.isclose(heights[0] / heights[1], 3 / 8, rel_tol=0.02)
    lines = [one for one in root.iter() if one.get("class", "").startswith("mark")]
    assert [line.get("class") for line in lines] == ["mark ink-oracle", "mark ink-sft"]  # the outer one is the taller
    assert float(lines[0].get("y1", "0")) < float(lines[1].get("y1", "0"))
    assert "12 values" in root.get("aria-label", "") and "<i>" in root.get("aria-label", "")
    assert not draw_histogram([0.0], [], title="", ink="sft") and not draw_histogram([0.0, 1.0], [0], title="", ink="sft")
    assert draw_histogram([2.0, 2.0], [5], title="one value", ink="sft")


def test_a_radar_reaches_its_edge_at_the_highest_score_and_its_centre_at_the_lowest():
    axes = ["a", "b", "c", "d", "e"]
    root = parse(draw_radar(axes, [("low", "second", [1] * 5), ("high", "grpo", [5] * 5)], title="t", rings=[1, 2, 3, 4, 5]))
    areas = [one.get("points", "") for one in root.iter() if "area" in one.get("class", "")]
    low, high = ([tuple(map(float, point.split(","))) for point in area.split()] for area in areas)
    assert len(set(low)) == 1 and len(high) == 5
    distances = [math.dist(point, low[0]) for point in high]
    assert max(distances) - min(distances) < 0.2
    rings = [one for one in root.iter() if one.get("class") == "ring"]
    assert len(rings) == 4 and rings[-1].get("points") == areas[1]
    assert high[0][1] < low[0][1] and math.isclose(high[0][0], low[0][0])  # the first axis is at the top
