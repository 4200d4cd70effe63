"""transformers is the oracle: random tiny models of its three classes, saved by it, loaded and run by us, and back."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch", reason="the weights are compared with those that torch saves")

import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from mllmrec_jax.config import ConfigError, LoraConfig, ModelConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.model import hf_tensors, hf_weights
from mllmrec_jax.model.hf_config import read_model_config
from mllmrec_jax.model.hf_weights import WeightsError, export_adapters, export_weights, load_weights, weights_hash
from mllmrec_jax.model.kv_cache import KeyValues, make_empty_cache
from mllmrec_jax.model.lora import LoraParam, add_adapters, merge_adapters
from mllmrec_jax.model.qwen3 import Decoder

BASE = ModelConfig(dtype="float32", param_dtype="float32")
CLASSES: dict[str, tuple[Any, Any]] = {
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def make_reference(folder: Path, family: str = "qwen3", **changes: Any) -> Any:
    """A transformers model whose every parameter is random and large enough to matter, saved in `folder`."""
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 20,
        "intermediate_size": 37,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    # A multiple of the heads where transformers insists; elsewhere heads need not fill the hidden size.
    sizes |= {"qwen3": {"head_dim": 10}, "qwen2": {"hidden_size": 24}, "llama": {"hidden_size": 24, "head_dim": 10}}[family]
    shard_size = changes.pop("max_shard_size", "1GB")
    config_class, model_class = CLASSES[family]
    model = model_class(config_class(**(sizes | changes)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                value.copy_((0 if name.endswith("bias") else 1) + 0.3 * noise)
            else:
                value.copy_(noise * (1.0 if "embed" in name or "lm_head" in name else 1.5 * value.shape[1] ** -0.5))
    model.eval().save_pretrained(folder, max_shard_size=shard_size)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved untied Qwen3, for tests that then damage it."""
    make_reference(tmp_path / "hf", tie_word_embeddings=False)
    return tmp_path / "hf"


def edit_json(path: Path, **changes: Any) -> None:
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = dict(load_file(path))
    edit(tensors)
    save_file(tensors, path)


def reference_logits(reference: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.tensor([tokens])).logits[0].float().numpy()


def draw_batch(vocab_size: int, *, seed: int = 0) -> GroupBatch:
    """Ragged, with random tokens as padding: what stands there must not matter."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.array(rng.integers(0, vocab_size, shape), jnp.int32)  # noqa: E731
    return GroupBatch(draw(3, 11), jnp.array([11, 1, 6]), draw(3, 2, 5), jnp.array([[5, 2], [1, 5], [3, 4]]))


@nnx.jit
def group_logits(model: Decoder, batch: GroupBatch) -> tuple[jax.Array, jax.Array]:
    prompt, completion = model.encode_group(batch)
    return prompt @ model.head_weight.T, completion @ model.head_weight.T


def largest_difference(model: Decoder, reference: Any) -> float:
    """Between our logits of a ragged group batch and the reference's of each row alone, without padding."""
    batch = draw_batch(model.vocab_size)
    prompt, completion = map(np.asarray, group_logits(model, batch))
    differences = []
    for b, n in enumerate(batch.prompt_length.tolist()):
        for g, m in enumerate(batch.completion_length[b].tolist()):
            tokens = batch.prompt[b, :n].tolist() + batch.completion[b, g, :m].tolist()
            expected = reference_logits(reference, tokens)
            got = np.concatenate([prompt[b, :n], completion[b, g, :m]])
            differences.append(np.abs(got - expected).max())
    return float(max(differences))


@nnx.jit
def prefill(model: Decoder, prompt: jax.Array, length: jax.Array) -> tuple[jax.Array, KeyValues]:
    made = model.prefill(prompt, length)
    return jnp.argmax(made.hidden @ model.head_weight.T, axis=-1), made.cache


@nnx.jit
def decode(model: Decoder, token: jax.Array, index: jax.Array, length: jax.Array, prompt_cache: KeyValues, cache: KeyValues) -> Any:
    made = model.decode(token, index, length, prompt_cache, cache)
    return jnp.argmax(made.hidden @ model.head_weight.T, axis=-1), made.cache


