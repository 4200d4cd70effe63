"""Breakdowns of traces whose answer is known, and the rules that name phases."""

from __future__ import annotations

import gzip
import itertools
import json

import pytest
from jax.profiler import ProfileData

from mllmrec_jax.profiler.breakdown import build_breakdown, label_operations, match_modules
from mllmrec_jax.profiler.hlo import parse_module
from mllmrec_jax.profiler.phases import KINDS, PHASES, find_phase
from mllmrec_jax.profiler.timeline import write_timeline
from mllmrec_jax.profiler.trace import Operation, Span, Step, Trace, TraceError, read_trace

HLO = """HloModule jit_step, is_scheduled=true

%fused (p0: f32[4,8], p1: f32[8,8]) -> f32[4,8] {
  %p0 = f32[4,8]{1,0} parameter(0)
  %p1 = f32[8,8]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,8]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (c: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %c = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%c), index=1
  %mix = f32[4,8]{1,0} negate(%x), metadata={op_name="jit(step)/jvp(layers)/while/body/attention/attend/neg"}
  %product = f32[4,8]{1,0} fusion(%mix, %x), kind=kOutput, calls=%fused, \
metadata={op_name="jit(step)/jvp(layers)/while/body/feed_forward/dot"}
  %copied = f32[4,8]{1,0} copy(%product)
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%x, %copied)
}

%condition (c: (s32[], f32[4,8])) -> pred[] {
  %c.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[4,8]{1,0}) while(%start), condition=%condition, body=%body, metadata={op_name="jit(step)/jvp(layers)/while"}, \
backend_config={"known_trip_count":{"n":"2"}}
  %y = f32[4,8]{1,0} get-tuple-element(%loop), index=1
  %sum = f32[4,8]{1,0} all-reduce(%y), replica_groups={{0,1}}, metadata={op_name="jit(step)/transpose(jvp(layers))/psum"}
  ROOT %new = f32[4,8]{1,0} add(%sum, %y), metadata={op_name="jit(step)/optimizer/add"}
}
"""
MODULE = parse_module(HLO)


def make_operation(start: float, end: float, name: str, *, run: int = 1, device: int = 0) -> Operation:
    return Operation(start, end, device, "jit_step", 7, run, name)


# The period of step 1 is 100 to 200: layer 0 and 1 run mix and product, then a gap in the program, all-reduce and add, then the loop works.
OPERATIONS = [
    make_operation(90, 110, "product", run=0),
    make_operation(110, 170, "loop"),
    make_operation(110, 120, "mix"),
    make_operation(120, 130, "product"),
    make_operation(130, 135, "mix"),
    make_operation(135, 145, "product"),
    make_operation(150, 160, "sum"),
    make_operation(155, 165, "new"),
]
TRACE = Trace(
    sorted(OPERATIONS),
    [Span(100, 105, "host: reward"), Span(160, 175, "wait: update"), Span(175, 190, "host: load batch")],
    [Step(0, 100, 0), Step(100, 200, 1)],
)


def get_shares(breakdown: dict) -> dict[tuple[str, str], float]:
    shares: dict[tuple[str, str], float] = {}
    for row in breakdown["rows"]:
        key = row["phase"], row["kind"]
        shares[key] = shares.get(key, 0) + row["share"]
    return shares


def test_known_answer() -> None:
    breakdown = build_breakdown(TRACE, [MODULE], first=1, count=1)
    assert get_shares(breakdown) == pytest.approx(
        {
            ("forward", "matmul"): 0.30,
            ("forward", "attention"): 0.15,
            ("forward", "overhead"): 0.05,
            ("backward", "collectives"): 0.075,  # 150 to 155, and half of 155 to 160
            ("optimizer", "elementwise"): 0.075,
            ("host: load batch", "host"): 0.15,
            ("wait: update", "idle"): 0.10,
            ("between programs", "idle"): 0.10,
        }
    )
    assert sum(row["share"] for row in breakdown["rows"]) == pytest.approx(1)
    assert sum(breakdown["phases"].values()) == pytest.approx(1)
    assert sum(breakdown["kinds"].values()) == pytest.approx(1)
    assert breakdown["idle_share"] == pytest.approx(0.35)
    assert breakdown["step_s"] == pytest.approx(100e-9)
    assert breakdown["other_share"] == 0


def test_layers_are_told_apart() -> None:
    breakdown = build_breakdown(TRACE, [MODULE], first=1, count=1)
    assert breakdown["layers"] == {"forward": pytest.approx([30e-9, 15e-9])}  # the first run's product, mix, product; mix, product


def test_devices_are_averaged() -> None:
    other = [operation._replace(device=1) for operation in TRACE.operations if operation.end <= 130]
    trace = TRACE._replace(operations=sorted([*TRACE.operations, *other]))
    breakdown = build_breakdown(trace, [MODULE], first=1, count=1)
    assert breakdown["devices"] == 2
    assert sum(row["share"] for row in breakdown["rows"]) == pytest.approx(1)
    assert breakdown["kinds"]["matmul"] == pytest.approx((0.30 + 0.20) / 2)


def test_loops_are_not_work() -> None:
    assert "loop" not in {one.operation.name for one in label_operations(TRACE, [MODULE])}


