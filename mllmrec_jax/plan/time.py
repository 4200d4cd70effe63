"""Seconds of a GRPO step on one device of a mesh: its roofline, and the bytes that cross devices.

A phase takes max(FLOPs / peak, bytes / bandwidth) plus what it receives / link rate plus a latency a collective; nothing overlaps with
communication. FLOPs are those executed and bytes the least that has to move (`bench.flops`), so without measured shares this is a bound
from below. With shares (`Device.shares`) each phase's roofline time is divided by the share of the ceiling that it was measured to reach.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from mllmrec_jax.bench.flops import (
    HeadJob,
    Sizes,
    Work,
    count_decode,
    count_head,
    count_linears,
    count_optimizer,
    count_parameters,
    count_prefill,
    count_sampling,
    count_trained,
    count_update,
)
from mllmrec_jax.communication import UpdateShape, count_update_bytes
from mllmrec_jax.config import MeshConfig, RunConfig
from mllmrec_jax.plan.devices import Device
from mllmrec_jax.plan.memory import count_prompts, cut_config

# The mesh axes that each of `communication.count_update_bytes`' parts crosses.
_AXES = {
    "weights": ("fsdp",),
    "adapters": ("fsdp",),
    "activations": ("tensor",),
    "embedding": ("fsdp", "tensor"),
    "hidden": ("fsdp",),
    "hidden_gradient": ("fsdp", "tensor"),
    "moments": ("fsdp", "tensor"),
    "adapter_gradients": ("data", "fsdp"),
    "gradients": ("data", "fsdp"),
}
SAMPLING_SUMS = 40
"""Sums over the vocabulary in one draw: the search for top-p's threshold (31 at most), and what stands around it."""


class Phase(NamedTuple):
    """One phase of a step on one device."""

    name: str
    work: Work
    received: float
    """Bytes from other devices."""
    compute_s: float
    """max(FLOPs / peak, bytes / bandwidth), divided by the measured share where there is one."""
    communication_s: float
    bound: str
    """What sets `compute_s`: "compute" or "memory"."""

    @property
    def seconds(self) -> float:
        return self.compute_s + self.communication_s


def _link_rate(device: Device, mesh: MeshConfig, axes: tuple[str, ...]) -> float:
    """Bytes/s a device receives over `axes`: the network's where they join devices of two domains. Tensor lies innermost, then fsdp."""
    sizes = {"tensor": mesh.tensor, "fsdp": mesh.fsdp, "data": mesh.data}
    reach = 1
    for name, size in sizes.items():
        reach *= size
        if name == max(axes, key=list(sizes).index):
            break
    return device.link if reach <= device.domain else device.network


def _count_update_received(config: RunConfig, mesh: MeshConfig) -> dict[str, float]:
    grpo, model = config.grpo, config.model
    shape = UpdateShape(
        grpo.batch_size,
        config.prompt.max_prompt_tokens,
        grpo.group_size,
        grpo.max_new_tokens,
        grpo.lora.rank,
        grpo.accumulation,
        grpo.reuse_rollout,
    )
    received = count_update_bytes(model, shape, data=mesh.data, fsdp=mesh.fsdp, tensor=mesh.tensor)
    if grpo.mode == "full":
        # float32 weights are gathered, and their gradients scattered over fsdp and summed over data.
        del received["adapters"], received["adapter_gradients"]
        received["weights"] *= 4 / jnp.dtype(model.param_dtype).itemsize
        trained = 4.0 * count_parameters(model, config.tokenizer.vocab_size) / mesh.tensor
        d, f = mesh.data, mesh.fsdp
        received["gradients"] = grpo.accumulation * trained * ((f - 1) / f + 2 * (d - 1) / (d * f))
    return received


