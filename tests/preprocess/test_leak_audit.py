from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmrec_jax.data.records import Item
from mllmrec_jax.preprocess.leak_audit import LeakError, audit_traces, check_leaks
from mllmrec_jax.preprocess.sanitize import TitleIndex, sanitize_trace

HEAT, LOVE, LANTERN = Item(1, "Heat (1995)"), Item(2, "Love Story (1970)"), Item(7, "Quellbrook's Lantern, The (1988)")


@pytest.mark.parametrize(
    ("trace", "target", "kind"),
    [
        ("Next could be [ITEM_7] then.", LANTERN, "id"),
        ("Next could be item_7 then.", LANTERN, "id"),
        ("Next could be The Quellbrook's Lantern.", LANTERN, "exact"),
        ("Next could be Quellbrook's Lantern, The (1988).", LANTERN, "exact"),
        ("A Love Story is next.", LOVE, "exact"),
        ("next could be QUELLBROOKS—LANTERN then", LANTERN, "normalised"),
        ("next could be quellbrook's lantern then", LANTERN, "normalised"),
        ('Next could be "Heat".', HEAT, "exact"),
        ('Next could be "heat".', HEAT, "normalised"),
        ("Next could be the Quelbrook's Lantern.", LANTERN, "fuzzy"),
        ("Next could be the Quellbrook's Lanterns.", LANTERN, "fuzzy"),
    ],
)
def test_a_leak_is_found(trace: str, target: Item, kind: str) -> None:
    report = audit_traces([trace], [target])
    assert report.leaking == (0,) and report.rate == 1 and kind in report.kinds
    assert next(leak for leak in report.examples if leak.kind == kind).target == target.id


@pytest.mark.parametrize(
    ("trace", "target", "ordinary"),
    [
        ("In the heat of the moment they speed away.", HEAT, 1),
        ("A tender love story, and love stories again.", LOVE, 1),
        ("Next could be [ITEM_77] or [ITEM_1].", LANTERN, 0),
        ("A lantern in a brook: quell the fear.", LANTERN, 0),
        ("Next could be [title], near [id].", LANTERN, 0),
        ("", HEAT, 0),
    ],
)
def test_what_is_no_leak(trace: str, target: Item, ordinary: int) -> None:
    report = audit_traces([trace], [target])
    assert report == (1, (), {}, ordinary, ())
    check_leaks(report, 0.0)


def test_each_trace_is_read_against_its_own_target() -> None:
    traces = ["The Quellbrook's Lantern was seen before.", "The Quellbrook's Lantern may be next.", "Calm colours."]
    report = audit_traces(iter(traces), [HEAT, LANTERN, LANTERN])
    assert report.traces == 3 and report.leaking == (1,)
    check_leaks(report, 1 / 3)
    with pytest.raises(LeakError, match=r"expected at most 10.000% .* got 1 of 3 \(1 exact\); .* trace 1, target 7, exact"):
        check_leaks(report, 0.1)


def test_traces_and_targets_must_pair() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        audit_traces(["a", "b"], [HEAT])


def test_an_empty_audit_passes() -> None:
    report = audit_traces([], [])
    assert report.rate == 0
    check_leaks(report, 0.0)


def test_examples_are_bounded_and_counts_are_not() -> None:
    report = audit_traces(["The Quellbrook's Lantern."] * 150, [LANTERN] * 150)
    assert len(report.examples) == 100 and report.kinds == {"exact": 150} and len(report.leaking) == 150


@given(st.text(max_size=60), st.text(max_size=60), st.sampled_from(['"Heat"', "[ITEM_1]", "Heat (1995)", "*heat*"]))
def test_what_was_sanitised_does_not_leak(before: str, after: str, planted: str) -> None:
    index = TitleIndex([HEAT, LOVE, LANTERN])
    cleaned = sanitize_trace(f"{before} {planted} {after}", index).text
    assert not audit_traces([cleaned], [HEAT]).leaking


def test_likeness_is_a_choice() -> None:
    trace = ["Next could be the Quelbroks Lantrn."]
    assert not audit_traces(trace, [LANTERN], fuzzy=0.95).leaking
    assert audit_traces(trace, [LANTERN], fuzzy=0.8).leaking
