"""What would run on an NVIDIA GPU, made on a machine without one: `make test-gpu-lowering`.

JAX lowers for a platform that is not there, and jax-triton compiles every Triton kernel to PTX while it does.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from mllmrec_jax.config import GrpoConfig, LogprobConfig, LoraConfig, ModelConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.model.lora import add_adapters
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.train.grpo_step import GrpoBatch, make_grpo_step
from mllmrec_jax.train.state import init_state, make_optimizer, split_policy
from mllmrec_kernels.logprob_kl import VocabSharding, compute_logprobs
from mllmrec_kernels.triton_launch import DEVICE_VARIABLE, collect_launches

pytestmark = [
    pytest.mark.gpu_lowering,
    pytest.mark.skipif(
        DEVICE_VARIABLE not in os.environ, reason=f"needs jax-triton, and {DEVICE_VARIABLE} to name a GPU: run `make test-gpu-lowering`"
    ),
]

N, V, D = 16384, 151936, 2560
MODES: dict[str, dict[str, Any]] = {
    "values": {"entropy": True},
    "accumulate": {"entropy": True, "backward": "accumulate"},
    "accumulate, reference": {"kl": True, "backward": "accumulate"},
    "recompute": {"entropy": True, "backward": "recompute"},
    "recompute, exact KL": {"entropy": True, "kl": True, "backward": "recompute"},
}


def make_function(options: dict[str, Any], **more: Any) -> tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]:
    """A loss of everything asked for, or its gradient where the mode has one (to `hidden`; recomputing, to `head` too), and its inputs."""

    def loss(hidden: jax.Array, head: jax.Array, hidden_ref: jax.Array, target: jax.Array) -> jax.Array:
        reference = {"hidden_ref": hidden_ref} if options.get("kl") else {}
        out = compute_logprobs(hidden, head, target, **reference, **{"implementation": "triton", **options, **more})
        return sum((jnp.sum(x) for x in (out.logp, out.entropy, out.kl) if x is not None), jnp.float32(0))

    backward = options.get("backward")
    function = jax.value_and_grad(loss, argnums=(0, 1) if backward == "recompute" else 0) if backward else loss
    hidden, head = jax.ShapeDtypeStruct((N, D), jnp.bfloat16), jax.ShapeDtypeStruct((V, D), jnp.bfloat16)
    return function, (hidden, head, hidden, jax.ShapeDtypeStruct((N,), jnp.int32))


def lower(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """The StableHLO operation of the whole program, lowered for CUDA."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    module: Any = lowered.compiler_ir("stablehlo")
    return module.operation


def walk(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from walk(inner.operation)


def list_kernels(program: Any) -> list[str]:
    """PTX of every Triton kernel that the program calls."""
    calls = [op for op in walk(program) if op.name == "stablehlo.custom_call" and "triton" in str(op.attributes["call_target_name"])]
    payloads = [zlib.decompress(call.attributes["backend_config"].value_bytes) for call in calls]
    return [payload[payload.index(b".version") :].decode(errors="replace") for payload in payloads]


def find_names(kernels: list[str]) -> set[str]:
    return {match for ptx in kernels for match in re.findall(r"\.entry (\w+)\(", ptx)}


def list_buffers(program: Any) -> dict[tuple[int, ...], int]:
    """Bytes of the largest value of each shape that any operation makes."""
    sizes: dict[tuple[int, ...], int] = {}
    for operation in walk(program):
        for value in operation.results:
            if match := re.fullmatch(r"tensor<((?:\d+x)*)[a-z]+(\d+)>", str(value.type)):
                shape = tuple(int(x) for x in match[1].split("x") if x)
                sizes[shape] = max(sizes.get(shape, 0), math.prod(shape) * max(int(match[2]) // 8, 1))
    return sizes


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Any]:
    options = MODES[request.param]
    return options, lower(*make_function(options))


def test_every_kernel_is_in_the_program(mode: tuple[dict[str, Any], Any]) -> None:
    options, program = mode
    kernels = list_kernels(program)
    function, arguments = make_function(options)
    with collect_launches() as launches:
        jax.eval_shape(function, *arguments)
    assert launches and find_names(kernels) == {launch.kernel.__name__ for launch in launches}
    for ptx in kernels:
        assert ".target sm_90a" in ptx and "wgmma.mma_async" in ptx


def test_tokens_by_vocabulary_is_never_held(mode: tuple[dict[str, Any], Any]) -> None:
    """Every buffer but a head's gradient stays under the promised 0.6 GB; the logits alone would be 5 GB."""
    options, program = mode
    sizes = list_buffers(program)
    if options.get("backward") == "recompute":
        assert sizes.pop((V, D)) == V * D * 4  # summed in float32
    assert sizes.pop((V, D), 0) <= V * D * 2  # zeros that nothing reads
    assert not {shape: size for shape, size in sizes.items() if size > 0.6e9}


@pytest.mark.parametrize(("implementation", "held"), [("reference", True), ("xla_chunked", False)])
def test_other_implementations_lower_without_kernels(implementation: str, held: bool) -> None:
    program = lower(*make_function(MODES["recompute, exact KL"], implementation=implementation))
    assert not list_kernels(program)
    sizes = {shape: size for shape, size in list_buffers(program).items() if shape != (V, D)}
    assert max(sizes.values()) == (N * V * 4 if held else 1024 * V * 4)


@pytest.mark.parametrize("name", ["accumulate", "recompute, exact KL"])
def test_parts_of_the_vocabulary_each_have_their_kernel(name: str) -> None:
    """Rows cut in two, vocabulary in four: each device's kernels are compiled for its own part."""
    mesh = AbstractMesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = VocabSharding(mesh, row_axes=("fsdp",), vocab_axes=("tensor",))  # type: ignore[arg-type]
    whole, parts = (lower(*make_function(MODES[name], sharding=s)) for s in (None, sharding))
    assert find_names(list_kernels(parts)) == find_names(list_kernels(whole))
    assert not [shape for shape, size in list_buffers(parts).items() if size > 0.6e9 and shape != (V, D)]


@pytest.mark.parametrize("estimator", ["k3", "exact"])
def test_the_grpo_step_calls_the_kernels(estimator: Literal["k3", "exact"]) -> None:
    """The whole update of a model with adapters: k3 runs the accumulate kernels, the exact KL those that compute logits again."""
    config = ModelConfig(num_layers=2, hidden_size=128, intermediate_size=256, num_heads=4, num_kv_heads=2, head_dim=32, max_position=128)
    grpo = GrpoConfig(mode="lora", group_size=4, max_new_tokens=8, kl_estimator=estimator, lora=LoraConfig(rank=4))
    model = Decoder(config, vocab_size=4096, rngs=nnx.Rngs(0))
    add_adapters(model, grpo.lora, rngs=nnx.Rngs(1))
    policy, optimizer = split_policy(model, "lora"), make_optimizer(grpo.optimizer, 10)

    def integers(*shape: int) -> jax.Array:
        return jnp.zeros((1, *shape), jnp.int32)

    group = GroupBatch(integers(2, 16), integers(2), integers(2, 4, 8), integers(2, 4))
    batch = GrpoBatch(group, jnp.zeros((1, 2, 4)), jnp.zeros((1, 2, 4, 8)), None)
    step = make_grpo_step(policy, optimizer, grpo, LogprobConfig(implementation="triton"))
    program = lower(step, (init_state(policy.trained, optimizer), policy.frozen, None, batch))
    backward = {"mean_head_kernel"} if estimator == "k3" else {"logit_gradient_kernel"}
    assert find_names(list_kernels(program)) == {"others_kernel"} | backward