def generate_greedily(model: Decoder, prompt: jax.Array, length: jax.Array, steps: int, members: int = 2) -> np.ndarray:
    """[B, G, steps]; all members of a group take the same path."""
    first, prompt_cache = prefill(model, prompt, length)
    token = jnp.repeat(first[:, None], members, axis=1)
    cache = make_empty_cache(prompt_cache, members, steps)
    tokens = [token]
    for index in range(steps - 1):
        token, cache = decode(model, token, jnp.int32(index), length, prompt_cache, cache)
        tokens.append(token)
    return np.stack([np.asarray(token) for token in tokens], axis=-1)


PARITY = {
    "qwen3-tied": ("qwen3", {}),
    "qwen3-untied": ("qwen3", {"tie_word_embeddings": False, "num_key_value_heads": 6, "rms_norm_eps": 1e-5}),
    "qwen2-tied": ("qwen2", {"num_key_value_heads": 1}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "llama-tied": ("llama", {"num_key_value_heads": 3}),
    "llama-untied": ("llama", {"tie_word_embeddings": False, "hidden_size": 36, "head_dim": None}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
}


@pytest.mark.parametrize("case", PARITY)
def test_same_logits_and_greedy_tokens_as_transformers(case: str, tmp_path: Path) -> None:
    family, changes = PARITY[case]
    reference = make_reference(tmp_path / "hf", family, **changes)
    model = load_weights(tmp_path / "hf", BASE)
    assert np.abs(reference_logits(reference, [1, 2, 3])).max() > 1  # or the tolerance would say nothing
    assert largest_difference(model, reference) < 2e-4

    batch = draw_batch(model.vocab_size, seed=1)
    got = generate_greedily(model, batch.prompt, batch.prompt_length, steps=12)
    for b, n in enumerate(batch.prompt_length.tolist()):
        prompt = torch.tensor([batch.prompt[b, :n].tolist()])
        with torch.no_grad():
            out = reference.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert got[b].tolist() == [out[0, n:].tolist()] * 2


@pytest.mark.parametrize("case", PARITY)
def test_export_is_the_same_model_to_transformers(case: str, tmp_path: Path) -> None:
    family, changes = PARITY[case]
    reference = make_reference(tmp_path / "hf", family, **changes)
    model = load_weights(tmp_path / "hf", BASE)
    export_weights(model, tmp_path / "ours", stop_ids=(5, 7))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is CLASSES[family][1]
    assert again.config.eos_token_id == [5, 7]
    tokens = list(range(30))
    np.testing.assert_array_equal(reference_logits(again, tokens), reference_logits(reference, tokens))
    config, vocab_size = read_model_config(tmp_path / "ours", BASE)
    assert (config, vocab_size) == read_model_config(tmp_path / "hf", BASE)
    assert weights_hash(load_weights(tmp_path / "ours", BASE)) == weights_hash(model)


def test_shards_load_and_export(tmp_path: Path) -> None:
    reference = make_reference(tmp_path / "hf", tie_word_embeddings=False, max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    model = load_weights(tmp_path / "hf", BASE)
    assert largest_difference(model, reference) < 2e-4
    export_weights(model, tmp_path / "ours", max_shard_bytes=20_000)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 3
    assert max(path.stat().st_size for path in files) < 20_000 + 4_000  # and a header
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_array_equal(reference_logits(again, [3, 1, 4]), reference_logits(reference, [3, 1, 4]))


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_weights_are_stored_in_the_asked_dtype(stored: str, folder: Path) -> None:
    dtype = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}[stored]
    edit_tensors(folder, lambda tensors: tensors.update({name: value.astype(dtype) for name, value in tensors.items()}))
    tensors = load_file(folder / "model.safetensors")
    for param_dtype in ("float32", "bfloat16"):
        model = load_weights(folder, ModelConfig(param_dtype=param_dtype))
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model))} == {param_dtype}
        for layer in range(3):
            expected = tensors[f"model.layers.{layer}.self_attn.k_proj.weight"].astype(param_dtype).T
            np.testing.assert_array_equal(np.asarray(model.layers.attention.k_proj.kernel[...][layer]), expected)


