"""Predicted times: the roofline of one device, and what meshes add to it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mllmrec_jax.bench.flops import Sizes, count_rollout, count_update, sum_work
from mllmrec_jax.communication import UpdateShape, count_update_bytes
from mllmrec_jax.config import ConfigError, MeshConfig
from mllmrec_jax.plan.devices import Device, find_device, list_devices, read_measured
from mllmrec_jax.plan.models import resolve_model
from mllmrec_jax.plan.time import predict_step

ALONE = MeshConfig(1, 1, 1)
CONFIG = resolve_model("bench/peer_tiny")
CHIP = Device("chip", flops=1e11, bandwidth=1e10, memory=1e10, link=1e9, domain=8, network=1e8, latency=0.0, source="a test")


def sum_received(config, mesh, device):
    return sum(phase.communication_s for phase in predict_step(config, mesh, device))


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_one_device_does_all_the_work_that_bench_counts(mode, reuse):
    grpo = dataclasses.replace(CONFIG.grpo, mode=mode, reuse_rollout=reuse)
    config = dataclasses.replace(CONFIG, grpo=grpo)
    sizes = Sizes(2, 384, 8, 32, 8192)
    lora = grpo.lora if mode == "lora" else None
    whole = count_rollout(config.model, sizes, lora=lora).plus(
        sum_work(count_update(config.model, sizes, grpo, config.logprob, reuse=reuse))
    )
    phases = predict_step(config, ALONE, CHIP)
    assert sum(phase.work.flops for phase in phases) == pytest.approx(whole.flops)
    assert sum(phase.work.bytes for phase in phases) == pytest.approx(whole.bytes)
    assert all(phase.communication_s == 0 and phase.received == 0 for phase in phases)


def test_a_phase_is_as_fast_as_the_slower_of_its_ceilings():
    for phase in predict_step(CONFIG, ALONE, CHIP):
        compute, memory = phase.work.flops / CHIP.flops, phase.work.bytes / CHIP.bandwidth
        assert phase.compute_s == max(compute, memory)
        assert phase.bound == ("compute" if compute >= memory else "memory")


def test_a_measured_share_divides_its_phase_alone():
    slow = dataclasses.replace(CHIP, shares=(("decode", 0.25),))
    for before, after in zip(predict_step(CONFIG, ALONE, CHIP), predict_step(CONFIG, ALONE, slow), strict=True):
        assert after.compute_s == pytest.approx(before.compute_s * (4 if before.name == "decode" else 1))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2)], ids=str)
def test_an_update_receives_what_communication_says(sizes):
    config = resolve_model("Qwen3-4B")
    config = dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, batch_size=8, accumulation=4, reuse_rollout=False))
    data, fsdp, tensor = sizes
    shape = UpdateShape(8, config.prompt.max_prompt_tokens, 8, 128, 16, 4)
    expected = sum(count_update_bytes(config.model, shape, data=data, fsdp=fsdp, tensor=tensor).values())
    update = [phase for phase in predict_step(config, MeshConfig(*sizes), CHIP) if phase.name not in ("prefill", "decode")]
    assert sum(phase.received for phase in update) == pytest.approx(expected)


def test_work_of_a_device_falls_as_devices_are_added():
    config = resolve_model("Qwen3-4B")
    config = dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, batch_size=8))
    alone = sum(phase.work.flops for phase in predict_step(config, ALONE, CHIP))
    for sizes in ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)):
        cut = sum(phase.work.flops for phase in predict_step(config, MeshConfig(*sizes), CHIP))
        assert cut == pytest.approx(alone / 8, rel=0.02)


def test_a_mesh_over_two_domains_pays_for_the_network():
    config = resolve_model("Qwen3-4B")
    config = dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, batch_size=16))
    near, far = MeshConfig(1, 16, 1), dataclasses.replace(CHIP, domain=16)
    assert sum_received(config, near, CHIP) == pytest.approx(10 * sum_received(config, near, far))
    # Tensor lies innermost: with it within a domain, only data crosses the network.
    inside = predict_step(config, MeshConfig(2, 1, 8), CHIP)
    assert [phase.name for phase in inside if phase.communication_s > phase.received / CHIP.link * 1.01] == ["optimizer"]


def test_every_device_of_the_table_is_whole():
    for name in list_devices():
        device = find_device(name)
        assert device.source and device.network <= device.link <= device.bandwidth < device.flops
    with pytest.raises(ConfigError, match="nearest: h100"):
        find_device("h1000")


def test_measured_ceilings_are_read_and_checked(tmp_path):
    file = tmp_path / "roofline.json"
    good = {
        "ceilings": {"flops_per_s": 3e10, "bytes_per_s": 2e10},
        "phases": [{"name": "prefill", "share": 0.5}],
        "provenance": {"device": {"kind": "cpu"}},
    }
    file.write_text(json.dumps(good))
    device = read_measured(file, CHIP)
    assert (device.flops, device.bandwidth, dict(device.shares), device.memory) == (3e10, 2e10, {"prefill": 0.5}, CHIP.memory)
    for bad, cause in (("{}", "mllmrec bench roofline"), ("[]", "mllmrec bench roofline"), ("{", "mllmrec bench roofline")):
        file.write_text(bad)
        with pytest.raises(ConfigError, match=cause):
            read_measured(file, CHIP)
    file.write_text(json.dumps(good | {"phases": [{"name": "prefill", "share": 0}]}))
    with pytest.raises(ConfigError, match="positive"):
        read_measured(file, CHIP)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_measured(tmp_path / "none.json", CHIP)
