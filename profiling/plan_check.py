"""Holds `mllmrec plan` to measured steps: ceilings and shares measured at one size, predictions for that and for other sizes.

    python profiling/plan_check.py --out profiling/results/plan_cpu.json [--roofline FILE] [--plot docs/roofline-cpu.svg]

Measures `bench roofline` at the sizes of --config, or reads FILE where it exists, then `bench step` at those sizes and at others, each
beside two predictions for one device: the bound from below (ceilings alone) and what the shares say that the roofline's phases reached.
The first line is a fit (its shares are its own); the others are predictions.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from mllmrec_jax.bench.measure import read_clocks
from mllmrec_jax.bench.roofline import bench_roofline, draw_roofline, format_roofline
from mllmrec_jax.bench.rows import make_document, read_document, write_document
from mllmrec_jax.bench.step import bench_step
from mllmrec_jax.config import MeshConfig, RunConfig, load_config
from mllmrec_jax.plan.devices import find_device, read_measured
from mllmrec_jax.plan.time import Phase, predict_step
from mllmrec_jax.resources import find_config

ONE = MeshConfig(1, 1, 1)


def list_cases(config: RunConfig) -> dict[str, RunConfig]:
    """Sizes to predict, by what differs from `config`."""

    def change(section: str, name: str, value: int) -> RunConfig:
        return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})

    return {
        "as the roofline's": config,
        "half the prompt": change("prompt", "max_prompt_tokens", config.prompt.max_prompt_tokens // 2),
        "half the group": change("grpo", "group_size", config.grpo.group_size // 2),
        "twice the layers": change("model", "num_layers", 2 * config.model.num_layers),
        "the forward pass computed": dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, reuse_rollout=False)),
    }


def sum_seconds(phases: list[Phase]) -> dict[str, float]:
    """Of generation, update and step."""
    generate = sum(phase.seconds for phase in phases if phase.name in ("prefill", "decode"))
    whole = sum(phase.seconds for phase in phases)
    return {"generate": generate, "update": whole - generate, "step": whole}


def check_cases(config: RunConfig, roofline: Path, *, repeats: int) -> list[dict[str, Any]]:
    """One row a case: measured p50 and predictions (seconds)."""
    measured = read_measured(roofline, find_device("h100"))  # its ceilings replace the table's; one device has no links
    bare = dataclasses.replace(measured, shares=())
    rows = []
    for name, case in list_cases(config).items():
        step = bench_step(case, repeats=repeats)
        found = {part: step[f"{part}_s"] for part in ("generate", "update", "step")}
        bound, predicted = (sum_seconds(predict_step(case, ONE, device)) for device in (bare, measured))
        rows.append({"case": name, "measured": found, "bound": bound, "predicted": predicted, "shapes": step["shapes"]})
        print(format_row(rows[-1]), flush=True)
    return rows


def format_row(row: dict[str, Any]) -> str:
    """Measured, bound and predicted milliseconds, and predicted over measured."""
    cells = []
    for part, timing in row["measured"].items():
        real, bound, guess = 1e3 * timing["p50"], 1e3 * row["bound"][part], 1e3 * row["predicted"][part]
        cells.append(f"{part} {real:.0f} ms (bound {bound:.0f}, predicted {guess:.0f}, x{guess / real:.2f})")
    return f"{row['case']:<26}{', '.join(cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="bench/peer_tiny", help="a configuration (default bench/peer_tiny)")
    parser.add_argument("--repeats", type=int, default=10, help="steps timed a case (default 10)")
    parser.add_argument("--roofline", type=Path, default=Path("profiling/results/roofline_cpu.json"), help="read, or measured and written")
    parser.add_argument("--plot", type=Path, help="SVG of the roofline")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the rows")
    options = parser.parse_args()
    config = load_config(find_config(options.config))
    clocks = read_clocks()
    if not options.roofline.exists():
        write_document(options.roofline, bench_roofline(config, repeats=options.repeats))
    roofline = read_document(options.roofline, benchmark="roofline")
    print(format_roofline(roofline))
    if options.plot:
        options.plot.write_text(draw_roofline(roofline), encoding="utf-8")
    rows = check_cases(config, options.roofline, repeats=options.repeats)
    write_document(options.out, make_document("plan", config, rows, repeats=options.repeats, clocks=clocks, roofline=str(options.roofline)))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
