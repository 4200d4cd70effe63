"""Stage 9: a sample of traces rated on five dimensions by one rater or several, the first trace and the refined one of the same windows.

A rater gets one trace at a time, in the order of the requests' hashes, and nothing that tells which of the two it is. An answer that is no
rating is counted by what was wrong with it and asked for again, up to `attempts` times; nothing in it is mended or guessed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import krippendorff
import numpy as np

from mllmrec_jax.config import ConfigError
from mllmrec_jax.preprocess.backends.protocol import Request, ShownItem, Writer
from mllmrec_jax.preprocess.rating import DIMENSIONS, SCALES, Dimension, Rated, RejectedError, make_rating_request, parse_rating
from mllmrec_jax.preprocess.store import Store
from mllmrec_jax.preprocess.writing import Tally, WritingError, write_texts
from mllmrec_jax.preprocess_config import QualityConfig, RaterConfig

Kind = Literal["pseudo_cot", "refine_cot"]


class RatedTrace(NamedTuple):
    """A trace to rate: of which row of the windows, which of the two, and its text."""

    row: int
    kind: Kind
    text: str


@dataclasses.dataclass
class Answers:
    """What one rater gave: ratings by place of the trace, answers rejected by reason, traces given up, and the work."""

    ratings: dict[int, dict[Dimension, Rated]] = dataclasses.field(default_factory=dict)
    rejected: Counter[str] = dataclasses.field(default_factory=Counter)
    given_up: int = 0
    tally: Tally = dataclasses.field(default_factory=Tally)


def name_rater(rater: RaterConfig) -> str:
    """How reports call a rater: `local` says that it measures form alone."""
    return "local (form only)" if rater.backend == "local" else f"{rater.backend} {rater.model}".strip()


def draw_rows(count: int, is_usable: Callable[[int], bool], *, samples: int, seed: int) -> tuple[list[int], int]:
    """Rows drawn by `seed` until `samples` of `count` are usable or none is left, ascending; and how many unusable ones were met."""
    kept: list[int] = []
    passed = 0
    for row in np.random.default_rng([seed & 0xFFFFFFFF, 9]).permutation(count).tolist():
        if len(kept) == samples:
            break
        if is_usable(row):
            kept.append(row)
        else:
            passed += 1
    return sorted(kept), passed


def _ask(requests: Sequence[Request], writer: Writer, store: Store, description: str) -> Tally:
    """As `write_texts`, but single requests may stay unanswered (a text cut off or refused); a rater that stopped is an error still."""
    try:
        return write_texts(requests, writer, store, description=description)
    except WritingError as error:
        if len({request.key for request in requests if request.key not in store}) > sum(error.tally.unanswered.values()):
            raise
        return error.tally


def rate_traces(
    traces: Sequence[RatedTrace],
    histories: Mapping[int, Sequence[ShownItem]],
    writer: Writer,
    store: Store,
    config: QualityConfig,
    *,
    noun: str,
    description: str,
) -> Answers:
    """Has one rater rate every trace; answers are kept in `store` by request, the attempt and the complaint among what the key covers.

    Args:
      traces: what to rate.
      histories: of each row, as raters see it.
      writer: the rater.
      store: of all answers, readable or not.
      config: scale and attempts.
      noun: what an item is called.
      description: names the rater in progress lines.
    """
    scale = SCALES[config.scale]
    answers = Answers()
    pending: dict[int, RejectedError | None] = dict.fromkeys(range(len(traces)))
    for attempt in range(1, config.attempts + 1):
        asked: dict[int, Request] = {}
        for place, error in pending.items():
            trace = traces[place]
            asked[place] = make_rating_request(
                histories[trace.row], trace.text, writer, scale=scale, noun=noun, attempt=attempt, error=error
            )
        ordered = sorted(asked.values(), key=lambda request: request.key)
        done = _ask(ordered, writer, store, description)
        answers.tally.wanted += done.wanted
        answers.tally.found += done.found
        answers.tally.done += done.done
        answers.tally.usage.update(done.usage)
        pending = {}
        for place, request in asked.items():
            try:
                if request.key not in store:
                    raise RejectedError("no answer", "there was none")
                answers.ratings[place] = parse_rating(store.get(request.key)["text"], traces[place].text, scale)
            except RejectedError as error:
                answers.rejected[error.reason] += 1
                pending[place] = error
        if not pending:
            break
    answers.given_up = len(pending)
    return answers


def stack_scores(traces: Sequence[RatedTrace], answers: Sequence[Answers], rows: Sequence[int], kinds: Sequence[Kind]) -> np.ndarray:
    """Scores [raters, kinds, rows, dimensions] float64, NaN where a rating was given up."""
    scores = np.full((len(answers), len(kinds), len(rows), len(DIMENSIONS)), np.nan)
    places = {row: place for place, row in enumerate(rows)}
    for rater, given in enumerate(answers):
        for place, rating in given.ratings.items():
            trace = traces[place]
            scores[rater, kinds.index(trace.kind), places[trace.row]] = [rating[name].score for name in DIMENSIONS]
    return scores


def _mean_of_raters(scores: np.ndarray) -> np.ndarray:
    """[rows, dimensions] out of [raters, rows, dimensions]: the mean over the raters that rated, rows without any left out."""
    counts = (~np.isnan(scores)).sum(axis=0)
    sums = np.nansum(scores, axis=0)
    rated = counts.all(axis=1)
    return sums[rated] / counts[rated]


def summarise(values: np.ndarray, *, resamples: int, seed: int) -> dict[str, dict[str, float]] | None:
    """Mean and 95% bootstrap interval by dimension, and of their mean (`all`); values [rows, dimensions], None where there are no rows."""
    if not len(values):
        return None
    values = np.concatenate([values, values.mean(axis=1, keepdims=True)], axis=1)
    rng = np.random.default_rng(seed & 0xFFFFFFFF)
    drawn = np.stack([values[rng.integers(len(values), size=len(values))].mean(axis=0) for _ in range(resamples)])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    names = (*DIMENSIONS, "all")
    return {
        name: {"mean": float(values[:, column].mean()), "low": float(low[column]), "high": float(high[column])}
        for column, name in enumerate(names)
    }


def measure_agreement(scores: np.ndarray, scale: Sequence[int]) -> dict[str, dict[str, float | None]]:
    """How raters agree by dimension, over the traces that at least two of them rated; scores [raters, traces, dimensions].

    `difference` is the mean absolute difference of two raters' scores; `alpha` is Krippendorff's for ordinal scores: 1 where they agree, 0
    where they agree as chance would, None where all gave one and the same score, so that there is nothing to agree on.
    """
    agreement: dict[str, dict[str, float | None]] = {}
    domain = [float(score) for score in scale]
    for column, name in enumerate(DIMENSIONS):
        given = scores[:, :, column]
        pairs = [np.abs(given[a] - given[b]) for a in range(len(given)) for b in range(a + 1, len(given))]
        apart = np.concatenate(pairs) if pairs else np.array([])
        apart = apart[~np.isnan(apart)]
        shared = given[:, (~np.isnan(given)).sum(axis=0) > 1]
        varied = len(np.unique(shared[~np.isnan(shared)])) > 1
        alpha = float(krippendorff.alpha(shared, value_domain=domain, level_of_measurement="ordinal")) if varied else None
        agreement[name] = {"difference": float(apart.mean()) if len(apart) else None, "alpha": alpha}
    return agreement


def check_raters(raters: Sequence[RaterConfig]) -> None:
    """Refuses a rater that is there twice, and none at all.

    Raises:
      ConfigError: so it is.
    """
    names = [name_rater(rater) for rater in raters]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"preprocess.quality.raters: expected one rater or several different ones, got {', '.join(names) or 'none'}")


def assess_quality(
    rows: Sequence[int],
    texts: Mapping[Kind, Mapping[int, str]],
    histories: Mapping[int, Sequence[ShownItem]],
    writers: Sequence[Writer],
    config: QualityConfig,
    store: Store,
    *,
    noun: str,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rates the traces of `rows` with every rater.

    Args:
      rows: the sample.
      texts: kind to the trace of each row, as training would show it.
      histories: of each row, as raters see it.
      writers: one a rater of `config.raters`.
      config: raters and settings.
      store: of answers.
      noun: what an item is called.

    Returns:
      The report (means by kind, differences of refined minus first by dimension over the same windows, each rater's means, agreement), and
      every rating: row, kind, rater, and by dimension score and evidence.
    """
    kinds, scale = list(texts), SCALES[config.scale]
    names = [name_rater(rater) for rater in config.raters]
    traces = [RatedTrace(row, kind, texts[kind][row]) for row in rows for kind in kinds]
    answers = [
        rate_traces(traces, histories, writer, store, config, noun=noun, description=f"quality, {name}")
        for writer, name in zip(writers, names, strict=True)
    ]
    scores = stack_scores(traces, answers, rows, kinds)

    def describe(values: np.ndarray) -> dict[str, dict[str, float]] | None:
        return summarise(values, resamples=config.bootstrap, seed=config.seed)

    raters = [
        {
            "name": name,
            "wanted": given.tally.wanted,
            "found": given.tally.found,
            "done": given.tally.done,
            "usage": dict(sorted(given.tally.usage.items())),
            "rejected": dict(sorted(given.rejected.items())),
            "given_up": given.given_up,
            "means": {kind: describe(_mean_of_raters(scores[[place], row])) for row, kind in enumerate(kinds)},
        }
        for place, (name, given) in enumerate(zip(names, answers, strict=True))
    ]
    work = {name: sum(rater[name] for rater in raters) for name in ("wanted", "found", "done")}
    report: dict[str, Any] = {
        **work,
        "usage": dict(sorted(sum((given.tally.usage for given in answers), Counter()).items())),
        "windows": len(rows),
        "scale": list(scale),
        "raters": raters,
        "means": {kind: describe(_mean_of_raters(scores[:, row])) for row, kind in enumerate(kinds)},
        "difference": describe(_mean_of_raters(scores[:, 1] - scores[:, 0])) if len(kinds) == 2 else None,
        "agreement": measure_agreement(scores.reshape(len(names), -1, len(DIMENSIONS)), scale) if len(names) > 1 else None,
    }
    ratings = [
        {
            "row": traces[place].row,
            "kind": traces[place].kind,
            "rater": name,
            "ratings": {dimension: rated._asdict() for dimension, rated in rating.items()},
        }
        for name, given in zip(names, answers, strict=True)
        for place, rating in sorted(given.ratings.items())
    ]
    return report, ratings
