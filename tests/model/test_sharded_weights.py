"""Weights made or read directly in their shards: the numbers of one device, and no device or process with more than its part."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file

from mllmrec_jax.config import ConfigError, LoraConfig, MeshConfig, ModelConfig
from mllmrec_jax.model import hf_tensors, hf_weights
from mllmrec_jax.model.hf_config import describe_model
from mllmrec_jax.model.hf_tensors import Part, StoredTensor
from mllmrec_jax.model.hf_weights import WeightsError, export_weights, load_weights, weights_hash
from mllmrec_jax.model.lora import LoraParam, add_adapters, merge_adapters
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.model.sharded import _make_initialiser, abstract_model, make_abstract, make_sharded
from mllmrec_jax.model.vocabulary import set_item_rows
from mllmrec_jax.sharding import find_shardings, make_mesh, place, use_mesh

ROOT = Path(__file__).resolve().parents[2]
MESHES = [(2, 2, 2), (1, 8, 1), (1, 2, 4)]
V = 72
MODEL = ModelConfig(
    num_layers=3, hidden_size=48, intermediate_size=88, num_heads=16, num_kv_heads=8, head_dim=4, max_position=64, dtype="float32",
    param_dtype="float32", tie_embeddings=False,
)  # fmt: skip
QWEN3_4B = ModelConfig(num_layers=36, hidden_size=2560, intermediate_size=9728, num_heads=32, num_kv_heads=8, head_dim=128)


def build(config: ModelConfig = MODEL, *, vocab_size: int = V, adapters: bool = False) -> Decoder:
    model = Decoder(config, vocab_size=vocab_size, rngs=nnx.Rngs(3))
    if adapters:
        add_adapters(model, LoraConfig(rank=2), rngs=nnx.Rngs(4))
    return model


def use_sizes(sizes: tuple[int, int, int] | None) -> Any:
    return use_mesh(None if sizes is None else make_mesh(MeshConfig(*sizes)))


def flat(model: nnx.Module) -> dict[str, Any]:
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model))}


def assert_same_and_cut(got: nnx.Module, expected: nnx.Module, sizes: tuple[int, int, int]) -> None:
    """Bit for bit, and each device holds its part of every weight that is named to be cut."""
    left, right = flat(got), flat(expected)
    assert left.keys() == right.keys()
    shardings = jax.tree.leaves(find_shardings(nnx.state(got), make_mesh(MeshConfig(*sizes))))
    for (name, variable), sharding in zip(left.items(), shardings, strict=True):
        value = variable[...]
        np.testing.assert_array_equal(np.asarray(value), np.asarray(right[name][...]), err_msg=name)
        assert value.dtype == right[name].dtype
        assert value.sharding.is_equivalent_to(sharding, value.ndim), name
        assert {shard.data.shape for shard in value.addressable_shards} == {sharding.shard_shape(value.shape)}, name
        if re.search("kernel|embedding|head", name):
            assert value.addressable_shards[0].data.size == value.size // (sizes[1] * sizes[2]), name


def check_made(sizes: tuple[int, int, int] | None, param_dtype: Any) -> None:
    config = dataclasses.replace(MODEL, param_dtype=param_dtype)
    expected = build(config, adapters=True)
    with use_sizes(sizes):
        got = make_sharded(lambda: build(config, adapters=True))
    if sizes is None:
        assert weights_hash(got) == weights_hash(expected)
    else:
        assert_same_and_cut(got, expected, sizes)


@pytest.mark.parametrize(
    ("sizes", "param_dtype"), [(None, "float32"), ((2, 2, 2), "float32"), ((1, 8, 1), "bfloat16"), ((1, 2, 4), "float32")], ids=str
)
def test_made_in_shards_is_what_one_device_makes(sizes: tuple[int, int, int] | None, param_dtype: Any) -> None:
    """In a process that compiles as users do: the code that tests' own flags give contracts a program's products and sums."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "tests/model")),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    }  # fmt: skip
    code = f"from test_sharded_weights import check_made; check_made({sizes!r}, {param_dtype!r})"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_no_device_makes_a_whole_weight(sizes: tuple[int, int, int]) -> None:
    config = dataclasses.replace(QWEN3_4B, num_layers=4)
    count = sizes[1] * sizes[2]
    with use_sizes(sizes):
        program = _make_initialiser(lambda: build(config, vocab_size=151936))[1].lower().compile()
    text = program.as_text()
    largest = max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", text))
    assert largest <= 2 * 151936 * 2560 / count  # the two words of random bits of a part of the embedding
    assert not re.search(r"(all-gather|all-reduce|all-to-all|collective-permute)(-start)?\(", text)
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.output_size_in_bytes < 1.01 * sum(x.size * 2 for x in flat(abstract_model(config, vocab_size=151936)).values()) / count
    assert memory.temp_size_in_bytes < 6 * memory.output_size_in_bytes


