"""What this machine can do at most, and how near each phase of a GRPO step comes to it (Williams et al. 2009, doi:10.1145/1498765.1498785).

A phase of arithmetic intensity I (FLOPs a byte) can reach min(peak FLOP/s, I x bandwidth). FLOPs are those executed. Bytes are counted
twice: the least that has to move (`flops.py`: with these a phase's distance from its ceiling includes what fusion could still save), and
what XLA says the compiled program reads and writes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mllmrec_jax.bench.flops import Work, count_head, count_prefill, count_update, sum_work
from mllmrec_jax.bench.grpo_work import GrpoWork
from mllmrec_jax.bench.measure import find_percentiles, read_clocks, repeat_runs, time_call
from mllmrec_jax.bench.rows import make_document, make_row
from mllmrec_jax.bench.step import WARMUP
from mllmrec_jax.bench.work import NO_MESH, Phase, call_phase, compile_phase, describe_shape, find_sizes
from mllmrec_jax.config import RunConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.objectives.logprobs import completion_logprobs, encode_predicting, encode_predicting_pair
from mllmrec_jax.pages.loglog import COLOURS, Line, Mark, draw_loglog_panel, join_panels
from mllmrec_jax.sharding import current_mesh
from mllmrec_jax.train.state import merge_policy

MATMUL_SIZES = tuple(2**n for n in range(9, 15))
LONG_ENOUGH_S = 0.05
"""Matrices grow until one product takes this long: small ones are mostly the launch."""
COPY_BYTES = tuple(2**n for n in (27, 28, 29))
"""Larger than any cache; 128 to 512 MiB."""
CEILING_REPEATS = 7


class Ceilings(NamedTuple):
    """Of one device, or of all devices of a mesh together."""

    flops: float
    """Matrix products (FLOP/s)."""
    bandwidth: float
    """Bytes read and written a second."""
    rows: list[dict[str, Any]]
    """Every size measured."""


def measure_matmul(dtype: Any, size: int, *, repeats: int = CEILING_REPEATS) -> dict[str, Any]:
    """FLOP/s of [size, size] x [size, size] in `dtype`, fresh random matrices each time."""
    product = jax.jit(jnp.matmul)
    draw = jax.jit(lambda key: [jax.random.normal(k, (size, size), dtype) for k in jax.random.split(key)])
    jax.block_until_ready(product(*draw(jax.random.key(0))))
    seconds = [time_call(product, *jax.block_until_ready(draw(jax.random.key(i))))[0] for i in range(1, repeats + 1)]
    shape = {"size": size, "dtype": jnp.dtype(dtype).name}
    return make_row("matmul", seconds, shape=shape, flops_per_s=2.0 * size**3 / find_percentiles(seconds)["p50"])


def measure_copy(dtype: Any, size: int, *, repeats: int = CEILING_REPEATS) -> dict[str, Any]:
    """Bytes/s of reading and writing an array of `size` bytes, in place, so that no new pages are asked of the system."""
    count = size // jnp.dtype(dtype).itemsize
    change = jax.jit(lambda x: -x, donate_argnums=0)
    x = jax.block_until_ready(change(jnp.ones((count,), dtype)))
    seconds = []
    for _ in range(repeats):
        spent, x = time_call(change, x)
        seconds.append(spent)
    shape = {"size": size, "dtype": jnp.dtype(dtype).name}
    return make_row("copy", seconds, shape=shape, bytes_per_s=2.0 * size / find_percentiles(seconds)["p50"])


def measure_ceilings(
    dtype: Any, *, matmul_sizes: tuple[int, ...] = MATMUL_SIZES, copy_bytes: tuple[int, ...] = COPY_BYTES, repeats: int = CEILING_REPEATS
) -> Ceilings:
    """The best median over the sizes, on the first device."""
    rows = []
    with jax.set_mesh(NO_MESH):
        for size in matmul_sizes:
            rows.append(measure_matmul(dtype, size, repeats=repeats))
            if rows[-1]["p50"] > LONG_ENOUGH_S:
                break
        rows += [measure_copy(dtype, size, repeats=repeats) for size in copy_bytes]
    flops, bandwidth = (max(row[name] for row in rows if name in row) for name in ("flops_per_s", "bytes_per_s"))
    return Ceilings(flops, bandwidth, rows)


def place_phase(
    name: str,
    seconds: float,
    work: Work,
    ceilings: Ceilings,
    *,
    executed_bytes: float | None = None,
) -> dict[str, Any]:
    """Where a phase that takes `seconds` stands below the roofline.

    `share` is its roofline time, max(FLOPs / peak, least bytes / bandwidth), over its measured time.
    """
    at_peak, at_bandwidth = work.flops / ceilings.flops, work.bytes / ceilings.bandwidth
    return {
        "name": name,
        "seconds": seconds,
        "flops": work.flops,
        "bytes": {"least_formula": work.bytes, "accessed_xla": executed_bytes},
        "intensity": {"least_formula": work.flops / work.bytes, "accessed_xla": work.flops / executed_bytes if executed_bytes else None},
        "flops_per_s": work.flops / seconds,
        "roofline_s": max(at_peak, at_bandwidth),
        "bound": "compute" if at_peak >= at_bandwidth else "memory",
        "share": max(at_peak, at_bandwidth) / seconds,
    }


def _subtract(whole: Work, *parts: Work) -> Work:
    return whole.plus(*(part.times(-1) for part in parts))


def bench_roofline(config: RunConfig, *, repeats: int = 10) -> dict[str, Any]:
    """Measures the ceilings, then prefill, rollout, the update's forward pass, the log-prob operation and the whole update on fresh random
    inputs; decoding is what a rollout takes beyond its prefill, the backward pass (with the optimizer) what an update takes beyond its
    forward pass and the log-probs. Sizes as in `bench step`; the update computes its own forward pass.

    Returns:
      `ceilings` of one device (FLOP/s, bytes/s); `phases`, each placed below them (`place_phase`); and a row a program and size.
    """
    alone, mesh = measure_ceilings(jnp.dtype(config.model.dtype)), current_mesh()
    devices = 1 if mesh is None else mesh.size
    ceilings = Ceilings(devices * alone.flops, devices * alone.bandwidth, alone.rows)
    work = GrpoWork(config, find_sizes(config), steps=repeats + WARMUP)
    grpo, policy = config.grpo, work.policy
    full = grpo.mode == "full"
    pair, lora = grpo.beta > 0 and not full, None if full else grpo.lora
    accumulation = grpo.accumulation
    options = {"temperature": grpo.temperature, "entropy": True, "kl": False, "backward": "accumulate"}

    def merge(trained: Any, frozen: Any) -> Any:
        return merge_policy(policy._replace(frozen=frozen), trained)

    @jax.jit
    def prefill(trained: Any, frozen: Any, prompt: jax.Array, length: jax.Array) -> Any:
        return merge(trained, frozen).prefill(prompt, length)

    @jax.jit
    def forward(trained: Any, frozen: Any, group: GroupBatch) -> Any:
        model = merge(trained, frozen)
        return encode_predicting_pair(model, group) if pair else (encode_predicting(model, group, adapters=True), None)

    @jax.jit
    def logprob(trained: Any, frozen: Any, hidden: jax.Array, hidden_ref: jax.Array | None, group: GroupBatch) -> Any:
        head = jax.lax.stop_gradient(merge(trained, frozen).head_weight)

        def total(hidden: jax.Array) -> Any:
            out = completion_logprobs(hidden, head, group, config.logprob, hidden_ref=hidden_ref, **options)
            return jnp.sum(out.logp), out  # all of it, or the compiler would leave the reference out

        return jax.value_and_grad(total, has_aux=True)(hidden)

    prompts, sampled = work.draw_prompts(0), work.draw_completions()
    update_arguments = work.update_arguments(prompts, sampled)
    group = jax.tree.map(lambda x: x[0], update_arguments[-1].group)
    parts = count_update(config.model, work.micro, grpo, config.logprob)
    once = {name: cost.times(1 / accumulation) for name, cost in parts.items()}
    head_work = count_head(
        config.model, work.micro.completion_tokens, work.micro.vocabulary, config.logprob, job="accumulate", reference=pair
    )
    hidden = forward(work.state.trained, policy.frozen, group)
    programs: dict[str, Phase] = {
        "prefill": compile_phase(
            prefill, *work.rollout_arguments(prompts)[:-1], work=count_prefill(config.model, work.sizes, lora=lora), bytes_too=True
        ),
        "rollout": work.compile_rollout(prompts),
        "forward": compile_phase(
            forward,
            work.state.trained,
            policy.frozen,
            group,
            work=once["forward"].plus(*([once["reference"]] if pair else [])),
            bytes_too=True,
        ),
        "logprob": compile_phase(logprob, work.state.trained, policy.frozen, *hidden, group, work=head_work, bytes_too=True),
        "update": work.compile_update(prompts, sampled),
    }

    def run(repeat: int) -> dict[str, float]:
        prompts, sampled = work.draw_prompts(repeat), work.draw_completions()
        rollout_arguments = work.rollout_arguments(prompts)
        seconds = {"prefill": time_call(call_phase, programs["prefill"], rollout_arguments[:-1])[0]}
        seconds["rollout"], _ = time_call(call_phase, programs["rollout"], rollout_arguments)
        arguments = jax.block_until_ready(work.update_arguments(prompts, sampled))
        group = jax.block_until_ready(jax.tree.map(lambda x: x[0], arguments[-1].group))
        own = work.state.trained, policy.frozen
        seconds["forward"], hidden = time_call(call_phase, programs["forward"], (*own, group))
        seconds["logprob"], _ = time_call(call_phase, programs["logprob"], (*own, *hidden, group))
        seconds["update"], result = time_call(call_phase, programs["update"], arguments)
        work.take_update(result)
        seconds["decode"] = seconds["rollout"] - seconds["prefill"]
        seconds["backward"] = seconds["update"] - accumulation * (seconds["forward"] + seconds["logprob"])
        return seconds

    clocks = read_clocks()
    measured = repeat_runs(run, warmup=WARMUP, repeats=repeats, description="bench roofline")
    works = {name: program.work for name, program in programs.items()}
    moved = {name: program.executed_bytes for name, program in programs.items()}
    works["decode"] = _subtract(works["rollout"], works["prefill"])
    works["backward"] = sum_work({name: parts[name] for name in ("backward", "optimizer")})
    for name, whole, rest in (
        ("decode", "rollout", {"prefill": 1}),
        ("backward", "update", {"forward": accumulation, "logprob": accumulation}),
    ):
        known = [moved[whole], *(moved[part] for part in rest)]
        moved[name] = None if None in known else moved[whole] - sum(count * moved[part] for part, count in rest.items())  # type: ignore[operator]
    names = ("prefill", "decode", "forward", "logprob", "backward")
    timing = {name: find_percentiles(seconds) for name, seconds in measured.items()}
    phases = [place_phase(name, timing[name]["p50"], works[name], ceilings, executed_bytes=moved[name]) for name in names]
    shape = describe_shape(config, work.sizes, accumulation=accumulation)
    rows = ceilings.rows + [
        {**make_row(phase["name"], measured[phase["name"]], shape=shape), "flops_per_s": phase["flops_per_s"]} for phase in phases
    ]
    more = {"ceilings": {"flops_per_s": alone.flops, "bytes_per_s": alone.bandwidth, "devices": devices}, "phases": phases}
    return make_document("roofline", config, rows, repeats=repeats, clocks=clocks, **more)


def draw_roofline(document: dict[str, Any]) -> str:
    """The ceilings of a `bench roofline` document, its phases below them: filled at the least bytes, hollow at those XLA counts."""
    ceilings = document["ceilings"]
    peak, bandwidth = (ceilings["devices"] * ceilings[name] for name in ("flops_per_s", "bytes_per_s"))
    phases = document["phases"]
    xs = [x for phase in phases for x in phase["intensity"].values() if x] + [peak / bandwidth]
    low, high = min(xs) / 2, max(xs) * 2
    roof = [(low, low * bandwidth / 1e9), (peak / bandwidth, peak / 1e9), (high, peak / 1e9)]
    lines = [Line(f"{peak / 1e9:.4g} GFLOP/s, {bandwidth / 1e9:.3g} GB/s", roof, COLOURS[-1], dots=False)]
    marks = []
    for phase, colour in zip(phases, ("#0969da", "#cf5c00", "#1a7f37", "#8250df", "#bf3989"), strict=True):
        reached, (least, accessed) = phase["flops_per_s"] / 1e9, phase["intensity"].values()
        marks.append(Mark(phase["name"], least, reached, colour))
        if accessed:
            marks.append(Mark("", accessed, reached, colour, hollow=True))
            lines.append(Line("", [(accessed, reached), (least, reached)], colour, dots=False, dashed=True))
    device = document["provenance"]["device"]["kind"]
    axis = "FLOPs a byte (filled: least bytes, hollow: XLA's)"
    panel = draw_loglog_panel(
        lines, marks, title=f"roofline of {device}, {document['dtypes']['compute']}", x_label=axis,
        y_label="GFLOP/s", width=640, height=380,
    )  # fmt: skip
    said = "; ".join(f"{phase['name']} {phase['flops_per_s'] / 1e9:.3g} GFLOP/s, {phase['share']:.0%} of its ceiling" for phase in phases)
    return join_panels([panel], label=f"Phases of a GRPO step below the roofline: {said}", width=640, height=380)


def format_roofline(document: dict[str, Any]) -> str:
    """A line a phase for reading."""
    ceilings = document["ceilings"]
    lines = [f"ceilings: {ceilings['flops_per_s'] / 1e9:.4g} GFLOP/s in matrix products, {ceilings['bytes_per_s'] / 1e9:.4g} GB/s copying"]
    lines.append(f"{'phase':<10}{'p50 ms':>10}{'GFLOP':>10}{'FLOP/byte':>11}{'GFLOP/s':>10}{'roofline ms':>13}{'share':>7}  bound by")
    for phase in document["phases"]:
        lines.append(
            f"{phase['name']:<10}{1e3 * phase['seconds']:>10.4g}{phase['flops'] / 1e9:>10.4g}{phase['intensity']['least_formula']:>11.4g}"
            f"{phase['flops_per_s'] / 1e9:>10.4g}{1e3 * phase['roofline_s']:>13.4g}{phase['share']:>7.1%}  {phase['bound']}"
        )
    return "\n".join(lines)