def test_half_precision_export_rounds_once(folder: Path, tmp_path: Path) -> None:
    model = load_weights(folder, BASE)
    export_weights(model, tmp_path / "ours", dtype="bfloat16")
    assert weights_hash(load_weights(tmp_path / "ours", ModelConfig())) == weights_hash(load_weights(folder, ModelConfig()))
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16


def test_small_read_blocks_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights_hash(load_weights(folder, BASE))
    monkeypatch.setattr(hf_tensors, "READ_BYTES", 300)
    assert weights_hash(load_weights(folder, BASE)) == whole


def test_added_vocabulary_rows_are_distinct_and_like_the_others(tmp_path: Path) -> None:
    make_reference(tmp_path / "hf", vocab_size=400, tie_word_embeddings=False)
    plain = load_weights(tmp_path / "hf", BASE, min_vocab_size=400)
    grown = load_weights(tmp_path / "hf", BASE, min_vocab_size=900, seed=3)
    assert (plain.vocab_size, grown.vocab_size) == (400, 900)
    assert plain.head is not None
    assert grown.head is not None
    for before, after in ((plain.embedding[...], grown.embedding[...]), (plain.head[...], grown.head[...])):
        np.testing.assert_array_equal(after[:400], before)
        new = np.asarray(after[400:])
        assert len(np.unique(new, axis=0)) == 500
        np.testing.assert_allclose(new.mean(axis=0), before.mean(axis=0), atol=0.3)
        np.testing.assert_allclose(new.std(axis=0), before.std(axis=0), rtol=0.2)
    assert weights_hash(grown) == weights_hash(load_weights(tmp_path / "hf", BASE, min_vocab_size=900, seed=3))


@pytest.mark.parametrize("rope", [{"rope_theta": 5000.0}, {"rope_theta": 500.0, "rope_scaling": LLAMA3_ROPE}])
def test_config_of_older_transformers_is_read(rope: dict[str, Any], tmp_path: Path) -> None:
    parameters = rope.get("rope_scaling", {"rope_type": "default", "rope_theta": 5000.0})
    reference = make_reference(tmp_path / "hf", "llama", rope_parameters=parameters)
    new = read_model_config(tmp_path / "hf", BASE)
    edit_json(tmp_path / "hf" / "config.json", rope_parameters=..., layer_types=..., dtype=..., torch_dtype="float32", **rope)
    assert read_model_config(tmp_path / "hf", BASE) == new
    assert largest_difference(load_weights(tmp_path / "hf", BASE), reference) < 2e-4


def test_published_qwen3_config_is_read(tmp_path: Path) -> None:
    published = {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    config, vocab_size = read_model_config(tmp_path, ModelConfig(dropout=0.1, remat="dots"))
    assert vocab_size == 151936
    assert (config.family, config.num_layers, config.head_dim, config.rope_theta) == ("qwen3", 28, 128, 1e6)
    assert (config.tie_embeddings, config.max_position, config.dropout, config.remat) == (True, 40960, 0.1, "dots")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "key 'architectures': expected one of Qwen3ForCausalLM, .* got .*Mistral"),
        ({"architectures": ...}, "key 'architectures': expected .* got nothing"),
        ({"hidden_act": "gelu"}, r"key 'hidden_act': expected 'silu' .* got 'gelu'"),
        ({"attention_bias": True}, "key 'attention_bias': expected False"),
        ({"quantization_config": {"quant_method": "awq"}}, "key 'quantization_config'"),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "key 'layer_types': expected 3 times 'full_attention'",
        ),
        ({"layer_types": ..., "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, "key 'use_sliding_window'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "'rope_parameters.rope_type': .* got 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'rope_scaling.type': .* got 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'rope_parameters.low_freq_factor': .* got nothing"),
        ({"rope_parameters": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "high_freq_factor': expected more than"),
        ({"partial_rotary_factor": 0.5}, "key 'partial_rotary_factor': expected 1.0"),
        ({"hidden_size": ...}, "key 'hidden_size': expected a positive number, got nothing"),
        ({"num_hidden_layers": 2.5}, "key 'num_hidden_layers': expected an integer, got 2.5"),
        ({"vocab_size": "61"}, "key 'vocab_size': expected a positive number, got '61'"),
        ({"num_key_value_heads": 4}, "key 'num_attention_heads': expected a multiple of num_key_value_heads = 4, got 6"),
        ({"head_dim": 5}, "key 'head_dim': expected an even number"),
        ({"tie_word_embeddings": "no"}, "key 'tie_word_embeddings': expected true or false, got 'no'"),
    ],
)
def test_config_that_we_would_compute_differently_is_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ConfigError, match=message) as error:
        load_weights(folder, BASE)
    assert str(folder / "config.json") in str(error.value)