def test_model_without_memory() -> None:
    sizes = (1, 2, 4)
    with use_sizes(sizes):
        model = abstract_model(QWEN3_4B, vocab_size=151936)
        leaves = jax.tree.leaves(nnx.state(model))
        assert {type(leaf) for leaf in leaves} == {jax.ShapeDtypeStruct}
        assert 4.0e9 < sum(leaf.size for leaf in leaves) < 4.1e9
        held = sum(2 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
        assert held < 1.01e9
        # A step lowers on it as on arrays: arguments take what the shards take.
        graphdef, state = nnx.split(model)
        tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32)
        program = jax.jit(lambda state, prompt, length: nnx.merge(graphdef, state).prefill(prompt, length).hidden)
        memory = program.lower(state, tokens, jax.ShapeDtypeStruct((8,), jnp.int32)).compile().memory_analysis()
        assert memory is not None
        assert abs(memory.argument_size_in_bytes - held) < 2048
        adapted = make_abstract(lambda: build(adapters=True))
        assert flat(adapted)["layers.attention.q_proj.lora_a"].get_value().sharding.spec == PartitionSpec(None, "fsdp", None)
    assert jax.tree.leaves(nnx.state(abstract_model(MODEL, vocab_size=V)))[0].sharding is None


def test_sizes_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf")
    with use_sizes((1, 2, 4)):
        with pytest.raises(ConfigError, match="vocab of size 70"):
            make_sharded(lambda: build(vocab_size=70))
        with pytest.raises(ConfigError, match="vocab of size 90"):
            load_weights(tmp_path / "hf", MODEL, min_vocab_size=90)


def write_folder(folder: Path, config: ModelConfig = MODEL, **options: Any) -> dict[str, np.ndarray]:
    """A Hugging Face folder in which every parameter is random; its tensors."""
    model = build(config)
    key = jax.random.key(9)
    for variable in flat(model).values():
        key, own = jax.random.split(key)
        variable.set_value(jax.random.normal(own, variable.shape, variable.dtype))
    export_weights(model, folder, **options)
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


