"""`mllmrec preprocess`: the stages in order. Each takes up where it stopped; a hash chains each stage's results to those before."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from PIL import Image

from mllmrec_jax.config import ConfigError, RunConfig, to_dict
from mllmrec_jax.data.atomic import write_file
from mllmrec_jax.data.splits import Window
from mllmrec_jax.preprocess import caption, embed, emit, gallery, mix, page, quality, score, traces
from mllmrec_jax.preprocess.backends.protocol import Pair, Request, ShownItem, check_backends
from mllmrec_jax.preprocess.backends.secrets import check_secrets
from mllmrec_jax.preprocess.folders import fill_folder, is_current
from mllmrec_jax.preprocess.hashes import Hashes
from mllmrec_jax.preprocess.leak_audit import LeakError, audit_traces, check_leaks
from mllmrec_jax.preprocess.refine_cot import find_profile, finish_trace
from mllmrec_jax.preprocess.runner import LocalRunner, Runner
from mllmrec_jax.preprocess.samples import Samples, load_samples
from mllmrec_jax.preprocess.store import Store, hash_content, hash_rows
from mllmrec_jax.preprocess.writing import Tally, WritingError, write_texts
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
    runner: Runner
    chain: dict[str, str] = dataclasses.field(default_factory=dict)
    """Stage to hash."""
    reports: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    captions: caption.Captions | None = None
    drafts: Sequence[str] = ()
    refined: Sequence[str] = ()
    traces: traces.Traces | None = None
    leaked: frozenset[int] = frozenset()
    vectors: embed.Vectors | None = None
    text_vectors: embed.Vectors | None = None
    """Of `embed.text_model`, where one is named."""
    scores: score.Scores | None = None
    kept: dict[str, dict[int, str]] = dataclasses.field(default_factory=dict)
    trainings: dict[str, gallery.Training] = dataclasses.field(default_factory=dict)

    def link(self, stage: Stage, results: Iterable[Any]) -> None:
        """Adds a stage to the chain: its hash covers its results, in order, and the stage before."""
        before = next(reversed(self.chain.values()), "")
        self.chain[stage] = hash_rows(results, _FORMAT, stage, before)


def _describe_tally(tally: Tally) -> dict[str, Any]:
    described: dict[str, Any] = {"wanted": tally.wanted, "found": tally.found, "done": tally.done}
    for name in ("usage", "usage_before", "unanswered", "reasons"):
        counts = {key: round(value, 6) if isinstance(value, float) else value for key, value in getattr(tally, name).items()}
        described[name] = dict(sorted(counts.items()))
    return described


def _run_caption(run: _Run) -> None:
    config = run.config.preprocess.caption
    store = run.open_store("caption")
    pictures = run.samples.pictures
    keys = Hashes(len(pictures.first))
    if config.enabled:
        writer = run.runner.open_writer(config.backend, config.model, run.config.preprocess)

        def list_requests() -> Iterable[Request]:
            for row, request in caption.list_requests(run.samples, config, writer, noun=run.config.prompt.noun):
                keys[row] = request.key
                yield request

        run.reports["caption"] = _describe_tally(write_texts(list_requests(), writer, store, description="caption"))
    run.captions = caption.Captions(run.samples, store, keys, config)
    run.link("caption", ([pictures.digests[row], store.get(key)["text"]] for row, key in enumerate(keys) if key))


def _run_pseudo_cot(run: _Run) -> None:
    config, store = run.config.preprocess, run.open_store("pseudo_cot")
    if config.pseudo_cot.enabled:
        writer = run.runner.open_writer(config.pseudo_cot.backend, config.pseudo_cot.model, config)
        tally, run.drafts = traces.write_pseudo(run.windows, run.samples, writer, store, noun=run.config.prompt.noun)
        run.reports["pseudo_cot"] = _describe_tally(tally)
    run.link("pseudo_cot", ([key, store.get(key)["text"]] for key in run.drafts))


def _run_refine_cot(run: _Run) -> None:
    assert run.captions is not None
    config, store = run.config.preprocess, run.open_store("refine_cot")
    if config.refine_cot.enabled:
        drafts = run.open_store("pseudo_cot")
        writer = run.runner.open_writer(config.refine_cot.backend, config.refine_cot.model, config)
        tally, run.refined = traces.write_refined(
            run.windows, run.drafts, drafts, run.samples, run.captions, writer, store, noun=run.config.prompt.noun
        )
        run.reports["refine_cot"] = _describe_tally(tally)
    run.link("refine_cot", ([key, store.get(key)["text"]] for key in run.refined))


def _run_sanitize(run: _Run) -> None:
    source = run.open_store("refine_cot" if run.refined else "pseudo_cot")
    tally, run.traces = traces.sanitise_traces(run.refined or run.drafts, source, run.samples, run.open_store("sanitize"))
    changes, examples = run.traces.count_changes()
    run.reports["sanitize"] = {**_describe_tally(tally), "changes": changes, "examples": examples}
    run.link("sanitize", map(run.traces.find, range(len(run.traces))))
    _audit(run, run.traces)


def _audit(run: _Run, found: traces.Traces) -> None:
    """The only code here that puts traces and targets side by side; what it finds can only take a trace out."""
    limits, items = run.config.preprocess.leaks, run.samples.dataset.items
    texts = (found.find(row) for row in track(range(len(found)), description="leak audit", unit="trace"))
    report = audit_traces(texts, (items[window.target] for window in run.windows[: len(found)]), fuzzy=limits.fuzzy)
    examples = [
        {
            **leak._asdict(),
            "user": run.windows[leak.row].user,
            "title": gallery.cut_text(items[leak.target].title, 200),
            **gallery.show_place(found.find(leak.row), leak.text),
        }
        for leak in report.examples
    ]
    run.reports["leak_audit"] = {"traces": report.traces, "leaking": len(report.leaking), "rate": report.rate, "kinds": dict(report.kinds)}
    run.reports["leak_audit"].update(ordinary_words=report.ordinary, examples=examples)
    # Before a prompt is written, `audit_prompts` refuses the title's words in any sense: such traces are left out, not failed on.
    titled = [row for row, window in enumerate(run.windows[: len(found)]) if mentions_title(found.find(row), items[window.target].title)]
    run.reports["leak_audit"]["left_out"] = len({*report.leaking, *titled})
    run.leaked = frozenset((*report.leaking, *titled))
    try:
        check_leaks(report, limits.max_rate)
    except LeakError as error:
        raise LeakError(f"{error}; {run.folder / 'report.html'} shows the first {len(examples)} places") from None


def _list_pairs(run: _Run) -> Iterable[Pair]:
    assert run.captions is not None
    for item in run.samples.list_items():
        picture = run.samples.find_picture(item.id)
        if picture is not None:
            yield Pair(picture, item.title, run.captions.find(item.id))


def _run_embed(run: _Run) -> None:
    embedder = run.runner.open_embedder(run.config.preprocess, _list_pairs(run), run.open_store, run.config.cache / "preprocess")
    vectors = run.vectors = embed.Vectors(embedder, run.open_store("vectors"), batch=run.runner.embed_batch)
    assert run.captions is not None
    identity, find_caption = [vectors.identity], run.captions.find
    rows = ([item.id, item.title, run.samples.pictures.find(item.id)] for item in run.samples.list_items())
    text_embedder = run.runner.open_text_embedder(run.config.preprocess)
    if text_embedder is not None:
        run.text_vectors = embed.Vectors(text_embedder, run.open_store("text_vectors"), batch=run.runner.embed_batch)
        rows = ([*row, find_caption(row[0])] for row in rows)
        identity.append(run.text_vectors.identity)
    content = {"stage": "embed", "key": hash_rows(rows, _FORMAT, identity)}
    folder = run.folder / "embeddings"
    if not is_current(folder, content):
        with fill_folder(folder, content) as scratch:
            embed.embed_items(run.samples, vectors, scratch, text_vectors=run.text_vectors, find_caption=find_caption)
    opened = [vectors, run.text_vectors] if run.text_vectors else [vectors]
    pictures = run.samples.pictures
    run.reports["embed"] = {"items": len(pictures.item_id), "pictures": pictures.count(), "done": sum(one.done for one in opened)}
    run.reports["embed"].update(truncated_texts=sum(one.truncated for one in opened), backends=identity)
    run.link("embed", [content["key"]])


def _run_score(run: _Run) -> None:
    assert run.traces is not None and run.vectors is not None
    items = score.load_vectors(run.folder / "embeddings")
    found = run.traces

    def read_profile(row: int) -> str:
        return find_profile(found.find(row)) if len(found) else ""

    profiles = run.text_vectors or run.vectors
    truncated = profiles.truncated
    scores = run.scores = score.score_windows(run.windows, read_profile, items, profiles)
    run.link("score", [hashlib.sha256(array.tobytes()).hexdigest() for array in scores])
    folder, content = run.folder / "scores", {"stage": "score", "key": run.chain["score"]}
    if not is_current(folder, content):
        with fill_folder(folder, content) as scratch:
            score.write_scores(scratch, run.windows, scores)
    quantiles = {name: np.quantile(array, [0, 0.1, 0.5, 0.9, 1]).tolist() for name, array in scores._asdict().items()}
    digests, is_held_out = run.samples.pictures.digests, run.vectors.is_held_out
    rows = itertools.islice((row for row, digest in enumerate(digests) if is_held_out(digest)), score.COMPARED)
    held_out = np.fromiter(rows, np.int64)
    agreement = score.measure_agreement(items.title[held_out], items.picture[held_out])
    run.reports["score"] = {"windows": len(run.windows), "quantiles": quantiles, "truncated_profiles": profiles.truncated - truncated}
    run.reports["score"].update(gallery.count_scores(scores))
    run.reports["score"]["agreement"] = gallery.choose_items(items.item_id, items.agreement, items.pictured)
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
        threshold = mixture.threshold if config.selection == "top" else None
        run.trainings[name] = gallery.Training(rows, rows[mixture.kept], threshold)
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


def _show_history(run: _Run, row: int) -> list[ShownItem]:
    """What a rater sees of a window."""
    assert run.captions is not None
    return [ShownItem(run.samples.dataset.items[item].title, run.captions.find(item)) for item in run.windows[row].history]


def _run_quality(run: _Run) -> None:
    """Rates what training would be shown: the first trace is masked as the refined one is."""
    config, found = run.config.preprocess, run.traces
    assert found is not None
    if not config.quality.samples or not len(found):
        return
    drafts = run.open_store("pseudo_cot")

    def is_usable(row: int) -> bool:
        return bool(found.find(row)) and (not run.drafts or bool(finish_trace(drafts.get(run.drafts[row])["text"])))

    rows, passed = quality.draw_rows(len(found), is_usable, samples=config.quality.samples, seed=config.quality.seed)
    texts: dict[quality.Kind, dict[int, str]] = {}
    if run.drafts:
        _, masked = traces.sanitise_traces([run.drafts[row] for row in rows], drafts, run.samples, run.open_store("sanitize"))
        texts["pseudo_cot"] = {row: masked.find(place) for place, row in enumerate(rows)}
    if run.refined:
        texts["refine_cot"] = {row: found.find(row) for row in rows}
    histories = {row: _show_history(run, row) for row in rows}
    writers = [run.runner.open_writer(rater.backend, rater.model, config) for rater in config.quality.raters]
    store = run.open_store("quality")
    report, ratings = quality.assess_quality(rows, texts, histories, writers, config.quality, store, noun=run.config.prompt.noun)
    run.reports["quality"] = {**report, "passed": passed}
    lines = [{"user": run.windows[rating["row"]].user, "position": run.windows[rating["row"]].position, **rating} for rating in ratings]
    write_file(run.folder / "ratings.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


_RUNNERS: dict[Stage, Callable[[_Run], None]] = {
    "caption": _run_caption,
    "pseudo_cot": _run_pseudo_cot,
    "refine_cot": _run_refine_cot,
    "sanitize": _run_sanitize,
    "embed": _run_embed,
    "score": _run_score,
    "mix": _run_mix,
    "emit": _run_emit,
    "quality": _run_quality,
}


def _show_examples(run: _Run) -> dict[str, Any]:
    """Items and windows for the page, of whatever stages ran."""
    samples, find_caption = run.samples, run.captions.find if run.captions is not None else lambda item: ""
    catalogue = gallery.Catalogue(
        lambda item: samples.dataset.items[item].title, find_caption, lambda item: bool(samples.pictures.find(item))
    )
    ends = run.reports.get("score", {}).get("agreement")
    if ends is None:
        items = [catalogue.describe(item) for item in gallery.spread_items(samples.pictures.item_id)]
        shown = [{"title": "Some items", "about": "evenly over the catalogue", "items": items}]
    else:
        shown = [
            {"title": title, "about": about, "items": [{**catalogue.describe(item), "cosine": cosine} for item, cosine in ends[name]]}
            for name, title, about in gallery.ENDS
        ]
    found = run.traces
    usable = [row not in run.leaked and bool(found.find(row)) for row in range(len(found))] if found is not None else []
    groups = gallery.choose_groups(run.scores.score if run.scores else None, np.array(usable, bool), run.trainings)
    windows = {row: _show_window(run, row, catalogue) for group in groups for row in group.rows}
    return {
        "gallery": [{"title": g.title, "about": g.about, "windows": [windows[row] for row in g.rows]} for g in groups],
        "catalogue": shown,
    }


def _show_window(run: _Run, row: int, catalogue: gallery.Catalogue) -> dict[str, Any]:
    assert run.traces is not None
    texts = {"refine_cot" if run.refined else "pseudo_cot": run.traces.find(row)}
    if run.refined and run.drafts:
        texts["pseudo_cot"] = run.open_store("pseudo_cot").get(run.drafts[row])["text"]
    return gallery.describe_window(row, run.windows[row], catalogue, texts, run.scores, run.trainings)


def _open_picture(samples: Samples, item: int) -> Image.Image:
    picture = samples.find_picture(item)
    if picture is None:
        raise ConfigError(f"item {item}: expected a picture, got none")
    return picture.open()


def _check(config: RunConfig) -> None:
    preprocess = config.preprocess
    traced = preprocess.pseudo_cot.enabled or preprocess.refine_cot.enabled
    if traced and (preprocess.mix.sft_fraction or preprocess.mix.grpo_fraction) and not config.prompt.reasoning:
        raise ConfigError(
            "prompt.reasoning: expected true, so that prompts show the traces kept (or preprocess.mix fractions of 0), got false"
        )
    quality.check_raters(preprocess.quality.raters)
    check_secrets(preprocess.openai)  # the report repeats the settings, whoever writes
    if config.data.split == "global_time":
        raise ConfigError("data.split: expected by_user, given or leave_one_out (the emitted data set has no times), got 'global_time'")


def run_preprocess(config: RunConfig, *, until: Stage = STAGES[-1], runner: Runner | None = None) -> dict[str, Any]:
    """Runs the stages up to `until`; what is finished, by this or any earlier run with the same cache, is not done again.

    Args:
      config: the data and what is done with them.
      until: last stage.
      runner: where the work is done; None: in this process.

    Returns:
      The report: what each stage did, outcomes of pictures, seconds. Written to `<output>/<name>/preprocess/report.json` as well.

    Raises:
      ConfigError, DataError, LeakError: with what was wrong, where, expected, got.
    """
    runner = runner or LocalRunner()
    _check(config)
    check_backends(config.preprocess, STAGES[: STAGES.index(until) + 1])
    folder = config.output / config.name / "preprocess"
    with contextlib.ExitStack() as stack:
        stores: dict[str, Store] = {}

        def open_store(name: str) -> Store:
            if name not in stores:
                stores[name] = stack.enter_context(Store(config.cache / "preprocess" / name))
            return stores[name]

        start = time.monotonic()
        samples = load_samples(config, open_store("images"), spread=runner.spread)
        run = _Run(config, samples, samples.list_windows(), folder, open_store, runner)
        seconds = {"load": time.monotonic() - start}
        report: dict[str, Any] = {"name": config.name, "pictures": samples.outcomes, "windows": len(run.windows)}
        report.update(settings=tomli_w.dumps(to_dict(config.preprocess)), page=str(folder / "report.html"))
        report.update(stages=run.reports, chain=run.chain, seconds=seconds)
        stage = STAGES[0]
        try:
            for stage in STAGES[: STAGES.index(until) + 1]:
                start = time.monotonic()
                try:
                    _RUNNERS[stage](run)
                except WritingError as error:
                    run.reports[stage] = _describe_tally(error.tally)
                    raise
                seconds[stage] = time.monotonic() - start
        except BaseException as error:
            report["stopped"] = {"stage": stage, "message": str(error) or type(error).__name__}
            raise
        finally:  # a run that a leak stopped says where
            report["damaged_lines"] = {name: store.damaged for name, store in stores.items() if store.damaged}
            report.update(_show_examples(run))
            write_file(folder / "report.json", (json.dumps(report, indent=2) + "\n").encode())
            page.write_page(folder / "report.html", report, lambda item: _open_picture(samples, item))
    return report
