"""Pictures with logarithmic axes: ticks enclose, places are right, the file is whole XML."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmrec_jax.pages.loglog import Line, Mark, choose_log_ticks, draw_loglog_panel, join_panels

POSITIVE = st.floats(1e-12, 1e15)


@given(POSITIVE, POSITIVE)
def test_ticks_enclose_the_values(one, other):
    low, high = sorted((one, other))
    ticks = choose_log_ticks(low, high)
    assert ticks[0] <= low * 1.001 and ticks[-1] >= high * 0.999
    assert ticks == sorted(ticks)


def test_equal_ratios_are_equal_distances():
    panel = draw_loglog_panel([Line("a", [(1, 1), (10, 10), (100, 100)], "#000")], title="t", x_label="x", y_label="y")
    found = re.search(r'polyline points="([^"]*)"', panel)
    assert found is not None
    (x0, y0), (x1, y1), (x2, y2) = (map(float, pair.split(",")) for pair in found[1].split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y1 < y0


def test_the_file_is_xml_with_every_name_escaped():
    mark = Mark("<b>&", 2, 3, "#000", hollow=True)
    panels = [draw_loglog_panel([], [mark, mark], title="a < b", x_label="x", y_label="y")] * 3
    root = ElementTree.fromstring(join_panels(panels, label='what "it" shows', columns=2))
    assert root.get("viewBox") == "0 0 760 640"
    assert "<b>&" in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("points", [[], [(0.0, 1.0)], [(1.0, -1.0)]])
def test_what_has_no_logarithm_is_refused(points):
    with pytest.raises(ValueError, match="positive"):
        draw_loglog_panel([Line("", points, "#000")], title="", x_label="", y_label="")