class Reads:
    """Counts the elements read of each tensor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count: dict[str, int] = {}
        read = StoredTensor.read

        def counting(stored: StoredTensor, part: Part) -> np.ndarray:
            block = read(stored, part)
            self.count[stored.name] = self.count.get(stored.name, 0) + block.size
            return block

        monkeypatch.setattr(StoredTensor, "read", counting)


CONFIGS = {
    "qwen3": MODEL,
    "qwen2-tied": dataclasses.replace(MODEL, family="qwen2", hidden_size=64, tie_embeddings=True),
    "llama-bfloat16": dataclasses.replace(MODEL, family="llama", param_dtype="bfloat16"),
}


@pytest.mark.parametrize(
    ("sizes", "case", "files"),
    [
        ((2, 2, 2), "qwen3", "many files"),
        ((1, 8, 1), "llama-bfloat16", "one file"),
        ((1, 2, 4), "qwen2-tied", "many files"),
        ((1, 2, 4), "qwen3", "one file"),
    ],
    ids=str,
)
def test_read_in_shards_is_what_one_device_reads(
    sizes: tuple[int, int, int], case: str, files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIGS[case]
    tensors = write_folder(tmp_path / "hf", config, max_shard_bytes=2 * 10**9 if files == "one file" else 30_000)
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) == 1) == (files == "one file")
    expected = load_weights(tmp_path / "hf", config)
    monkeypatch.setattr(hf_tensors, "READ_BYTES", 700)
    reads = Reads(monkeypatch)
    with use_sizes(sizes):
        got = load_weights(tmp_path / "hf", config)
        assert_same_and_cut(got, expected, sizes)
        assert weights_hash(got) == weights_hash(expected)
    # Every element once, also where several devices of this process hold it.
    assert reads.count == {name: value.size for name, value in tensors.items()}
    # The oracle of both: the file itself.
    stacked = np.stack([tensors[f"model.layers.{layer}.mlp.up_proj.weight"].T for layer in range(3)])
    np.testing.assert_array_equal(np.asarray(got.layers.feed_forward.up_proj.kernel[...]), stacked)


@pytest.mark.parametrize(("sizes", "param_dtype"), [((2, 2, 2), "float32"), ((1, 8, 1), "bfloat16"), ((1, 2, 4), "float32")], ids=str)
def test_rows_beyond_the_file_are_the_same_on_any_mesh(sizes: tuple[int, int, int], param_dtype: Any, tmp_path: Path) -> None:
    write_folder(tmp_path / "hf")
    config = dataclasses.replace(MODEL, param_dtype=param_dtype)
    expected = load_weights(tmp_path / "hf", config, min_vocab_size=104, seed=5)  # the last device of 8 holds only new rows
    with use_sizes(sizes):
        assert_same_and_cut(load_weights(tmp_path / "hf", config, min_vocab_size=104, seed=5), expected, sizes)


def test_nothing_is_read_before_all_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = write_folder(tmp_path / "hf")
    name = "model.layers.2.self_attn.k_norm.weight"
    reads = Reads(monkeypatch)
    for value, message in (
        (tensors[name][:3], rf"model\.safetensors: tensor '{name}': expected shape \(4,\), got \(3,\)"),
        (tensors[name].astype(np.int16), f"'{name}': expected one of BF16, .* got I16"),
    ):
        save_file(tensors | {name: value}, tmp_path / "hf" / "model.safetensors")
        with use_sizes((1, 2, 4)), pytest.raises(WeightsError, match=message):
            load_weights(tmp_path / "hf", MODEL)
    assert not reads.count


def test_faults_in_any_shard_are_named(tmp_path: Path) -> None:
    tensors = write_folder(tmp_path / "hf")
    name = "model.layers.1.mlp.down_proj.weight"  # [48, 88], cut in 2 and 4
    broken = tensors[name].copy()
    broken[30, 80] = np.nan
    save_file(tensors | {name: broken}, tmp_path / "hf" / "model.safetensors")
    with use_sizes((1, 2, 4)), pytest.raises(WeightsError, match=f"tensor '{name}' holds NaN or infinity in rows 24 to 47"):
        load_weights(tmp_path / "hf", MODEL)

    tensors = write_folder(tmp_path / "tied", dataclasses.replace(MODEL, tie_embeddings=True))
    head = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "tied" / "model.safetensors")
    with use_sizes((1, 2, 4)):
        load_weights(tmp_path / "tied", MODEL)
    head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "tied" / "model.safetensors")
    with use_sizes((1, 2, 4)), pytest.raises(WeightsError, match=r"'lm_head\.weight' differs from 'model\.embed_tokens\.weight'"):
        load_weights(tmp_path / "tied", MODEL)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_item_rows_and_adapters_on_shards(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    write_folder(tmp_path / "hf")
    texts = [[1, 3, 70], [5], [0, 71], *([i, 2] for i in range(20))]

    def grow() -> Decoder:
        model = load_weights(tmp_path / "hf", MODEL, min_vocab_size=96)
        set_item_rows(model, 72, texts)
        return model

    def adapt(model: Decoder) -> Decoder:
        add_adapters(model, LoraConfig(rank=2), rngs=nnx.Rngs(4))
        for i, (_, variable) in enumerate(nnx.to_flat_state(nnx.state(model, LoraParam))):
            variable.set_value(0.3 * jax.random.normal(jax.random.key(i), variable.shape))
        nnx.update(model, place(nnx.state(model)))
        return model

    expected = grow()
    np.testing.assert_array_equal(expected.embedding[...][73], expected.embedding[...][5])
    with use_sizes(sizes):
        got = grow()
        assert_same_and_cut(got, expected, sizes)
        assert_same_and_cut(adapt(got), adapt(expected), sizes)
        merge_adapters(got)
    merge_adapters(expected)
    for (name, value), other in zip(flat(got).items(), flat(expected).values(), strict=True):
        np.testing.assert_allclose(value[...], other[...], rtol=0, atol=1e-5, err_msg=name)
        assert value[...].sharding.is_equivalent_to(find_shardings(value, make_mesh(MeshConfig(*sizes))), value.ndim), name


# One of several processes, each with two devices: loads, exports, and says what it read, held and took.
PROGRAM = """
    import contextlib, json, sys, threading, time
    from pathlib import Path
    import jax
    from flax import nnx
    from mllmrec_jax.config import DistributedConfig, LoraConfig, MeshConfig, ModelConfig
    from mllmrec_jax.distributed import start_distributed, stop_distributed
    from mllmrec_jax.model import hf_weights
    from mllmrec_jax.model.hf_tensors import StoredTensor
    from mllmrec_jax.model.lora import add_adapters, merge_adapters
    from mllmrec_jax.model.vocabulary import set_item_rows
    from mllmrec_jax.sharding import make_mesh, place, use_mesh

    small, large, exported, coordinator, count, index = sys.argv[1:]
    start_distributed(DistributedConfig("explicit", coordinator, int(count), int(index)))
    read_part, read = StoredTensor.read, 0

    def counting(stored, part):
        global read
        block = read_part(stored, part)
        read += block.nbytes
        return block

    def anonymous():  # bytes that are ours: pages of a mapped file are the system's cache, given back at need
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

    @contextlib.contextmanager
    def watching(taken):  # appends the most memory that the block took
        peak, before, done = 0, anonymous(), False

        def watch():
            nonlocal peak
            while not done:
                peak = max(peak, anonymous())
                time.sleep(0.0005)

        thread = threading.Thread(target=watch)
        thread.start()
        yield
        done = True
        thread.join()
        taken.append(peak - before)

    StoredTensor.read = counting
    config = ModelConfig(dtype="float32", param_dtype="float32")
    with use_mesh(make_mesh(MeshConfig(1, int(count), 2))):
        model = hf_weights.load_weights(Path(small), config)  # first a small one: what JAX needs to start is not counted
        set_item_rows(model, 60, [[1, 70], [2], [40, 41]])
        add_adapters(model, LoraConfig(rank=2), rngs=nnx.Rngs(4))
        nnx.update(model, place(nnx.state(model)))
        merge_adapters(model)  # B is 0: changes nothing
        small_hash = hf_weights.weights_hash(model)
        del model
        read, taken = 0, []
        with watching(taken):
            model = hf_weights.load_weights(Path(large), config)
            state = jax.block_until_ready(nnx.state(model))
        held = sum(shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards)
        with watching(taken):
            hf_weights.export_weights(model, Path(exported))
        own = {"read": read, "held": held, "peaks": taken}
        large_hash = hf_weights.weights_hash(model)
    print(json.dumps({**own, "small": small_hash, "large": large_hash}))
    stop_distributed()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's accounting of memory")
