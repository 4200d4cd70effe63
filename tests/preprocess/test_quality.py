from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllmrec_jax.config import ConfigError, RunConfig
from mllmrec_jax.preprocess import quality
from mllmrec_jax.preprocess.backends.local import LocalWriter
from mllmrec_jax.preprocess.backends.local_rater import measure_form
from mllmrec_jax.preprocess.backends.protocol import Request, ShownItem, Unanswered, Written
from mllmrec_jax.preprocess.quality import RatedTrace, draw_rows, measure_agreement, rate_traces, summarise
from mllmrec_jax.preprocess.rating import DIMENSIONS, SCALES, RejectedError, make_rating_request, parse_rating
from mllmrec_jax.preprocess.run import run_preprocess
from mllmrec_jax.preprocess.store import Store
from mllmrec_jax.preprocess.writing import WritingError
from mllmrec_jax.preprocess_config import QualityConfig, RaterConfig

TRACE = (
    "Step 1: the pictures show a dark-blue night, a dark-blue sea.\n"
    "Step 2: they share dark-blue.\n"
    "Step 3: the newer ones show the sea.\n"
    "Step 4: next fits a dark-blue sea at night."
)
ITEMS = [ShownItem("Night Train", "a dark-blue night"), ShownItem("Deep", "a dark-blue sea with <b>waves</b>")]


def answer(score: Any = 3, evidence: Any = "they share dark-blue.", **changes: Any) -> dict[str, Any]:
    return {name: {"score": score, "evidence": evidence} for name in DIMENSIONS} | changes


class Rater:
    """Answers by a function of the request; counts what it was asked."""

    def __init__(self, reply: Callable[[Request], str | Unanswered]):
        self.reply, self.asked = reply, []

    def describe(self) -> dict[str, Any]:
        return {"backend": "test"}

    def write(self, requests: Iterable[Request]) -> Iterator[Written | Unanswered]:
        for request in requests:
            self.asked.append(request)
            text = self.reply(request)
            yield text if isinstance(text, Unanswered) else Written(request.key, text, {"answer tokens": 2})


def rate(rater: Rater, folder: Path, traces: list[RatedTrace], **changes: Any) -> quality.Answers:
    with Store(folder) as store:
        histories = {trace.row: ITEMS for trace in traces}
        return rate_traces(traces, histories, rater, store, QualityConfig(**changes), noun="movie", description="test")


def test_a_right_answer_is_read_whatever_its_white_space() -> None:
    text = "\n " + json.dumps(answer(5, "they\n share   dark-blue.")) + "\n"
    rated = parse_rating(text, TRACE, SCALES["1-5"])
    assert list(rated) == list(DIMENSIONS) and {one.score for one in rated.values()} == {5}
    assert rated["coherence"].evidence == "they share dark-blue."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("I would say: 4", "not JSON"),
        ("```json\n" + json.dumps(answer()) + "\n```", "not JSON"),
        (json.dumps(answer()) + "{}", "not JSON"),
        (json.dumps([answer()]), "not JSON"),
        ("[" * 100_000, "not JSON"),
        (json.dumps({**answer(), "overall": 4}), "keys"),
        (json.dumps({name: value for name, value in answer().items() if name != "sequence"}), "keys"),
        (json.dumps(answer(sequence=4)), "keys"),
        (json.dumps(answer(sequence={"score": 4, "evidence": TRACE, "why": ""})), "keys"),
        (json.dumps(answer())[:-1] + ', "sequence": {"score": 1, "evidence": "they share dark-blue."}}', "keys"),
        (json.dumps(answer(0)), "score"),
        (json.dumps(answer(6)), "score"),
        (json.dumps(answer(3.0)), "score"),
        (json.dumps(answer("3")), "score"),
        (json.dumps(answer(True)), "score"),
        (json.dumps(answer(float("nan"))), "score"),
        (json.dumps(answer(evidence="")), "evidence"),
        (json.dumps(answer(evidence="   dark   ")), "evidence"),
        (json.dumps(answer(evidence=None)), "evidence"),
        (json.dumps(answer(evidence="They share dark-blue.")), "evidence not in the trace"),
        (json.dumps(answer(evidence="they share dark-blue and red")), "evidence not in the trace"),
    ],
)
def test_anything_else_is_rejected_by_reason(text: str, reason: str) -> None:
    with pytest.raises(RejectedError) as rejected:
        parse_rating(text, TRACE, SCALES["1-5"])
    assert rejected.value.reason == reason


