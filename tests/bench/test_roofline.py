"""The roofline: ceilings are rates of real work, phases are placed by arithmetic, and what `plan` reads is what `bench roofline` writes."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import jax.numpy as jnp
import pytest

from mllmrec_jax.bench import roofline
from mllmrec_jax.bench.flops import Work
from mllmrec_jax.bench.roofline import Ceilings, bench_roofline, draw_roofline, format_roofline, measure_ceilings, place_phase
from mllmrec_jax.config import GrpoConfig, LoraConfig, MeshConfig, ModelConfig, PromptConfig, RunConfig, TokenizerConfig
from mllmrec_jax.plan.devices import find_device, read_measured
from mllmrec_jax.plan.time import predict_step

CONFIG = RunConfig(
    model=ModelConfig(
        num_layers=2, hidden_size=32, intermediate_size=64, num_heads=2, num_kv_heads=1, head_dim=16, dtype="float32", param_dtype="float32"
    ),
    tokenizer=TokenizerConfig(vocab_size=64),
    prompt=PromptConfig(max_prompt_tokens=16),
    grpo=GrpoConfig(batch_size=2, accumulation=2, group_size=2, max_new_tokens=4, lora=LoraConfig(rank=2)),
)
PHASES = ["prefill", "decode", "forward", "logprob", "backward"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ceilings_are_the_best_medians(dtype):
    found = measure_ceilings(dtype, matmul_sizes=(64, 128), copy_bytes=(1 << 16, 1 << 20), repeats=3)
    assert [(row["name"], row["shape"]["size"]) for row in found.rows] == [
        ("matmul", 64), ("matmul", 128), ("copy", 1 << 16), ("copy", 1 << 20),
    ]  # fmt: skip
    assert found.flops == max(2 * n**3 / row["p50"] for n, row in zip((64, 128), found.rows, strict=False))
    assert found.bandwidth == max(2 * n / row["p50"] for n, row in zip((1 << 16, 1 << 20), found.rows[2:], strict=True))


def test_matrices_stop_growing_once_they_take_long_enough(monkeypatch):
    monkeypatch.setattr(roofline, "LONG_ENOUGH_S", 0.0)
    assert len(measure_ceilings(jnp.float32, matmul_sizes=(64, 128, 256), copy_bytes=(1 << 16,), repeats=1).rows) == 2


@pytest.mark.parametrize(("flops", "moved", "bound", "best"), [(100.0, 1.0, "compute", 1.0), (10.0, 50.0, "memory", 5.0)])
def test_a_phase_is_placed_below_the_lower_ceiling(flops, moved, bound, best):
    placed = place_phase("x", 10.0, Work(flops, flops, moved), Ceilings(100.0, 10.0, []), executed_bytes=2 * moved)
    assert (placed["bound"], placed["roofline_s"], placed["share"]) == (bound, best, best / 10)
    assert placed["intensity"] == {"least_formula": flops / moved, "accessed_xla": flops / moved / 2}
    assert placed["flops_per_s"] == flops / 10


@pytest.mark.slow
def test_a_run_places_every_phase_and_plan_reads_it(monkeypatch, tmp_path):
    monkeypatch.setattr(roofline, "measure_ceilings", lambda dtype: Ceilings(1e12, 1e11, []))
    document = bench_roofline(CONFIG, repeats=2)
    assert [phase["name"] for phase in document["phases"]] == PHASES
    assert all(phase["seconds"] > 0 for phase in document["phases"] if phase["name"] in ("prefill", "forward", "logprob"))
    assert "logprob" in format_roofline(document)
    # Differences of so small programs may come out below zero: only what is drawn and read is put right.
    for phase in document["phases"]:
        for key in ("seconds", "flops_per_s", "share"):
            phase[key] = abs(phase[key])
    drawn = ElementTree.fromstring(draw_roofline(document))
    assert {text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")} >= set(PHASES)
    file = tmp_path / "roofline.json"
    file.write_text(json.dumps(document))
    device = read_measured(file, find_device("h100"))
    assert (device.flops, dict(device.shares).keys()) == (1e12, set(PHASES))
    # The work of the phases is what a plan predicts for one device.
    predicted = {phase.name: phase.work for phase in predict_step(CONFIG_OWN_FORWARD, MeshConfig(1, 1, 1), device)}
    for phase in document["phases"]:
        count = CONFIG.grpo.accumulation if phase["name"] in ("forward", "logprob") else 1
        assert count * phase["flops"] == pytest.approx(predicted[phase["name"]].flops, rel=1e-6), phase["name"]


CONFIG_OWN_FORWARD = RunConfig(
    model=CONFIG.model,
    tokenizer=CONFIG.tokenizer,
    prompt=CONFIG.prompt,
    grpo=GrpoConfig(
        batch_size=2, accumulation=2, group_size=2, max_new_tokens=4, lora=LoraConfig(rank=2), reuse_rollout=False
    ),
)  # fmt: skip
