"""Charts: ticks, binning, smoothing, and what is left out of the frame."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmrec_jax.evaluate.charts import (
    MAX_POINTS,
    Interval,
    Series,
    bin_points,
    choose_ticks,
    draw_difference,
    draw_intervals,
    draw_lines,
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
