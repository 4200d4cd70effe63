"""A plan as JSON, and as text for reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllmrec_jax.config import RunConfig
from mllmrec_jax.plan.devices import Device
from mllmrec_jax.plan.memory import Memory
from mllmrec_jax.plan.programs import Compiled
from mllmrec_jax.plan.search import Candidate, Change

GB = 1e9


def _describe_memory(memory: Memory) -> dict[str, Any]:
    return {"peak": memory.peak, **memory._asdict()}


def describe_candidate(candidate: Candidate) -> dict[str, Any]:
    """One layout as JSON values: bytes and seconds of one device."""
    config, mesh = candidate.config, candidate.mesh
    return {
        "mesh": {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor},
        "batch_size": config.grpo.batch_size,
        "accumulation": config.grpo.accumulation,
        "remat": config.model.remat,
        "reuse_rollout": config.grpo.reuse_rollout,
        "cache_dtype": config.model.cache_dtype,
        "step_s": candidate.seconds,
        "memory": _describe_memory(candidate.memory),
        "phases": [
            {
                "name": phase.name,
                "seconds": phase.seconds,
                "compute_s": phase.compute_s,
                "communication_s": phase.communication_s,
                "bound": phase.bound,
                "flops": phase.work.flops,
                "bytes": phase.work.bytes,
                "received_bytes": phase.received,
            }
            for phase in candidate.phases
        ],
    }


def describe_result(
    config: RunConfig,
    device: Device,
    devices: int,
    usable: int,
    candidates: Sequence[Candidate],
    fitting: Sequence[Candidate],
    changes: Sequence[Change],
    compiled: dict[str, Compiled] | None,
) -> dict[str, Any]:
    """The whole plan as JSON values; `candidates` is not empty."""
    smallest = min(candidates, key=lambda candidate: candidate.memory.peak)
    return {
        "model": config.name,
        "work": {
            "prompts": config.grpo.batch_size * config.grpo.accumulation,
            "prompt_tokens": config.prompt.max_prompt_tokens,
            "group_size": config.grpo.group_size,
            "new_tokens": config.grpo.max_new_tokens,
            "vocabulary": config.tokenizer.vocab_size,
            "mode": config.grpo.mode,
        },
        "device": {name: getattr(device, name) for name in ("name", "flops", "bandwidth", "memory", "link", "domain", "network", "source")},
        "measured_shares": dict(device.shares),
        "devices": devices,
        "usable_bytes": usable,
        "tried": len(candidates),
        "fitting": [describe_candidate(candidate) for candidate in fitting],
        "smallest": describe_candidate(smallest),
        "changes": [{"what": change.what, "peak": change.peak, "fits": change.peak <= usable} for change in changes],
        "compiled": None if compiled is None else {name: program._asdict() for name, program in compiled.items()},
    }


def format_memory(memory: dict[str, Any]) -> list[str]:
    """Lines of one layout's memory by owner."""
    update, rollout = (sum(memory[name].values()) for name in ("update", "rollout"))
    lines = [f"  {'memory of a device, GB':<34}{'update':>10}{'rollout':>10}"]
    for owner, size in memory["resident"].items():
        lines.append(f"  {owner:<34}{size / GB:>10.2f}{size / GB:>10.2f}")
    for owner in dict.fromkeys([*memory["update"], *memory["rollout"]]):
        cells = (f"{memory[phase][owner] / GB:>10.2f}" if owner in memory[phase] else f"{'':>10}" for phase in ("update", "rollout"))
        lines.append(f"  {owner:<34}{''.join(cells)}")
    resident = sum(memory["resident"].values())
    return [*lines, f"  {'sum':<34}{(resident + update) / GB:>10.2f}{(resident + rollout) / GB:>10.2f}"]


def _format_phases(phases: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"  {'time of a step, ms':<22}{'total':>10}{'compute':>10}{'moving':>10}  bound by"]
    for phase in phases:
        cells = (f"{1e3 * phase[name]:>10.3g}" for name in ("seconds", "compute_s", "communication_s"))
        waits = "communication" if phase["communication_s"] > phase["compute_s"] else phase["bound"]
        lines.append(f"  {phase['name']:<22}{''.join(cells)}  {waits}")
    return lines