def predict_step(config: RunConfig, mesh: MeshConfig, device: Device) -> list[Phase]:
    """The phases of one rollout and one update of `config` on `mesh` (all sizes given), on each device."""
    own, grpo = cut_config(config, mesh), config.grpo
    model, d, f, t = own.model, mesh.data, mesh.fsdp, mesh.tensor
    full, exact = grpo.mode == "full", grpo.kl_estimator == "exact" and grpo.beta > 0
    lora, reference = None if full else grpo.lora, grpo.beta > 0
    vocabulary = -(-config.tokenizer.vocab_size // (f * t))
    prompts = count_prompts(config, mesh)
    micro = Sizes(prompts, config.prompt.max_prompt_tokens, grpo.group_size, grpo.max_new_tokens, vocabulary)
    rolled = micro._replace(prompts=prompts * grpo.accumulation)
    a, layers, width = grpo.accumulation, model.num_layers, model.hidden_size
    weight, activation = jnp.dtype(model.param_dtype).itemsize, jnp.dtype(model.dtype).itemsize
    shares = dict(device.shares)

    def make(name: str, work: Work, received: dict[tuple[str, ...], float] | None = None, collectives: float = 0) -> Phase:
        compute, memory = work.flops / device.flops, work.bytes / device.bandwidth
        crossing = sum(size / _link_rate(device, mesh, axes) for axes, size in (received or {}).items() if size)
        total = sum((received or {}).values())
        return Phase(
            name,
            work,
            total,
            max(compute, memory) / shares.get(name, 1.0),
            crossing + collectives * device.latency,
            "compute" if compute >= memory else "memory",
        )

    # Generation: along fsdp every layer's weights are gathered for every token, along tensor two activations a layer are reduced.
    gathered = layers * count_linears(model).kernels * (4 if full else weight) * (f - 1) / f
    reduced = layers * 2 * width * activation * 2 * (t - 1) / t
    looked_up = width * weight * ((f - 1) + 2 * (t - 1) / t)
    a_pass = layers * ((1 if f > 1 else 0) + (2 if t > 1 else 0))
    rows = rolled.prompts * grpo.group_size
    a_draw = (f - 1) * rows * width * activation + SAMPLING_SUMS * rows * f * 4.0 * (f * t > 1)
    steps = grpo.max_new_tokens - 1
    tokens = rolled.prompts * micro.prompt_tokens
    phases = [
        make(
            "prefill",
            count_prefill(model, rolled, lora=lora),
            {("fsdp",): gathered, ("tensor",): tokens * reduced, ("fsdp", "tensor"): tokens * looked_up},
            a_pass,
        ),
        make(
            "decode",
            count_decode(model, rolled, lora=lora).plus(count_sampling(model, rolled._replace(prompts=rolled.prompts * f))),
            {
                ("fsdp",): steps * gathered,
                ("tensor",): steps * rows * reduced,
                ("fsdp", "tensor"): steps * rows * looked_up + (steps + 1) * a_draw,
            },
            steps * a_pass + (steps + 1) * (SAMPLING_SUMS if f * t > 1 else 0),
        ),
    ]

    work = count_update(model, micro, grpo, own.logprob, reuse=grpo.reuse_rollout)
    # Each device meets the rows of all devices along fsdp with its part of the vocabulary.
    job: HeadJob = "train" if full else "recompute" if exact else "accumulate"
    rows_met = micro.completion_tokens * f
    head = count_head(model, rows_met, vocabulary, own.logprob, job=job, reference=reference, exact=exact).times(a)
    trained = count_trained(model, vocabulary, lora=grpo.lora, mode=grpo.mode) / f
    parts = _count_update_received(config, mesh)
    vocabulary_parts = {"hidden", "hidden_gradient", "moments"}
    final = {"adapter_gradients", "gradients"}

    def pick(names: set[str], share: float = 1.0) -> dict[tuple[str, ...], float]:
        picked: dict[tuple[str, ...], float] = {}
        for name in names & set(parts):
            picked[_AXES[name]] = picked.get(_AXES[name], 0.0) + share * parts[name]
        return picked

    # Of the trunk's bytes: one of two gathers, four of ten reductions a layer are the forward pass's.
    trunk = set(parts) - vocabulary_parts - final
    phases += [
        make(
            "forward", work["forward"].plus(work["reference"]), pick(trunk, 0.45), a * layers * ((1 if f > 1 else 0) + (4 if t > 1 else 0))
        ),
        make("logprob", head, pick(vocabulary_parts), a * (4 if f * t > 1 else 0)),
        make("backward", work["backward"], pick(trunk, 0.55), a * layers * ((1 if f > 1 else 0) + (6 if t > 1 else 0))),
        make("optimizer", count_optimizer(trained), pick(final), a * (1 if d * f > 1 else 0)),
    ]
    return phases
