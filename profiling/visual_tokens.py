"""What pictures cost as tokens: prompts with titles, with captions, and with 196 visual tokens a picture, as history and candidates grow.

    python profiling/visual_tokens.py [--tokenizer FOLDER] [--out profiling/results/visual_tokens_cpu.json] [--plot docs/visual-tokens.svg]

Text prompts are rendered and tokenised for real: posterworld's titles, and the captions that the preprocessing backend `local` measures of
its posters. A visual prompt is the prompt with titles, and 196 tokens for every item shown (a 224 x 224 picture in 16 x 16 patches); what
the vision encoder itself costs is left out. --tokenizer is a Hugging Face folder; without it a BPE is trained on posterworld. FLOPs are
formulas (`mllmrec_jax.bench.flops`), of the small model that is timed and of Qwen3-4B. Timed are prefill and GRPO update of the small
model on random tokens of the prompt's length, up to --max-tokens; longer prompts have tokens and FLOPs alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from mllmrec_jax.bench.flops import Sizes, count_prefill, count_update, sum_work
from mllmrec_jax.bench.grpo_work import GrpoWork
from mllmrec_jax.bench.measure import find_percentiles, read_clocks, repeat_runs, time_call
from mllmrec_jax.bench.rows import make_document, write_document
from mllmrec_jax.bench.work import call_phase, compile_phase
from mllmrec_jax.config import GrpoConfig, LoraConfig, ModelConfig, PosterworldConfig, PromptConfig, RunConfig, TokenizerConfig
from mllmrec_jax.data.posters import render_poster
from mllmrec_jax.data.posterworld import build_world
from mllmrec_jax.data.tokenizer import Tokenizer, load_tokenizer
from mllmrec_jax.pages.loglog import COLOURS, Line, draw_loglog_panel, join_panels
from mllmrec_jax.plan.models import resolve_model
from mllmrec_jax.preprocess.backends.measures import describe_measures, measure_image
from mllmrec_jax.prompts import ItemText, PromptInput, list_wording, render_prompt
from mllmrec_jax.train.state import merge_policy

VISUAL_TOKENS = 196
KINDS = ("titles", "captions", "pictures")
HISTORIES, CANDIDATES = (1, 2, 4, 8, 16), (5, 10, 20, 50, 100)
USUAL_HISTORY, USUAL_CANDIDATES = 8, 10
PROMPTS = 16
"""Drawn for each length; the mean counts."""
MODEL = ModelConfig(
    num_layers=2, hidden_size=64, intermediate_size=192, num_heads=2, num_kv_heads=1, head_dim=32, max_position=65_536, dtype="float32",
    param_dtype="float32", remat="full",
)  # fmt: skip
GRPO = GrpoConfig(batch_size=1, accumulation=1, group_size=8, max_new_tokens=16, lora=LoraConfig(rank=8), reuse_rollout=False)
SMALL_VOCABULARY = 1024


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Items as prompts show them: with titles, and with captions behind the titles."""

    titles: tuple[ItemText, ...]
    captions: tuple[ItemText, ...]


def make_catalogue(items: int) -> Catalogue:
    """Posterworld's titles, and captions measured of its posters."""
    world = build_world(PosterworldConfig(items=items, users=1, min_length=2, max_length=2))
    captions = []
    for row, title in enumerate(world.titles):
        poster = render_poster(title, int(world.palette[row]), int(world.shape[row]), seed=(0, row))
        captions.append(describe_measures(measure_image(Image.open(io.BytesIO(poster)).convert("RGB"))))
    titles = tuple(ItemText(row + 1, title) for row, title in enumerate(world.titles))
    return Catalogue(titles, tuple(ItemText(item.id, item.title, text) for item, text in zip(titles, captions, strict=True)))


