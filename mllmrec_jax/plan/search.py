"""Every mesh, micro-batch and rematerialisation a device count allows: what fits, how fast it should be, and what to change where
nothing fits."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mllmrec_jax.config import ConfigError, MeshConfig, RunConfig
from mllmrec_jax.plan.devices import Device
from mllmrec_jax.plan.memory import Memory, count_memory, make_abstract_mesh
from mllmrec_jax.plan.programs import StepState, describe_state
from mllmrec_jax.plan.time import Phase, predict_step
from mllmrec_jax.sharding import check_model


class Candidate(NamedTuple):
    """One way to run a step."""

    config: RunConfig
    """With micro-batch, accumulation, rematerialisation and `reuse_rollout` filled in."""
    mesh: MeshConfig
    memory: Memory
    phases: list[Phase]

    @property
    def seconds(self) -> float:
        """Of one step, rollout and update."""
        return sum(phase.seconds for phase in self.phases)


def list_meshes(devices: int) -> list[MeshConfig]:
    """Every data x fsdp x tensor of `devices`."""
    parts = [n for n in range(1, devices + 1) if devices % n == 0]
    return [MeshConfig(devices // (f * t), f, t) for f in parts for t in parts if devices % (f * t) == 0]


def _divides(config: RunConfig, mesh: MeshConfig) -> bool:
    try:
        check_model(config.model, make_abstract_mesh(mesh), vocab_size=config.tokenizer.vocab_size, batch_size=config.grpo.batch_size)
    except ConfigError:
        return False
    return True


def list_layouts(config: RunConfig, devices: int) -> Iterator[tuple[RunConfig, MeshConfig]]:
    """Configurations and meshes of `devices` with the prompts of a step as in `config` (batch_size x accumulation) and all that is free
    filled in; only what the trainer takes."""
    total = config.grpo.batch_size * config.grpo.accumulation
    for mesh in list_meshes(devices):
        rows = mesh.data * mesh.fsdp
        for batch in range(rows, total + 1, rows):
            if total % batch:
                continue
            grpo = dataclasses.replace(config.grpo, batch_size=batch, accumulation=total // batch)
            if not _divides(dataclasses.replace(config, grpo=grpo), mesh):
                continue
            # What a rollout kept is trained on by layer, whatever remat says.
            choices = ((True, config.model.remat), (False, "none"), (False, "dots"), (False, "full"))
            for (reuse, remat), cache in itertools.product(choices, dict.fromkeys((config.model.cache_dtype, "int8"))):
                model = dataclasses.replace(config.model, remat=remat, cache_dtype=cache)
                yield dataclasses.replace(config, model=model, grpo=dataclasses.replace(grpo, reuse_rollout=reuse), mesh=mesh), mesh


def search_layouts(config: RunConfig, devices: int, device: Device, *, described: StepState | None = None) -> list[Candidate]:
    """All layouts on `devices` chips, fastest first; those that do not fit are among them.

    A cache in 8 bits changes what is sampled, so where it was not asked for, such layouts come last.
    """
    described = described or describe_state(config)
    found = [
        Candidate(chosen, mesh, count_memory(chosen, mesh, described), predict_step(chosen, mesh, device))
        for chosen, mesh in list_layouts(config, devices)
    ]
    asked = config.model.cache_dtype
    return sorted(found, key=lambda one: (one.config.model.cache_dtype != asked, one.seconds, one.memory.peak))


class Change(NamedTuple):
    """One change, and the least memory a device then needs."""

    what: str
    peak: int


def _find_least(config: RunConfig, devices: int) -> int | None:
    """The least memory any layout on `devices` needs; None where no mesh divides.

    Full rematerialisation and a cache in 8 bits need least.
    """
    described = describe_state(config)
    found = list_layouts(config, devices)
    layouts = [
        one for one in found if one[0].model.remat == "full" and one[0].model.cache_dtype == "int8" and not one[0].grpo.reuse_rollout
    ]
    return min((count_memory(chosen, mesh, described).peak for chosen, mesh in layouts), default=None)


def list_changes(config: RunConfig, devices: int) -> list[Change]:
    """Single changes that lower the need for memory, with what the smallest layout then needs; the most helpful first."""
    now = _find_least(config, devices)
    grpo, logprob = config.grpo, config.logprob
    changes: list[tuple[str, RunConfig, int]] = [(f"{n} devices", config, n) for n in (2 * devices, 4 * devices, 8 * devices)]

    def alter(what: str, name: str, value: object, section: str = "grpo") -> None:
        part = dataclasses.replace(getattr(config, section), **{name: value})
        changes.append((what, dataclasses.replace(config, **{section: part}), devices))

    total = grpo.batch_size * grpo.accumulation
    if total % 2 == 0 and total > 1:
        half = dataclasses.replace(grpo, batch_size=total // 2, accumulation=1)
        changes.append((f"{total // 2} prompts a step (grpo.batch_size x accumulation)", dataclasses.replace(config, grpo=half), devices))
    if grpo.mode == "full":
        alter("grpo.mode lora", "mode", "lora")
    if grpo.group_size >= 4:
        alter(f"grpo.group_size {grpo.group_size // 2}", "group_size", grpo.group_size // 2)
    if logprob.chunk_tokens > 128:
        alter("logprob.chunk_tokens 128", "chunk_tokens", 128, "logprob")
    if config.model.param_dtype == "float32":
        alter("model.param_dtype bfloat16", "param_dtype", "bfloat16", "model")
    if config.model.dtype == "float32":
        alter("model.dtype bfloat16", "dtype", "bfloat16", "model")
    half_prompt = config.prompt.max_prompt_tokens // 2
    if half_prompt:
        alter(f"prompt.max_prompt_tokens {half_prompt}", "max_prompt_tokens", half_prompt, "prompt")
    found = []
    for what, changed, count in changes:
        least = _find_least(changed, count)
        if least is not None and now is not None and least < now:
            found.append(Change(what, least))
    return sorted(found, key=lambda change: change.peak)


def keep_best(candidates: list[Candidate], fits: Callable[[Candidate], bool]) -> list[Candidate]:
    """Of those that fit, one a mesh: its fastest; in the order given."""
    best: dict[MeshConfig, Candidate] = {}
    for candidate in candidates:
        if fits(candidate):
            best.setdefault(candidate.mesh, candidate)
    return list(best.values())