def test_window_above_every_layer_is_not_in_use(folder: Path) -> None:
    edit_json(folder / "config.json", layer_types=..., use_sliding_window=True, sliding_window=8, max_window_layers=3)
    load_weights(folder, BASE)


def test_missing_and_broken_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        read_model_config(tmp_path, BASE)
    for content in (b"{", b"[]", b"\xff"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"config\.json: (not valid JSON|expected a JSON object)"):
            read_model_config(tmp_path, BASE)


NORM, GATE = "model.layers.1.self_attn.q_norm.weight", "model.layers.2.mlp.gate_proj.weight"


def _poison(tensors: dict[str, np.ndarray], value: float) -> None:
    tensors[GATE][36, 3] = value


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(NORM), f"1 of 36 tensors are missing: {NORM}"),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t[GATE]}), r"1 tensors have no place .*: model\.layers\.3\.mlp"),
        (lambda t: t.update({NORM: t[NORM][:-1]}), rf"'{NORM}': expected shape \(10,\), got \(9,\)"),
        (lambda t: t.update({GATE: t[GATE].T.copy()}), rf"'{GATE}': expected shape \(37, 20\), got \(20, 37\)"),
        (lambda t: t.update({GATE: t[GATE].astype(np.int8)}), rf"'{GATE}': expected one of BF16, .* got I8"),
        (lambda t: _poison(t, np.nan), rf"model\.safetensors: tensor '{GATE}' holds NaN or infinity in rows 0 to 36"),
        (lambda t: _poison(t, -np.inf), f"'{GATE}' holds NaN or infinity"),
        (lambda t: t.update({GATE: t[GATE].astype(np.float64) + 1e300}), f"'{GATE}' holds NaN or infinity"),
    ],
)
def test_wrong_tensors_are_named(edit: Callable[[dict[str, np.ndarray]], Any], message: str, folder: Path) -> None:
    edit_tensors(folder, edit)
    with pytest.raises(WeightsError, match=message):
        load_weights(folder, BASE)