def _format_flags(best: dict[str, Any]) -> str:
    mesh = best["mesh"]
    flags = [f"--mesh.{axis} {size}" for axis, size in mesh.items()]
    flags += [f"--grpo.batch-size {best['batch_size']}", f"--grpo.accumulation {best['accumulation']}", f"--model.remat {best['remat']}"]
    flags.append(f"--model.cache-dtype {best['cache_dtype']}")
    return " ".join([*flags, "--grpo.reuse-rollout" if best["reuse_rollout"] else "--grpo.no-reuse-rollout"])


def format_result(result: dict[str, Any], *, top: int) -> str:
    """`describe_result` for a terminal; the `top` fastest layouts."""
    work, device = result["work"], result["device"]
    measured = (
        "with each phase's measured share of them" if result["measured_shares"] else "a bound from below: no share of a ceiling is assumed"
    )
    lines = [
        f"{result['model']}: {work['prompts']} prompts of {work['prompt_tokens']} tokens, {work['group_size']} completions of "
        f"{work['new_tokens']} tokens, vocabulary {work['vocabulary']}, {work['mode']}",
        f"{result['devices']} x {device['name']}: {device['flops'] / 1e12:.4g} TFLOP/s, {device['bandwidth'] / GB:.4g} GB/s, "
        f"{device['memory'] / GB:.4g} GB ({result['usable_bytes'] / GB:.4g} usable), links {device['link'] / GB:.4g} GB/s",
        f"ceilings: {device['source']}; times are {measured}",
        "",
    ]
    if not result["fitting"]:
        return "\n".join([*lines, *_format_misfit(result)])
    fitting = result["fitting"]
    lines.append(f"{len(fitting)} meshes fit, of {result['tried']} layouts tried; the fastest layout of each:")
    lines.append(
        f"{'data':>6}{'fsdp':>6}{'tensor':>8}{'micro-batch':>13}{'x':>4}{'forward':>10}{'remat':>7}{'cache':>9}{'GB':>8}{'step s':>9}"
    )
    for one in fitting[:top]:
        mesh = one["mesh"]
        kept, remat = ("reused", "-") if one["reuse_rollout"] else ("computed", one["remat"])
        lines.append(
            f"{mesh['data']:>6}{mesh['fsdp']:>6}{mesh['tensor']:>8}{one['batch_size']:>13}{one['accumulation']:>4}{kept:>10}{remat:>7}"
            f"{one['cache_dtype']:>9}{one['memory']['peak'] / GB:>8.2f}{one['step_s']:>9.3g}"
        )
    best = fitting[0]
    lines += ["", f"the first: {_format_flags(best)}", "", *format_memory(best["memory"]), "", *_format_phases(best["phases"])]
    if result["compiled"]:
        lines.append("")
        for name, program in result["compiled"].items():
            lines.append(
                f"  compiled {name}: arguments {program['arguments'] / GB:.2f} GB, temporaries {program['temporaries'] / GB:.2f} GB "
                f"on a CPU, which holds bfloat16 matrices in float32 too ({program['seconds']:.0f} s)"
            )
    return "\n".join(lines)


def _format_misfit(result: dict[str, Any]) -> list[str]:
    smallest, usable = result["smallest"], result["usable_bytes"]
    memory, mesh = smallest["memory"], smallest["mesh"]
    phase = max(("update", "rollout"), key=lambda name: sum(memory[name].values()))
    owner, size = max((memory["resident"] | memory[phase]).items(), key=lambda item: item[1])
    over = (memory["peak"] - usable) / GB
    shape = " x ".join(str(n) for n in mesh.values())
    lines = [
        f"nothing fits: of {result['tried']} layouts the smallest, {shape} (data x fsdp x tensor) with micro-batches of "
        f"{smallest['batch_size']}, needs {memory['peak'] / GB:.2f} GB a device in its {phase}, {over:.2f} GB more than there is; "
        f"most of it is {owner} ({size / GB:.2f} GB)",
        "",
        *format_memory(memory),
        "",
        "one change at a time, and what the smallest layout then needs:",
    ]
    for change in result["changes"]:
        lines.append(f"  {change['peak'] / GB:>8.2f} GB  {'fits' if change['fits'] else 'does not fit':<14}{change['what']}")
    return lines