def open_tokenizer(folder: Path | None, catalogue: Catalogue, cache: Path) -> Tokenizer:
    """The one in `folder`, or a BPE trained on titles, captions and the prompts' wording."""
    if folder is not None:
        return load_tokenizer(TokenizerConfig(kind="huggingface", path=folder, item_tokens=False), item_ids=())
    texts = [item.title for item in catalogue.titles] + [item.detail for item in catalogue.captions] + list(list_wording(PromptConfig()))
    return load_tokenizer(TokenizerConfig(vocab_size=SMALL_VOCABULARY, item_tokens=False), item_ids=(), texts=texts, cache=cache)


def count_tokens(tokenizer: Tokenizer, catalogue: Catalogue, history: int, candidates: int, *, seed: int = 0) -> dict[str, int]:
    """Mean tokens of prompts of `history` and `candidates` random items, by kind, rounded."""
    rng = np.random.default_rng([seed, history, candidates])
    counts: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for _ in range(PROMPTS):
        rows = rng.choice(len(catalogue.titles), history + candidates, replace=False)
        for kind, items in (("titles", catalogue.titles), ("captions", catalogue.captions)):
            shown = [items[row] for row in rows]
            prompt = render_prompt(PromptInput(tuple(shown[:history]), tuple(shown[history:])), PromptConfig())
            counts[kind].append(len(tokenizer.encode_prompt(prompt)[0]))
        counts["pictures"].append(counts["titles"][-1] + VISUAL_TOKENS * (history + candidates))
    return {kind: round(float(np.mean(found))) for kind, found in counts.items()}


def count_flops(config: RunConfig, prompt_tokens: int) -> dict[str, float]:
    """Executed FLOPs of one prompt's prefill and of its update."""
    sizes = Sizes(1, prompt_tokens, config.grpo.group_size, config.grpo.max_new_tokens, config.tokenizer.vocab_size)
    update = sum_work(count_update(config.model, sizes, config.grpo, config.logprob))
    return {"prefill": count_prefill(config.model, sizes, lora=config.grpo.lora).flops, "update": update.flops}


def time_work(config: RunConfig, prompt_tokens: int, *, repeats: int) -> dict[str, dict[str, float]]:
    """p20, p50 and p80 (seconds) of prefill and update on fresh random tokens."""
    sizes = Sizes(1, prompt_tokens, config.grpo.group_size, config.grpo.max_new_tokens, config.tokenizer.vocab_size)
    work = GrpoWork(config, sizes, steps=repeats + 1)
    prompts = work.draw_prompts(0)

    def fill(trained: Any, frozen: Any, prompt: jax.Array, length: jax.Array) -> Any:
        return merge_policy(work.policy._replace(frozen=frozen), trained).prefill(prompt, length)

    lora = config.grpo.lora
    arguments = work.rollout_arguments(prompts)[:-1]
    prefill = compile_phase(jax.jit(fill), *arguments, work=count_prefill(config.model, sizes, lora=lora), bytes_too=False)
    update = work.compile_update(prompts, work.draw_completions(), bytes_too=False)

    def run(repeat: int) -> dict[str, float]:
        prompts = work.draw_prompts(repeat)
        prefill_s, _ = time_call(call_phase, prefill, work.rollout_arguments(prompts)[:-1])
        arguments = jax.block_until_ready(work.update_arguments(prompts, work.draw_completions()))
        update_s, result = time_call(call_phase, update, arguments)
        work.take_update(result)
        return {"prefill": prefill_s, "update": update_s}

    measured = repeat_runs(run, warmup=1, repeats=repeats, description=f"{prompt_tokens} tokens")
    return {name: find_percentiles(seconds) for name, seconds in measured.items()}


def make_config() -> RunConfig:
    """The small model that is timed."""
    return RunConfig(name="visual_tokens", model=MODEL, tokenizer=TokenizerConfig(vocab_size=SMALL_VOCABULARY), grpo=GRPO)