def test_the_coarse_scale_has_three_scores() -> None:
    assert parse_rating(json.dumps(answer(5)), TRACE, SCALES["1/3/5"])["sequence"].score == 5
    with pytest.raises(RejectedError, match="1, 3, 5"):
        parse_rating(json.dumps(answer(4)), TRACE, SCALES["1/3/5"])


def test_a_request_shows_history_and_trace_and_nothing_of_whose_it_is() -> None:
    request = make_rating_request(ITEMS, TRACE, LocalWriter(), scale=SCALES["1-5"], noun="movie", attempt=1, error=None)
    assert all(item.title in request.prompt for item in ITEMS) and TRACE.splitlines()[2] in request.prompt
    assert not [word for word in ("pseudo", "refine", "draft", "target", "user_id") if word in request.prompt.lower()]
    assert "<b>" not in request.prompt  # captions are catalogue text
    again = make_rating_request(
        ITEMS, TRACE, LocalWriter(), scale=SCALES["1-5"], noun="movie", attempt=2, error=RejectedError("keys", "no")
    )
    assert again.key != request.key and "Attempt 2" in again.prompt


def test_unreadable_answers_are_asked_for_again_and_given_up_at_last(tmp_path: Path) -> None:
    traces = [RatedTrace(0, "pseudo_cot", TRACE), RatedTrace(0, "refine_cot", TRACE.replace("sea", "lake"))]

    def reply(request: Request) -> str | Unanswered:
        if "lake" not in request.draft:
            return json.dumps(answer()) if "Attempt 2" in request.prompt else "4 of 5"
        return Unanswered(request.key, "truncated", "cut off", {}) if "Attempt" not in request.prompt else json.dumps(answer(9))

    rater = Rater(reply)
    given = rate(rater, tmp_path, traces)
    assert set(given.ratings) == {0} and given.given_up == 1
    assert given.rejected == {"not JSON": 1, "no answer": 1, "score": 2}
    assert len(rater.asked) == 5 and given.tally.done == 4 and given.tally.usage["answer tokens"] == 8
    again = Rater(reply)
    assert rate(again, tmp_path, traces).ratings == given.ratings
    assert len(again.asked) == 1  # the one without an answer, and no other, is paid for again


def test_a_rater_that_stops_is_an_error_and_what_it_gave_is_kept(tmp_path: Path) -> None:
    traces = [RatedTrace(row, "refine_cot", TRACE.replace("sea", word)) for row, word in enumerate(("sea", "lake", "moon"))]

    def stop(request: Request) -> str:
        if "lake" in request.draft:
            raise ConfigError("the server went away")
        return json.dumps(answer())

    with pytest.raises(WritingError, match="went away"):
        rate(Rater(stop), tmp_path, traces)
    rater = Rater(lambda request: json.dumps(answer()))
    assert len(rate(rater, tmp_path, traces).ratings) == 3
    assert 1 <= len(rater.asked) <= 3 and rater.asked[0].draft == traces[1].text


def test_the_sample_is_of_usable_rows_and_of_the_seed_alone() -> None:
    rows, passed = draw_rows(100, lambda row: row % 2 == 0, samples=20, seed=1)
    assert rows == sorted(set(rows)) and len(rows) == 20 and not [row for row in rows if row % 2] and passed > 0
    assert draw_rows(100, lambda row: row % 2 == 0, samples=20, seed=1) == (rows, passed)
    assert draw_rows(100, lambda row: row % 2 == 0, samples=20, seed=2)[0] != rows
    assert draw_rows(10, lambda row: row < 3, samples=20, seed=0) == ([0, 1, 2], 7)


def test_intervals_hold_the_mean_and_shrink_with_the_sample() -> None:
    rng = np.random.default_rng(0)
    few, many = (summarise(rng.integers(1, 6, (count, 5)).astype(float), resamples=300, seed=0) for count in (20, 2000))
    assert few is not None and many is not None
    for name in (*DIMENSIONS, "all"):
        assert few[name]["low"] <= few[name]["mean"] <= few[name]["high"]
        assert many[name]["high"] - many[name]["low"] < few[name]["high"] - few[name]["low"]
    assert summarise(np.zeros((0, 5)), resamples=10, seed=0) is None
    constant = summarise(np.full((7, 5), 4.0), resamples=50, seed=0)
    assert constant is not None and constant["all"] == {"mean": 4.0, "low": 4.0, "high": 4.0}