def test_known_duplicates_are_tolerated(tmp_path: Path) -> None:
    make_reference(tmp_path / "hf")
    expected = weights_hash(load_weights(tmp_path / "hf", BASE))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32)}
    edit_tensors(tmp_path / "hf", lambda t: t.update(extra | {"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert weights_hash(load_weights(tmp_path / "hf", BASE)) == expected
    edit_tensors(tmp_path / "hf", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(WeightsError, match=r"ties the head .* 'lm_head\.weight' differs"):
        load_weights(tmp_path / "hf", BASE)


def test_damaged_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(WeightsError, match=r"model\.safetensors: not a whole safetensors file"):
        load_weights(folder, BASE)
    weights.write_bytes(whole)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(WeightsError, match="got both"):
        load_weights(folder, BASE)
    weights.unlink()
    for listed in ({"a": "gone.safetensors"}, {"a": "../hf/config.json"}, {"a": 3}):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
        with pytest.raises(WeightsError, match="expected the name of a file in"):
            load_weights(folder, BASE)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(WeightsError, match="'weight_map'"):
        load_weights(folder, BASE)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"got neither; pytorch_model\.bin may hold pickled code and is never loaded"):
        load_weights(folder, BASE)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    make_reference(tmp_path / "hf", max_shard_size="20KB")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={name: file for name, file in listed.items() if name != NORM})
    with pytest.raises(WeightsError, match=f"does not list what the files hold: {NORM}"):
        load_weights(tmp_path / "hf", BASE)
    edit_json(index, weight_map=listed | {"copy": "copy.safetensors"})
    shutil.copy(tmp_path / "hf" / listed[NORM], tmp_path / "hf" / "copy.safetensors")
    with pytest.raises(WeightsError, match=r"is in .* too"):
        load_weights(tmp_path / "hf", BASE)


MEMORY_PROBE = """
    import sys, threading, time
    from pathlib import Path
    import jax, jax.numpy as jnp
    from mllmrec_jax.config import ModelConfig
    from mllmrec_jax.model.hf_weights import load_weights

    def anonymous():  # bytes that are ours: pages of a mapped file are the system's cache, given back at need
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

    config = ModelConfig(dtype="float32", param_dtype="float32")
    jnp.zeros(3).block_until_ready()
    load_weights(Path(sys.argv[1]), config)  # a small one first: what JAX needs to start is not counted
    peak = before = anonymous()
    done = False
    def watch():
        global peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.0005)
    thread = threading.Thread(target=watch)
    thread.start()
    model = load_weights(Path(sys.argv[2]), config)
    jax.block_until_ready(model.embedding[...])
    done = True
    thread.join()
    print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's accounting of memory")
def test_loading_holds_no_second_copy(folder: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.mkdir()
    sizes = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 2304}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    shutil.copy(folder / "config.json", large)
    edit_json(large / "config.json", vocab_size=8192, tie_word_embeddings=True, layer_types=..., **sizes, **heads)
    config, vocab_size = read_model_config(large, BASE)
    shapes = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: Decoder(config, vocab_size=vocab_size, rngs=nnx.Rngs(0)))))
    tensors = {}
    for path, variable in shapes:
        names = hf_weights._name_tensors(tuple(map(str, path)), config.num_layers)
        shape = variable.shape if len(names) == 1 else variable.shape[1:]
        tensors |= {name: np.full(shape[::-1] if path[-1] == "kernel" else shape, 0.5, np.float32) for name in names}
    save_file(tensors, large / "model.safetensors")
    size = sum(tensor.nbytes for tensor in tensors.values())
    del tensors
    assert size > 150e6
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY_PROBE), folder, large],
        env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 0.95 * size < int(done.stdout) < 1.3 * size


def test_hash_sees_every_change_of_the_base_and_no_adapter(folder: Path) -> None:
    model = load_weights(folder, BASE)
    expected = weights_hash(model)
    assert len(expected) == 32
    assert weights_hash(nnx.state(model)) == expected
    kernel = model.layers.attention.q_proj.kernel
    value = kernel[...]
    for changed in (value.at[1, 2, 3].add(1e-6), value.at[0].set(value[1]).at[1].set(value[0]), value.at[:, 0].set(value[:, 1])):
        kernel.set_value(changed)
        assert weights_hash(model) != expected
    kernel.set_value(value)
    add_adapters(model, LoraConfig(rank=2), rngs=nnx.Rngs(0))
    assert weights_hash(model) == expected
    for _, variable in nnx.to_flat_state(nnx.state(model, LoraParam)):
        variable.set_value(variable[...] + 0.1)
    assert weights_hash(model) == expected
    merge_adapters(model)
    assert weights_hash(model) != expected
    half = nnx.state(load_weights(folder, ModelConfig()))
    assert weights_hash(half) != expected


def test_hash_is_of_dtype_and_place(folder: Path) -> None:
    hashes = set()
    for row in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [-0.0, 0.0, 1.0]):
        for dtype in (jnp.float32, jnp.bfloat16):
            for shape in ((3,), (1, 3), (3, 1)):
                hashes.add(weights_hash(nnx.State({"w": nnx.Param(jnp.array(row, dtype).reshape(shape))})))
    assert len(hashes) == 4 * 2 * 3


def test_export_refuses_what_it_would_spoil(folder: Path, tmp_path: Path) -> None:
    model = load_weights(folder, BASE)
    with pytest.raises(WeightsError, match="expected a folder that does not exist yet"):
        export_weights(model, folder)
    add_adapters(model, LoraConfig(rank=2), rngs=nnx.Rngs(0))
    with pytest.raises(WeightsError, match="carries adapters; call merge_adapters first"):
        export_weights(model, tmp_path / "ours")
    merge_adapters(model)
    model.norm.weight.set_value(model.norm.weight[...].at[3].set(jnp.nan))
    with pytest.raises(WeightsError, match=r"'model\.norm\.weight' holds NaN or infinity; nothing was written"):
        export_weights(model, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_an_export_that_cannot_be_written_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    model = load_weights(folder, BASE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # bytes of a file: the second write past it fails
    try:
        with pytest.raises(OSError, match=r"File too large.*ours"):
            export_weights(model, tmp_path / "ours")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_export_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    config = dataclasses.replace(BASE, num_layers=8, hidden_size=128, intermediate_size=512)
    model = Decoder(config, vocab_size=600, rngs=nnx.Rngs(0))
    export_weights(model, tmp_path / "first")  # compiles
    tracemalloc.start()
    try:
        export_weights(model, tmp_path / "second")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    largest, size = 600 * 128 * 4, (tmp_path / "second" / "model.safetensors").stat().st_size
    assert peak < 2.5 * largest < size / 5
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == (tmp_path / "first" / "model.safetensors").read_bytes()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks transformers so
@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), LoraConfig().targets])
def test_adapters_load_in_peft(targets: Any, folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load_weights(folder, BASE)
    with pytest.raises(WeightsError, match="carries no adapters"):
        export_adapters(model, tmp_path / "adapters", base_model=str(folder))
    add_adapters(model, LoraConfig(rank=3, alpha=7.0, targets=targets), rngs=nnx.Rngs(0))
    key = jax.random.key(0)
    for _, variable in nnx.to_flat_state(nnx.state(model, LoraParam)):
        key, own = jax.random.split(key)
        variable.set_value(0.3 * jax.random.normal(own, variable.shape))
    export_adapters(model, tmp_path / "adapters", base_model=str(folder))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    plain = reference_logits(base.eval(), [1, 2, 3])
    reference = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    assert np.abs(reference_logits(reference, [1, 2, 3]) - plain).max() > 0.1
    assert largest_difference(model, reference) < 2e-4


# stories260K: llama2.c's file of a real trained model. Header of 7 int32, then float32 in this order; rotary pairs are neighbours there.


def convert_stories(source: Path, folder: Path) -> None:
    raw = source.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("7i", raw[:28])
    values = np.frombuffer(raw, np.float32, offset=28)
    position = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal position
        size = int(np.prod(shape))
        position += size
        return values[position - size : position].reshape(shape)

    d = dim // heads
    embedding = take(vocab, dim)
    stacked = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": take(layers, heads * d, dim),
        "self_attn.k_proj": take(layers, kv_heads * d, dim),
        "self_attn.v_proj": take(layers, kv_heads * d, dim),
        "self_attn.o_proj": take(layers, dim, heads * d),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }
    norm = take(dim)
    take(2, length, d // 2)  # tables of cosines and sines
    assert position == len(values)
    for name in ("self_attn.q_proj", "self_attn.k_proj"):
        rows = stacked[name].reshape(layers, -1, d // 2, 2, dim)
        stacked[name] = rows.swapaxes(2, 3).reshape(layers, -1, dim)  # (0, 1), (2, 3), ... -> first half, second half
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm}
    for name, value in stacked.items():
        tensors |= {f"model.layers.{layer}.{name}.weight": np.ascontiguousarray(value[layer]) for layer in range(layers)}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    described = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": dim, "intermediate_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": length, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described))


def read_pieces(source: Path) -> list[bytes]:
    raw, position, pieces = source.read_bytes(), 4, []
    while position < len(raw):
        _, size = struct.unpack_from("fi", raw, position)
        pieces.append(raw[position + 8 : position + 8 + size])
        position += 8 + size
    return pieces


def test_real_weights_tell_a_story(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "tiny-weights" / "stories260K"
    convert_stories(source / "stories260K.bin", tmp_path / "hf")
    model = load_weights(tmp_path / "hf", BASE)
    tokens = generate_greedily(model, jnp.array([[1]]), jnp.array([1]), steps=96, members=1)[0, 0]
    pieces = read_pieces(source / "tok512.bin")
    assert len(pieces) == model.vocab_size
    story = b"".join(pieces[token] for token in tokens).decode().strip()
    assert story.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert largest_difference(model, reference) < 2e-4