def measure_costs(
    tokenizer: Tokenizer,
    catalogue: Catalogue,
    *,
    histories: tuple[int, ...] = HISTORIES,
    candidates: tuple[int, ...] = CANDIDATES,
    max_tokens: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """One row a kind and a size; `grows` says along which of the two curves it lies."""
    small, large = make_config(), resolve_model("Qwen3-4B")
    large = dataclasses.replace(large, grpo=dataclasses.replace(GRPO, max_new_tokens=128, lora=LoraConfig(rank=16)))
    timed: dict[int, dict[str, dict[str, float]]] = {}
    rows = []
    points = [("history", n, USUAL_CANDIDATES) for n in histories] + [("candidates", USUAL_HISTORY, n) for n in candidates]
    for grows, history, shown in points:
        for kind, tokens in count_tokens(tokenizer, catalogue, history, shown).items():
            if tokens <= max_tokens and tokens not in timed:
                timed[tokens] = time_work(small, tokens, repeats=repeats)
            rows.append(
                {
                    "grows": grows,
                    "history": history,
                    "candidates": shown,
                    "kind": kind,
                    "prompt_tokens": tokens,
                    "flops": count_flops(small, tokens),
                    "flops_qwen3_4b": count_flops(large, tokens),
                    "seconds": timed.get(tokens),
                }
            )
    return rows


def draw_costs(rows: list[dict[str, Any]]) -> str:
    """Tokens, FLOPs of Qwen3-4B's update, and the small model's update time over history and over candidates."""
    values = (
        ("prompt tokens", lambda row: row["prompt_tokens"]),
        ("TFLOP, update of one prompt, Qwen3-4B", lambda row: row["flops_qwen3_4b"]["update"] / 1e12),
        ("s, update of one prompt, small model", lambda row: row["seconds"] and row["seconds"]["update"]["p50"]),
    )
    drawn = []
    for grows in ("history", "candidates"):
        panels = []
        for title, read in values:
            lines = []
            for kind, colour in zip(KINDS, COLOURS, strict=False):
                points = [(float(row[grows]), read(row)) for row in rows if row["grows"] == grows and row["kind"] == kind and read(row)]
                if points:
                    lines.append(Line(kind, points, colour))
            if lines:
                panels.append(draw_loglog_panel(lines, title=title, x_label=f"items in the {grows}", y_label=""))
        drawn.append(panels)
    return join_panels([panel for panels in drawn for panel in panels], label="Cost of a prompt by what shows its items", columns=3)


def format_costs(rows: list[dict[str, Any]]) -> str:
    """A line a row."""
    lines = [
        f"{'history':>8}{'candidates':>12}  {'kind':<10}{'tokens':>8}{'update TFLOP, Qwen3-4B':>24}{'prefill ms':>12}{'update ms':>11}"
    ]
    for row in rows:
        seconds = row["seconds"]
        times = "".join(f"{1e3 * seconds[name]['p50']:>{width}.1f}" for name, width in (("prefill", 12), ("update", 11))) if seconds else ""
        lines.append(
            f"{row['history']:>8}{row['candidates']:>12}  {row['kind']:<10}{row['prompt_tokens']:>8}"
            f"{row['flops_qwen3_4b']['update'] / 1e12:>24.1f}{times}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face folder; not given: a BPE trained on posterworld")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--plot", type=Path, help="SVG file")
    parser.add_argument("--max-tokens", type=int, default=5600, help="longest prompt timed (default 5600)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats a length (default 5)")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats: expected at least 1, got {options.repeats}")
    if options.tokenizer is not None and not options.tokenizer.is_dir():
        parser.error(f"--tokenizer: expected a Hugging Face folder, found none at {options.tokenizer}")
    clocks = read_clocks()
    catalogue = make_catalogue(200)
    with tempfile.TemporaryDirectory() as cache:
        tokenizer = open_tokenizer(options.tokenizer, catalogue, Path(cache))
        rows = measure_costs(tokenizer, catalogue, max_tokens=options.max_tokens, repeats=options.repeats)
    print(format_costs(rows))
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        options.plot.write_text(draw_costs(rows), encoding="utf-8")
    if options.out:
        name = "trained on posterworld" if options.tokenizer is None else options.tokenizer.name
        more = {"tokenizer": name, "visual_tokens_a_picture": VISUAL_TOKENS}
        write_document(options.out, make_document("visual_tokens", make_config(), rows, repeats=options.repeats, clocks=clocks, **more))
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