def test_missing_step_is_named() -> None:
    with pytest.raises(TraceError, match=r"expected steps 1 to 2, found \[0, 1\]"):
        build_breakdown(TRACE, [MODULE], first=2, count=1)


def test_program_of_one_name_is_chosen_by_its_instructions() -> None:
    other = parse_module(HLO.replace("%product", "%unlike").replace("%mix", "%unlike.1"))
    assert match_modules(TRACE.operations, [other, MODULE]) == {("jit_step", 7): MODULE}


def test_compiler_made_instruction_gets_its_neighbours_scope() -> None:
    assert MODULE.resolve_paths()["copied"].endswith("feed_forward/dot")
    assert MODULE.find_matmuls() == {"dot.1", "product"}


@pytest.mark.parametrize(
    ("path", "phase"),
    [
        ("jit(rollout)/prefill/layers/while/body/attention/dot_general", "prefill"),
        ("jit(rollout)/decode/while/body/layers/while/body/feed_forward/dot_general", "decode"),
        ("jit(rollout)/decode/while/body/sample/dot_general", "sample"),
        ("jit(step)/while/body/jvp(layers)/while/body/attention/dot_general", "forward"),
        ("jit(step)/while/body/jvp(reference)/layers/while/body/attention/dot_general", "reference"),
        ("jit(step)/while/body/jvp(logprob)/dot_general", "log-prob"),
        ("jit(step)/while/body/transpose(jvp(logprob))/dot_general", "backward"),
        ("jit(step)/transpose(jvp(layers))/while/body/checkpoint/rematted_computation/attention/mul", "recompute"),
        ("jit(step)/transpose(jvp(layers))/while/body/jvp(attention)/attend/exp", "recompute"),
        ("jit(step)/transpose(jvp(layers))/while/body/transpose(jvp(attention))/mul", "backward"),
        ("jit(step)/while/body/jvp(layers)/while/body/attention/transpose", "forward"),
        ("jit(step)/while/body/accumulate/add", "backward"),
        ("jit(step)/optimizer/mul", "optimizer"),
        ("jit(step)/div", "other"),
        ("", "other"),
    ],
)
def test_phase_of_a_path(path: str, phase: str) -> None:
    assert find_phase(path) == phase
    assert phase in PHASES


def test_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an HLO module"):
        parse_module("HloModule nothing")


def test_timeline_names_steps_phases_and_layers() -> None:
    content = json.loads(gzip.decompress(write_timeline(TRACE, label_operations(TRACE, [MODULE]))))
    names = {event["name"] for event in content["traceEvents"] if event["ph"] == "X"}
    assert {"step 0", "step 1", "host: reward", "forward", "forward: layer 1 feed-forward", "product"} <= names
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in content["traceEvents"]:
        if event["ph"] == "X" and event["pid"] > 0:
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for slices in tracks.values():  # Perfetto wants slices of a track to nest
        ordered = sorted(slices)
        assert all(before[1] <= after[0] + 1e-9 for before, after in itertools.pairwise(ordered))


GPU = """
planes {
  name: "/device:GPU:1"
  lines { name: "Stream #13(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 500000 duration_ps: 2000000
      stats { metadata_id: 1 str_value: "fusion.3" }
      stats { metadata_id: 2 str_value: "jit_step" } stats { metadata_id: 3 int64_value: 7 } }
    events { metadata_id: 2 offset_ps: 4000000 duration_ps: 1000000 } }
  lines { name: "Host counters" timestamp_ns: 1000 events { metadata_id: 2 offset_ps: 0 duration_ps: 1000 } }
  event_metadata { key: 1 value { id: 1 name: "fusion_3" } }
  event_metadata { key: 2 value { id: 2 name: "memcpy" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  stat_metadata { key: 2 value { id: 2 name: "hlo_module" } }
  stat_metadata { key: 3 value { id: 3 name: "program_id" } }
}
planes {
  name: "/host:CPU"
  lines { name: "python" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 9000000 stats { metadata_id: 1 int64_value: 4 } }
    events { metadata_id: 2 offset_ps: 1000000 duration_ps: 1000000 } }
  event_metadata { key: 1 value { id: 1 name: "grpo" } }
  event_metadata { key: 2 value { id: 2 name: "host: reward" } }
  stat_metadata { key: 1 value { id: 1 name: "step_num" } }
}
"""


def test_gpu_streams_are_read() -> None:
    trace = read_trace(ProfileData.from_text_proto(GPU), stage="grpo")
    assert [(one.start, one.end, one.device, one.module, one.name) for one in trace.operations] == [
        (1500, 3500, 1, "jit_step", "fusion.3"),
        (5000, 6000, 1, "", "memcpy"),
    ]
    assert trace.operations[0].run != trace.operations[1].run
    assert trace.steps == [Step(1000, 10000, 4)]
    assert trace.spans == [Span(2000, 3000, "host: reward")]


@pytest.mark.parametrize(("text", "stage", "message"), [(GPU, "sft", "steps named 'sft'"), ("", "grpo", "CPU or GPU backend")])
def test_traces_without_content_are_refused(text: str, stage: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read_trace(ProfileData.from_text_proto(text), stage=stage)


def test_kinds_are_told_in_documentation_order() -> None:
    kinds = list(build_breakdown(TRACE, [MODULE], first=1, count=1)["kinds"])
    assert kinds == [kind for kind in KINDS if kind in kinds]
