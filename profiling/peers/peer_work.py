"""The work every peer is timed on, and the rows it reports: shared by all scripts of this folder.

Needs numpy and the standard library only, since each peer runs in an environment of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "bench" / "peer_tiny.toml"


@dataclasses.dataclass(frozen=True)
class PeerWork:
    """One GRPO step, or one user to rank, on random weights: sizes in tokens, units, layers. Equals configs/bench/peer_tiny.toml."""

    num_layers: int = 4
    hidden_size: int = 256
    intermediate_size: int = 768
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    vocab_size: int = 8192
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    lora_rank: int = 16
    lora_alpha: float = 32.0
    prompts: int = 2
    prompt_tokens: int = 384
    group_size: int = 8
    max_new_tokens: int = 32
    """Every completion has exactly this many tokens: nothing may stop it earlier."""
    beta: float = 0.1
    temperature: float = 0.9
    top_p: float = 0.9
    learning_rate: float = 1e-5
    max_grad_norm: float = 1.0
    negatives: int = 9
    """Candidates of a user beside the target."""
    cutoffs: tuple[int, ...] = (1, 3, 5, 10)
    """Each K of the report; CUTOFFS of mllmrec_jax/evaluate/metrics.py, which a test holds this to."""


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Where the run configuration keeps each size that it names: (section, ..., key) -> field of PeerWork.
_IN_CONFIG = {
    ("data", "negatives"): "negatives",
    ("prompt", "max_prompt_tokens"): "prompt_tokens",
    ("tokenizer", "vocab_size"): "vocab_size",
    ("model", "num_layers"): "num_layers",
    ("model", "hidden_size"): "hidden_size",
    ("model", "intermediate_size"): "intermediate_size",
    ("model", "num_heads"): "num_heads",
    ("model", "num_kv_heads"): "num_kv_heads",
    ("model", "head_dim"): "head_dim",
    ("model", "rope_theta"): "rope_theta",
    ("grpo", "batch_size"): "prompts",
    ("grpo", "lora", "rank"): "lora_rank",
    ("grpo", "lora", "alpha"): "lora_alpha",
    ("grpo", "optimizer", "learning_rate"): "learning_rate",
    ("grpo", "group_size"): "group_size",
    ("grpo", "max_new_tokens"): "max_new_tokens",
    ("grpo", "beta"): "beta",
    ("grpo", "temperature"): "temperature",
    ("grpo", "top_p"): "top_p",
}


def check_config(work: PeerWork, path: Path = CONFIG) -> None:
    """Refuses to time work that is not the work of our own benchmark.

    Args:
        work: the sizes the peer will run.
        path: TOML of `mllmrec bench step`; every size it names must equal `work`'s. Sizes it leaves out are not checked.

    Raises:
        ValueError: a size differs.
    """
    for keys, value in _find_sizes(_read_toml(path)).items():
        field = _IN_CONFIG[keys]
        if value != getattr(work, field):
            raise ValueError(
                f"{path}: {'.'.join(keys)}: expected {getattr(work, field)!r} as in {Path(__file__).name}, got {value!r};"
                f" change PeerWork.{field} so that peers do the same work"
            )


def read_work(path: Path) -> PeerWork:
    """The work of another configuration of `mllmrec bench step`; sizes it leaves out are those of peer_tiny.

    Raises:
        ValueError: a step of several micro-batches, which peers do not have.
    """
    config = _read_toml(path)
    accumulation = config.get("grpo", {}).get("accumulation", 1)
    if accumulation != 1:
        raise ValueError(f"{path}: grpo.accumulation: expected 1 (all prompts of a step are grpo.batch_size), got {accumulation}")
    return dataclasses.replace(PeerWork(), **{_IN_CONFIG[keys]: value for keys, value in _find_sizes(config).items()})


def _read_toml(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return tomllib.load(file)


def _find_sizes(config: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    """What the configuration names of `_IN_CONFIG`."""
    found: dict[tuple[str, ...], Any] = {}
    for keys in _IN_CONFIG:
        node: Any = config
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        if node is not None:
            found[keys] = node
    return found


def make_prompts(work: PeerWork, steps: int, *, first_id: int, seed: int = 0, prompts: int | None = None) -> np.ndarray:
    """Random prompts, new ones for every step.

    Args:
        work: sizes.
        steps: how many steps' worth.
        first_id: lowest token id used; ids below it are the peer's special tokens.
        seed: of the generator.
        prompts: a step; None: as `work` has them.

    Returns:
        [steps, prompts, prompt_tokens] int64 token ids in [first_id, vocab_size).
    """
    shape = (steps, work.prompts if prompts is None else prompts, work.prompt_tokens)
    return np.random.default_rng(seed).integers(first_id, work.vocab_size, shape)


def summarise_seconds(seconds: Sequence[float]) -> dict[str, float]:
    """p20, p50, p80 of durations in seconds."""
    return {f"p{q}": round(float(np.percentile(seconds, q)), 6) for q in (20, 50, 80)}


def make_parser(description: str) -> argparse.ArgumentParser:
    """Options that every peer script takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="measured steps, after the warm-up")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first measured one (compilation, allocator, caches)")
    parser.add_argument("--json", type=Path, default=None, help="file the row is written to; it is printed in any case")
    return parser


