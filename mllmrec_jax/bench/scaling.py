"""Cost curves: time and memory of a GRPO step as one size grows, prompts shared beside prompts repeated."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np

from mllmrec_jax.bench.flops import Sizes, repeat_prompts
from mllmrec_jax.bench.grpo_work import GrpoWork
from mllmrec_jax.bench.measure import read_clocks, repeat_runs, time_call
from mllmrec_jax.bench.rows import make_document
from mllmrec_jax.bench.step import WARMUP
from mllmrec_jax.bench.work import call_phase, find_sizes, join_phases, make_phase_row
from mllmrec_jax.config import ConfigError, RunConfig

Over = Literal["group_size", "prompt_tokens", "new_tokens", "batch_size", "layers", "vocabulary"]
OVER: tuple[Over, ...] = get_args(Over)
LAYOUTS = ("shared", "repeated")


def resize(config: RunConfig, over: Over, value: int) -> RunConfig:
    """The configuration with one size changed, and as many positions as that needs.

    Raises:
      ConfigError: the value is too small.
    """
    least = 2 if over == "group_size" else 1
    if value < least:
        raise ConfigError(f"--values: expected sizes of at least {least} for --over {over}, got {value}")
    grpo, prompt, tokenizer, model = config.grpo, config.prompt, config.tokenizer, config.model
    if over in ("group_size", "batch_size"):
        grpo = dataclasses.replace(grpo, **{over: value})
    elif over == "new_tokens":
        grpo = dataclasses.replace(grpo, max_new_tokens=value)
    elif over == "prompt_tokens":
        prompt = dataclasses.replace(prompt, max_prompt_tokens=value)
    elif over == "vocabulary":
        tokenizer = dataclasses.replace(tokenizer, vocab_size=value)
    else:
        model = dataclasses.replace(model, num_layers=value)
    positions = max(model.max_position, prompt.max_prompt_tokens + grpo.max_new_tokens)
    model = dataclasses.replace(model, max_position=positions)
    return dataclasses.replace(config, grpo=grpo, prompt=prompt, tokenizer=tokenizer, model=model)


def choose_values(config: RunConfig, over: Over) -> list[int]:
    """A quarter, half, once, twice and four times the configuration's size."""
    sizes = find_sizes(config)
    base = {"batch_size": sizes.prompts, "layers": config.model.num_layers}.get(over) or getattr(sizes, over)
    least = 2 if over == "group_size" else 1
    return sorted({max(least, base * factor // 4) for factor in (1, 2, 4, 8, 16)})


def fit_exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Slope of log y over log x by least squares: y grows as x to this power."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def measure_point(config: RunConfig, layout: str, repeats: int, **shape: Any) -> list[dict[str, Any]]:
    """Rows `generate`, `update` and `step` of one size in one layout, with the larger of the two programs' memory."""
    micro: Sizes = find_sizes(config)
    work = GrpoWork(config, micro if layout == "shared" else repeat_prompts(micro), steps=repeats + WARMUP)
    prompts = work.draw_prompts(0)
    rollout = work.compile_rollout(prompts, flops_too=False)
    update = work.compile_update(prompts, call_phase(rollout, work.rollout_arguments(prompts)), flops_too=False)

    def run(repeat: int) -> dict[str, float]:
        prompts = work.draw_prompts(repeat)
        generate_s, sampled = time_call(call_phase, rollout, work.rollout_arguments(prompts))
        work.check_rollout(sampled)
        arguments = jax.block_until_ready(work.update_arguments(prompts, sampled))
        update_s, result = time_call(call_phase, update, arguments)
        work.take_update(result)
        return {"generate": generate_s, "update": update_s, "step": generate_s + update_s}

    name = ", ".join(f"{key} {value}" for key, value in shape.items())
    seconds = repeat_runs(run, warmup=WARMUP, repeats=repeats, description=f"bench scaling {name}, {layout}")
    # Rows of both layouts name the work itself: B prompts with G completions each.
    sizes = micro._replace(prompts=micro.prompts * config.grpo.accumulation)
    phases = {"generate": rollout, "update": update, "step": join_phases(rollout, update)}
    rows = [make_phase_row(phase, found, seconds[phase], config, sizes, layout=layout) for phase, found in phases.items()]
    peaks = [row["memory_xla"]["peak"] for row in rows if row.get("memory_xla")]
    return [{**row, **shape, "layout": layout, "peak_bytes": max(peaks) if peaks else None} for row in rows]


def bench_scaling(config: RunConfig, *, over: Over, values: Sequence[int] = (), repeats: int = 5) -> dict[str, Any]:
    """Times a GRPO step at each of `values` of one size, in both layouts; without values, at `choose_values`.

    Returns:
      Rows `generate`, `update` and `step` with `layout` and `peak_bytes` (by XLA's plan of the larger of the two programs, on one
      device); `exponents`: by layout, of seconds and bytes over the size.

    Raises:
      ConfigError: fewer than two values, or one that is too small.
    """
    chosen = sorted(set(values)) or choose_values(config, over)
    if len(chosen) < 2:
        raise ConfigError(f"--values: expected two sizes or more, got {chosen}")
    resized = {value: resize(config, over, value) for value in chosen}
    clocks, rows = read_clocks(), []
    for value, layout in itertools.product(chosen, LAYOUTS):
        rows += measure_point(resized[value], layout, repeats, **{over: value})
    exponents: dict[str, dict[str, float]] = {}
    for layout in LAYOUTS:
        curves = {name: [row for row in rows if row["layout"] == layout and row["name"] == name] for name in ("generate", "update", "step")}
        found = {f"{name}_s": fit_exponent(chosen, [row["p50"] for row in curve]) for name, curve in curves.items()}
        peaks = [row["peak_bytes"] for row in curves["step"]]
        exponents[layout] = found | ({} if None in peaks else {"peak_bytes": fit_exponent(chosen, peaks)})
    return make_document("scaling", config, rows, repeats=repeats, clocks=clocks, over=over, values=chosen, exponents=exponents)
