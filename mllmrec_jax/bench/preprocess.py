"""`mllmrec preprocess` on a generated catalogue: captions, traces and embeddings a second, by the configured backends."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from mllmrec_jax.bench.measure import read_clocks, repeat_runs
from mllmrec_jax.bench.rows import make_document, make_row
from mllmrec_jax.config import ConfigError, RunConfig

STAGES = {"caption": "captions", "pseudo_cot": "drafts", "refine_cot": "traces", "embed": "embeddings"}
"""What is counted of each stage that is timed."""


def bench_preprocess(config: RunConfig, *, repeats: int = 3) -> dict[str, Any]:
    """Runs the stages up to the embeddings from nothing, in each repeat on another catalogue of `data.posterworld`'s sizes.

    Returns:
      A row a stage, with what it made a second under the name of `STAGES`. `embed` trains its encoder where the backend has one to train.

    Raises:
      ConfigError: `data.source` is not posterworld, whose catalogues can be drawn anew.
    """
    from mllmrec_jax.preprocess.run import run_preprocess  # here: the packages of the extra `preprocess`

    if config.data.source != "posterworld":
        raise ConfigError(f"data.source: expected 'posterworld' for this benchmark, got '{config.data.source}'")
    preprocess = config.preprocess
    # Nothing is mixed here, so prompts need not show traces.
    unmixed = dataclasses.replace(preprocess, mix=dataclasses.replace(preprocess.mix, sft_fraction=0.0, grpo_fraction=0.0))
    made: dict[str, list[int]] = {stage: [] for stage in STAGES}
    pictures: list[int] = []

    def run(repeat: int) -> dict[str, float]:
        world = dataclasses.replace(config.data.posterworld, seed=config.seed + repeat)
        with tempfile.TemporaryDirectory(prefix="mllmrec-bench-preprocess-") as scratch:
            here = {"output": Path(scratch) / "runs", "cache": Path(scratch) / "cache", "preprocess": unmixed}
            data = dataclasses.replace(config.data, posterworld=world)
            report = run_preprocess(dataclasses.replace(config, data=data, **here), until="embed")
        pictures.append(sum(report["pictures"].values()))
        for stage in STAGES:
            made[stage].append(report["stages"].get(stage, {}).get("done", 0))
        return {stage: report["seconds"][stage] for stage in STAGES}

    clocks = read_clocks()
    seconds = repeat_runs(run, warmup=0, repeats=repeats, description="bench preprocess")
    rows = []
    for stage, noun in STAGES.items():
        backend = getattr(preprocess, stage).backend
        world = config.data.posterworld
        row = make_row(stage, seconds[stage], shape={"items": world.items, "users": world.users, "backend": backend}, made=made[stage])
        rows.append({**row, f"{noun}_per_s": sum(made[stage]) / sum(seconds[stage])})
    return make_document("preprocess", config, rows, repeats=repeats, clocks=clocks, pictures=pictures)
