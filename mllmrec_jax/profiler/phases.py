"""From the scopes and the kind of an instruction to the phase of the step, the part of the model and the kind of operation."""

from __future__ import annotations

import re
from typing import NamedTuple

from mllmrec_jax.profiler.hlo import Instruction, Module

PHASES = ("prefill", "decode", "sample", "forward", "reference", "log-prob", "loss", "backward", "recompute", "optimizer", "other")
"""Of compiled programs, in the order of a step. `forward` is the policy's pass, with the reference's where both run together."""
KINDS = ("matmul", "attention", "log-prob", "sampling", "collectives", "elementwise", "overhead", "host", "idle")
"""`attention`: scores, softmax and mixing, without projections. `elementwise`: everything else a program computes or copies.
`overhead`: a program runs and none of its operations does. `host`: no program runs and the loop does named work. `idle`: neither."""

_SCOPES = {
    "prefill": "prefill",
    "decode": "decode",
    "sample": "sample",
    "reference": "reference",
    "logprob": "log-prob",
    "loss": "loss",
    "optimizer": "optimizer",
    "accumulate": "backward",
}
_PARTS = {
    "attend": "attention",
    "attention": "projections",
    "feed_forward": "feed-forward",
    "embed": "embedding",
    "logprob": "head",
    "sample": "head",
}
_COLLECTIVE = re.compile(r"^(all-gather|all-reduce|reduce-scatter|all-to-all|collective-)")
_TRANSFORMED = re.compile(r"(?:transpose\()?jvp\(")
CONTROL = ("while", "call", "conditional", "async-start", "async-update", "async-done")
"""Instructions whose time is that of the instructions they run."""


class Label(NamedTuple):
    """What a moment of a device was spent on."""

    phase: str
    part: str
    """Of the model; empty outside of it."""
    kind: str


def _split_scopes(path: str) -> list[str]:
    """Names in a path, innermost first, without the transformations around them: jvp(layers) is layers."""
    return re.findall(r"[\w-]+", path)[::-1]


def find_phase(path: str) -> str:
    """One of PHASES."""
    if "transpose(" in path:
        # A backward pass that differentiates within itself (`model.replay`) computes the forward pass again there.
        again = "rematted_computation" in path or not _TRANSFORMED.findall(path)[-1].startswith("transpose(")
        return "recompute" if again else "backward"
    scope = next((name for name in _split_scopes(path) if name in _SCOPES), None)
    if scope is not None:
        return _SCOPES[scope]
    return "forward" if "jvp(" in path or find_part(path) else "other"


def find_part(path: str) -> str:
    """The part of the model that a path names last, or nothing."""
    return next((_PARTS[name] for name in _split_scopes(path) if name in _PARTS), "")


def find_kind(instruction: Instruction, path: str, *, matmul: bool) -> str:
    """One of KINDS that programs have."""
    if _COLLECTIVE.match(instruction.opcode):
        return "collectives"
    scopes = set(_split_scopes(path))
    for scope, kind in (("logprob", "log-prob"), ("sample", "sampling"), ("attend", "attention")):
        if scope in scopes:
            return kind
    return "matmul" if matmul else "elementwise"


def label_module(module: Module) -> dict[str, Label]:
    """The label of every instruction."""
    paths, matmuls = module.resolve_paths(), module.find_matmuls()
    return {
        one.name: Label(
            find_phase(paths[one.name]), find_part(paths[one.name]), find_kind(one, paths[one.name], matmul=one.name in matmuls)
        )
        for one in module
    }


class LayerLoop(NamedTuple):
    """How an instruction's executions number the layers."""

    inner: int
    """Executions a layer."""
    layers: int
    reverse: bool
    """Whether the loop runs from the last layer to the first."""

    def find_layer(self, occurrence: int) -> int:
        """The layer of execution number `occurrence` of a run."""
        layer = occurrence // self.inner % self.layers
        return self.layers - 1 - layer if self.reverse else layer


def find_layer_loops(module: Module) -> dict[str, LayerLoop]:
    """Of every instruction that runs once or more a layer."""
    found: dict[str, LayerLoop] = {}
    loops = module.find_loops()
    for name, body in module.computations.items():
        own = loops[name]
        place = next((i for i, loop in enumerate(own) if "layers" in _split_scopes(loop.path)), None)
        if place is None:
            continue
        inner = 1
        for loop in own[place + 1 :]:
            inner *= loop.trips
        layers = LayerLoop(inner, own[place].trips, "transpose(" in own[place].path)
        found.update(dict.fromkeys(body, layers))
    return found