def test_agreement_by_known_answers() -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(1, 6, (400, 5)).astype(float)
    same = measure_agreement(np.stack([one, one]), SCALES["1-5"])
    assert {value["alpha"] for value in same.values()} == {1.0} and {value["difference"] for value in same.values()} == {0.0}
    chance = measure_agreement(np.stack([one, rng.permutation(one)]), SCALES["1-5"])
    assert all(abs(value["alpha"] or 0) < 0.15 and (value["difference"] or 0) > 1 for value in chance.values())
    shifted = measure_agreement(np.stack([np.minimum(one, 4), np.minimum(one, 4) + 1]), SCALES["1-5"])
    assert {value["difference"] for value in shifted.values()} == {1.0}
    one[:, 0] = 3  # both always say 3: there is nothing to agree on
    assert measure_agreement(np.stack([one, one]), SCALES["1-5"])["faithfulness"] == {"difference": 0.0, "alpha": None}
    holes = one.copy()
    holes[5:] = np.nan
    assert measure_agreement(np.stack([one, holes]), SCALES["1-5"])["sequence"]["alpha"] == 1.0


def test_the_local_rater_measures_form() -> None:
    def shares(trace: str, items: list[ShownItem] = ITEMS) -> dict[str, float]:
        request = make_rating_request(items, trace, LocalWriter(), scale=SCALES["1-5"], noun="movie", attempt=1, error=None)
        written = next(iter(LocalWriter().write([request])))
        assert isinstance(written, Written)
        parse_rating(written.text, trace, SCALES["1-5"])  # it answers as it must
        return {name: share for name, (share, _) in measure_form(request).items()}

    base = shares(TRACE)
    assert all(0 <= share <= 1 for share in base.values())
    assert shares(TRACE.replace("a dark-blue sea.", "castles, dragons, wizards."))["faithfulness"] < base["faithfulness"]
    assert shares(TRACE.replace("dark-blue", "some").replace("sea", "thing"))["visual_detail"] < base["visual_detail"]
    assert shares(TRACE.replace("they share dark-blue", "robots, spaceships, lasers"))["coherence"] < base["coherence"]
    assert base["sequence"] == 1 and shares(TRACE.replace("newer ones show the sea", "choices are dark-blue"))["sequence"] == 0
    assert shares(TRACE.replace("a dark-blue sea at night", "anything"))["specificity"] < base["specificity"]
    assert shares(TRACE, [ShownItem("")])["visual_detail"] == 0


def with_quality(config: RunConfig, **changes: Any) -> RunConfig:
    changed = dataclasses.replace(config.preprocess, quality=QualityConfig(bootstrap=50, **changes))
    return dataclasses.replace(config, preprocess=changed)


def test_the_stage_rates_both_traces_and_is_not_done_twice(config: RunConfig) -> None:
    config = with_quality(config, samples=8)
    report = run_preprocess(config)["stages"]["quality"]
    assert report["windows"] == 8 and set(report["means"]) == {"pseudo_cot", "refine_cot"} and report["done"] > 0
    assert report["raters"][0]["name"] == "local (form only)" and report["raters"][0]["given_up"] == 0
    assert report["difference"] is not None and report["agreement"] is None
    lines = (config.output / config.name / "preprocess" / "ratings.jsonl").read_text().splitlines()
    assert len(lines) == 16 and all(len(json.loads(line)["ratings"]) == 5 for line in lines)
    again = run_preprocess(config)["stages"]["quality"]
    assert again["done"] == 0 and again["means"] == report["means"]


def test_the_stage_changes_nothing_that_training_reads_and_can_be_off(config: RunConfig) -> None:
    off = run_preprocess(with_quality(config, samples=0))
    assert "quality" not in off["stages"]
    manifest = (config.output / config.name / "preprocess" / "emit" / "manifest.json").read_bytes()
    assert run_preprocess(with_quality(config, samples=5))["chain"] == off["chain"]
    assert (config.output / config.name / "preprocess" / "emit" / "manifest.json").read_bytes() == manifest


def test_one_trace_alone_has_no_difference(config: RunConfig) -> None:
    config = with_quality(config, samples=4)
    alone = dataclasses.replace(config.preprocess, refine_cot=dataclasses.replace(config.preprocess.refine_cot, enabled=False))
    report = run_preprocess(dataclasses.replace(config, preprocess=alone))["stages"]["quality"]
    assert set(report["means"]) == {"pseudo_cot"} and report["difference"] is None


def test_the_same_rater_twice_is_refused(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="expected one rater or several different ones, got local"):
        run_preprocess(with_quality(config, raters=(RaterConfig(), RaterConfig())))
