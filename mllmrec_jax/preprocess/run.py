"""`mllmrec preprocess`: the stages in order. Each takes up where it stopped; a hash chains each stage's results to those before."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllmrec_jax.config import ConfigError, RunConfig, to_dict
from mllmrec_jax.data.atomic import write_file
from mllmrec_jax.data.splits import Window
from mllmrec_jax.preprocess import caption, embed, emit, mix, score, traces
from mllmrec_jax.preprocess.backends.protocol import Pair, Request, open_embedder, open_writer
from mllmrec_jax.preprocess.folders import fill_folder, is_current
from mllmrec_jax.preprocess.leak_audit import audit_traces, check_leaks
from mllmrec_jax.preprocess.refine_cot import find_profile
from mllmrec_jax.preprocess.samples import Samples, load_samples
from mllmrec_jax.preprocess.store import Store, hash_content
from mllmrec_jax.preprocess.writing import Tally, write_texts
from mllmrec_jax.preprocess_config import STAGES, Stage
from mllmrec_jax.progress import track
from mllmrec_jax.prompts import mentions_title

_FORMAT = 1


@dataclasses.dataclass
class _Run:
    """What stages hand on; the fields below `reports` are filled in the order of the stages."""

    config: RunConfig
    samples: Samples
    windows: list[Window]
    folder: Path
    """Outputs: embeddings, scores, emit, report.json."""
    open_store: Callable[[str], Store]
    chain: dict[str, str] = dataclasses.field(default_factory=dict)
    """Stage to hash."""
    reports: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    captions: caption.Captions | None = None
    drafts: Sequence[str] = ()
    refined: Sequence[str] = ()
    traces: traces.Traces | None = None
    leaked: frozenset[int] = frozenset()
    vectors: embed.Vectors | None = None
    scores: score.Scores | None = None
    kept: dict[str, dict[int, str]] = dataclasses.field(default_factory=dict)

    def link(self, stage: Stage, results: Iterable[Any]) -> None:
        """Adds a stage to the chain: its hash covers its results, in order, and the stage before."""
        before = next(reversed(self.chain.values()), "")
        digest = functools.reduce(hash_content, results, hash_content(_FORMAT, stage, before))
        self.chain[stage] = digest


def _describe_tally(tally: Tally) -> dict[str, Any]:
    return {"wanted": tally.wanted, "found": tally.found, "done": tally.done, "usage": dict(sorted(tally.usage.items()))}


def _run_caption(run: _Run) -> None:
    config = run.config.preprocess.caption
    store = run.open_store("caption")
    keys: dict[str, str] = {}
    if config.enabled:
        writer = open_writer(config.backend, config.model, run.config.preprocess)

        def list_requests() -> Iterable[Request]:
            for digest, request in caption.list_requests(run.samples, config, writer, noun=run.config.prompt.noun):
                keys[digest] = request.key
                yield request

        run.reports["caption"] = _describe_tally(write_texts(list_requests(), writer, store, description="caption"))
    run.captions = caption.Captions(run.samples, store, keys, config)
    run.link("caption", ([digest, store.get(key)["text"]] for digest, key in keys.items()))


def _run_pseudo_cot(run: _Run) -> None:
    config, store = run.config.preprocess, run.open_store("pseudo_cot")
    if config.pseudo_cot.enabled:
        tally, run.drafts = traces.write_pseudo(run.windows, run.samples, config, store, noun=run.config.prompt.noun)
        run.reports["pseudo_cot"] = _describe_tally(tally)
    run.link("pseudo_cot", ([key, store.get(key)["text"]] for key in run.drafts))


def _run_refine_cot(run: _Run) -> None:
    assert run.captions is not None
    config, store = run.config.preprocess, run.open_store("refine_cot")
    if config.refine_cot.enabled:
        drafts = run.open_store("pseudo_cot")
        tally, run.refined = traces.write_refined(
            run.windows, run.drafts, drafts, run.samples, run.captions, config, store, noun=run.config.prompt.noun
        )
        run.reports["refine_cot"] = _describe_tally(tally)
    run.link("refine_cot", ([key, store.get(key)["text"]] for key in run.refined))


def _run_sanitize(run: _Run) -> None:
    source = run.open_store("refine_cot" if run.refined else "pseudo_cot")
    tally, run.traces = traces.sanitise_traces(run.refined or run.drafts, source, run.samples, run.open_store("sanitize"))
    run.reports["sanitize"] = {**_describe_tally(tally), "changes": run.traces.count_changes()}
    run.link("sanitize", map(run.traces.find, range(len(run.traces))))
    _audit(run, run.traces)


def _audit(run: _Run, found: traces.Traces) -> None:
    """The only code here that puts traces and targets side by side; what it finds can only take a trace out."""
    limits, items = run.config.preprocess.leaks, run.samples.dataset.items
    texts = (found.find(row) for row in track(range(len(found)), description="leak audit", unit="trace"))
    report = audit_traces(texts, (items[window.target] for window in run.windows[: len(found)]), fuzzy=limits.fuzzy)
    examples = [{**leak._asdict(), "user": run.windows[leak.row].user} for leak in report.examples]
    run.reports["leak_audit"] = {"traces": report.traces, "leaking": len(report.leaking), "rate": report.rate, "kinds": dict(report.kinds)}
    run.reports["leak_audit"].update(ordinary_words=report.ordinary, examples=examples)
    # Before a prompt is written, `audit_prompts` refuses the title's words in any sense: such traces are left out, not failed on.
    titled = [row for row, window in enumerate(run.windows[: len(found)]) if mentions_title(found.find(row), items[window.target].title)]
    run.reports["leak_audit"]["left_out"] = len({*report.leaking, *titled})
    run.leaked = frozenset((*report.leaking, *titled))
    check_leaks(report, limits.max_rate)


def _list_pairs(run: _Run) -> Iterable[Pair]:
    assert run.captions is not None
    for item in run.samples.list_items():
        picture = run.samples.find_picture(item.id)
        if picture is not None:
            yield Pair(picture, item.title, run.captions.find(item.id))


def _run_embed(run: _Run) -> None:
    embedder = open_embedder(run.config.preprocess, list(_list_pairs(run)), run.open_store, run.config.cache / "preprocess")
    vectors = run.vectors = embed.Vectors(embedder, run.open_store("vectors"))
    items = [[item.id, item.title, run.samples.digests.get(item.id)] for item in run.samples.list_items()]
    content = {"stage": "embed", "key": hash_content(_FORMAT, vectors.identity, items)}
    folder = run.folder / "embeddings"
    if not is_current(folder, content):
        with fill_folder(folder, content) as scratch:
            embed.embed_items(run.samples, vectors, scratch)
    run.reports["embed"] = {"items": len(items), "pictures": len(run.samples.digests), "done": vectors.done, "backend": vectors.identity}
    run.link("embed", [content["key"]])


def _run_score(run: _Run) -> None:
    assert run.traces is not None and run.vectors is not None
    items = score.load_vectors(run.folder / "embeddings")
    found = run.traces

    def read_profile(row: int) -> str:
        return find_profile(found.find(row)) if len(found) else ""

    scores = run.scores = score.score_windows(run.windows, read_profile, items, run.vectors)
    run.link("score", [hashlib.sha256(array.tobytes()).hexdigest() for array in scores])
    folder, content = run.folder / "scores", {"stage": "score", "key": run.chain["score"]}
    if not is_current(folder, content):
        with fill_folder(folder, content) as scratch:
            score.write_scores(scratch, run.windows, scores)
    quantiles = {name: np.quantile(array, [0, 0.1, 0.5, 0.9, 1]).tolist() for name, array in scores._asdict().items()}
    held_out = [row for row, item in enumerate(items.item_id.tolist()) if run.vectors.is_held_out(run.samples.digests.get(item))]
    agreement = score.measure_agreement(items.title[held_out], items.picture[held_out])
    run.reports["score"] = {"windows": len(run.windows), "quantiles": quantiles}
    run.reports["score"]["held_out_agreement"] = None if agreement is None else agreement._asdict()


def _run_mix(run: _Run) -> None:
    assert run.traces is not None and run.scores is not None
    config, place = run.config.preprocess.mix, {window: row for row, window in enumerate(run.windows)}
    usable = np.zeros(len(run.windows), bool)
    for row in range(len(run.traces)):
        usable[row] = row not in run.leaked and bool(run.traces.find(row))
    report: dict[str, Any] = {"selection": config.selection}
    for name, windows, fraction in (("sft", run.samples.sft, config.sft_fraction), ("grpo", run.samples.grpo, config.grpo_fraction)):
        rows = np.array([place[window] for window in windows], np.int64)
        mixture = mix.choose_rows(run.scores.score[rows], usable[rows], fraction, selection=config.selection, seed=config.seed)
        chosen = rows[mixture.kept].tolist()
        run.kept[name] = {run.windows[row].user: run.traces.find(row) for row in chosen}
        report[name] = {"windows": len(rows), "usable": int(usable[rows].sum()), "kept": len(chosen), "threshold": mixture.threshold}
    run.reports["mix"] = report
    run.link("mix", ([name, sorted(kept.items())] for name, kept in run.kept.items()))


def _run_emit(run: _Run) -> None:
    assert run.captions is not None
    config = run.config
    # What files say counts, not where they lie; `emit_all` adds the tokenizer's hash.
    settings = [to_dict(dataclasses.replace(config.data, path=None, images=None)), to_dict(config.prompt), config.tokenizer.item_tokens]
    content = {
        "format": "mllmrec-preprocess",
        "version": _FORMAT,
        "dataset": run.samples.dataset.content_hash,
        "settings": hash_content(settings),
        "stages": dict(run.chain),
    }
    folder = run.folder / "emit"
    emit.emit_all(folder, run.samples, run.captions, run.kept["sft"], run.kept["grpo"], content, config)
    run.reports["emit"] = {"folder": str(folder)}


_RUNNERS: dict[Stage, Callable[[_Run], None]] = {
    "caption": _run_caption,
    "pseudo_cot": _run_pseudo_cot,
    "refine_cot": _run_refine_cot,
    "sanitize": _run_sanitize,
    "embed": _run_embed,
    "score": _run_score,
    "mix": _run_mix,
    "emit": _run_emit,
}


def _check(config: RunConfig) -> None:
    preprocess = config.preprocess
    traced = preprocess.pseudo_cot.enabled or preprocess.refine_cot.enabled
    if traced and (preprocess.mix.sft_fraction or preprocess.mix.grpo_fraction) and not config.prompt.reasoning:
        raise ConfigError(
            "prompt.reasoning: expected true, so that prompts show the traces kept (or preprocess.mix fractions of 0), got false"
        )
    if config.data.split == "global_time":
        raise ConfigError("data.split: expected by_user, given or leave_one_out (the emitted data set has no times), got 'global_time'")


def run_preprocess(config: RunConfig, *, until: Stage = "emit") -> dict[str, Any]:
    """Runs the stages up to `until`; what is finished, by this or any earlier run with the same cache, is not done again.

    Returns:
      The report: what each stage did, outcomes of pictures, seconds. Written to `<output>/<name>/preprocess/report.json` as well.

    Raises:
      ConfigError, DataError, LeakError: with what was wrong, where, expected, got.
    """
    _check(config)
    folder = config.output / config.name / "preprocess"
    with contextlib.ExitStack() as stack:
        stores: dict[str, Store] = {}

        def open_store(name: str) -> Store:
            if name not in stores:
                stores[name] = stack.enter_context(Store(config.cache / "preprocess" / name))
            return stores[name]

        start = time.monotonic()
        samples = load_samples(config, open_store("images"))
        run = _Run(config, samples, samples.list_windows(), folder, open_store)
        seconds = {"load": time.monotonic() - start}
        report: dict[str, Any] = {"pictures": samples.outcomes, "windows": len(run.windows)}
        report.update(stages=run.reports, chain=run.chain, seconds=seconds)
        try:
            for stage in STAGES[: STAGES.index(until) + 1]:
                start = time.monotonic()
                _RUNNERS[stage](run)
                seconds[stage] = time.monotonic() - start
        finally:  # a run that a leak stopped says where
            report["damaged_lines"] = {name: store.damaged for name, store in stores.items() if store.damaged}
            write_file(folder / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    return report