def test_two_processes_read_hold_and_export_their_half(tmp_path: Path) -> None:
    write_folder(tmp_path / "small")
    config = dataclasses.replace(MODEL, num_layers=12, hidden_size=768, intermediate_size=2560, num_heads=8, head_dim=64)
    shapes = {name: (shape, shape.shape) for name, shape in flat(abstract_model(config, vocab_size=12288)).items()}
    tensors, rng = {}, np.random.default_rng(0)
    for name, (_, shape) in shapes.items():
        names = hf_weights._name_tensors(tuple(name.split(".")), config.num_layers)
        own = shape if len(names) == 1 else shape[:0:-1]
        tensors |= {each: rng.standard_normal(own, np.float32) for each in names}
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size > 380e6
    (tmp_path / "large").mkdir()
    save_file(tensors, tmp_path / "large" / "model.safetensors")
    described = describe_model(config, vocab_size=12288, dtype="float32", stop_ids=())
    (tmp_path / "large" / "config.json").write_text(json.dumps(described))

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }  # fmt: skip
    words = [sys.executable, "-c", textwrap.dedent(PROGRAM), tmp_path / "small", tmp_path / "large", tmp_path / "exported", address, "2"]
    started = [
        subprocess.Popen([*words, str(index)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in started]
    for process, (_, error) in zip(started, outputs, strict=True):
        assert process.returncode == 0, error
    small = load_weights(tmp_path / "small", MODEL)
    set_item_rows(small, 60, [[1, 70], [2], [40, 41]])
    expected = {"small": weights_hash(small), "large": weights_hash(load_weights(tmp_path / "large", MODEL))}
    for output, _ in outputs:
        said = json.loads(output.splitlines()[-1])
        assert {name: said[name] for name in expected} == expected
        norms = 12 * 2 * (2 * 768 + 2 * 64) * 4  # whole on each device, and read once
        assert size / 2 <= said["read"] < size / 2 + norms
        assert size / 2 <= said["held"] < size / 2 + 2 * norms
        load_peak, export_peak = said["peaks"]
        assert load_peak < said["held"] + 16e6  # blocks of 4 MiB, and as many copies as a read makes
        largest = 12288 * 768 * 4
        assert export_peak < 5 * largest + 16e6  # one, on both devices, as parts and whole, and on its way to the file
    written = load_file(tmp_path / "exported" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor)