def make_row(
    name: str,
    work: PeerWork,
    settings: dict[str, Any],
    packages: Sequence[str],
    *,
    step_s: Sequence[float],
    generate_s: Sequence[float],
    cpu_s: Sequence[float],
    warmup: int,
) -> dict[str, Any]:
    """The result of one peer.

    Args:
        name: which trainer.
        work: sizes.
        settings: what was chosen for this peer beside the sizes.
        packages: distributions whose versions are recorded.
        step_s: seconds of every step, warm-up included.
        generate_s: seconds of the generation inside every step.
        cpu_s: processor seconds of this process in every step, all threads: with step_s, they tell a slow step from a busy machine.
        warmup: leading steps left out of the quantiles.

    Returns:
        A JSON-ready row: p20/p50/p80 of step_s, generate_s and update_s (everything after generation), every measured duration,
        versions, machine, sizes.

    Raises:
        ValueError: steps and generations do not pair up, or nothing is left after the warm-up.
    """
    if len(step_s) != len(generate_s):
        raise ValueError(f"{name}: expected one generation a step, got {len(generate_s)} generations in {len(step_s)} steps")
    if len(step_s) <= warmup:
        raise ValueError(f"{name}: expected more than {warmup} steps (the warm-up), got {len(step_s)}")
    steps, generations = list(step_s[warmup:]), list(generate_s[warmup:])
    updates = [step - generate for step, generate in zip(steps, generations, strict=True)]
    return {
        "peer": name,
        "step_s": summarise_seconds(steps),
        "generate_s": summarise_seconds(generations),
        "update_s": summarise_seconds(updates),
        "cpu_s": summarise_seconds(cpu_s[warmup:]),
        "first_step_s": round(step_s[0], 3),
        "steps": len(steps),
        "warmup": warmup,
        "all_step_s": [round(second, 4) for second in steps],
        **_describe_run(work, settings, packages),
    }


def make_call_row(
    name: str,
    work: PeerWork,
    settings: dict[str, Any],
    packages: Sequence[str],
    *,
    call: str,
    seconds: Sequence[float],
    cpu_s: Sequence[float],
    warmup: int,
) -> dict[str, Any]:
    """The result of a peer of which one call is timed, not a whole step.

    Args:
        name, work, settings, packages, warmup: as in `make_row`.
        call: what a call does; its p20/p50/p80 stand under `<call>_s`.
        seconds: of every call, warm-up included.
        cpu_s: processor seconds of every call, all threads.

    Returns:
        A JSON-ready row.

    Raises:
        ValueError: nothing is left after the warm-up.
    """
    if len(seconds) <= warmup:
        raise ValueError(f"{name}: expected more than {warmup} calls (the warm-up), got {len(seconds)}")
    measured = list(seconds[warmup:])
    return {
        "peer": name,
        f"{call}_s": summarise_seconds(measured),
        "cpu_s": summarise_seconds(cpu_s[warmup:]),
        f"first_{call}_s": round(seconds[0], 3),
        "steps": len(measured),
        "warmup": warmup,
        f"all_{call}_s": [round(second, 4) for second in measured],
        **_describe_run(work, settings, packages),
    }


def _describe_run(work: PeerWork, settings: dict[str, Any], packages: Sequence[str]) -> dict[str, Any]:
    """Settings, sizes, versions, machine and time of a row."""
    return {
        "settings": settings,
        "work": dataclasses.asdict(work) | {"cutoffs": list(work.cutoffs), "lora_targets": list(LORA_TARGETS)},
        "versions": {"python": platform.python_version()} | {package: importlib.metadata.version(package) for package in packages},
        "machine": {"processor": _processor(), "cpus": len(os.sched_getaffinity(0)), "load_1min": round(os.getloadavg()[0], 2)},
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def emit_row(row: dict[str, Any], path: Path | None) -> None:
    """Prints the row, and writes it to `path` where given."""
    text = json.dumps(row, indent=2)
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def _processor() -> str:
    """The processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
