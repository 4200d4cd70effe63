"""Weights from and to Hugging Face folders (safetensors, one file or sharded), and their content hash.

A layer's tensor `model.layers.3.mlp.up_proj.weight` [out, in] is slice 3 of our stacked kernel [L, in, out]. Of each tensor a process
reads the rows and columns that its devices hold, and nothing else. Written, tensors pass through the host one by one.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllmrec_jax.config import ModelConfig
from mllmrec_jax.data.atomic import new_folder
from mllmrec_jax.distributed import is_main_process
from mllmrec_jax.model.hf_config import describe_model, read_model_config
from mllmrec_jax.model.hf_tensors import (
    FLOATS,
    INDEX,
    SINGLE,
    Part,
    StoredTensor,
    WeightsError,
    copy_part,
    list_some,
    open_tensors,
    read_blocks,
    read_checked,
    write_tensors,
)
from mllmrec_jax.model.lora import LoraParam, LoraScale
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.model.sharded import abstract_model
from mllmrec_jax.progress import track
from mllmrec_jax.sharding import read_whole

ALIGNMENT = 64  # bytes
_FIXED_NAMES = {("embedding",): "model.embed_tokens.weight", ("norm", "weight"): "model.norm.weight", ("head",): "lm_head.weight"}
_TABLES = (("embedding",), ("head",))
_ROOM_NAMES = {
    "attention": "self_attn",
    "feed_forward": "mlp",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
}

ParameterPath = tuple[str, ...]


def _name_tensors(path: ParameterPath, num_layers: int) -> list[str]:
    """Hugging Face's name of a parameter: one, or one a layer."""
    if path in _FIXED_NAMES:
        return [_FIXED_NAMES[path]]
    _, room, *middle, leaf = path
    suffix = ".".join([_ROOM_NAMES[room], *middle, "weight" if leaf == "kernel" else leaf])
    return [f"model.layers.{layer}.{suffix}" for layer in range(num_layers)]


def _flat_parameters(model: nnx.Module | Mapping[Any, Any]) -> dict[ParameterPath, Any]:
    state: Any = nnx.state(model) if isinstance(model, nnx.Module) else model
    return {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def _is_adapter(variable: Any) -> bool:
    return isinstance(variable, LoraParam | LoraScale)


def _allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array, aligned so that `jax.device_put` on the CPU takes its memory over instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _add_rows(stored: StoredTensor, part: Part, destination: np.ndarray, seed: int) -> None:
    """Fills the rows that `part` has beyond the stored ones from a normal distribution with these' mean and deviation by column.

    Rows that differ, because with frozen base weights they are all that tells the new tokens apart. A process that holds such rows reads
    all stored ones for it, in blocks.
    """
    rows, columns = part
    known, width = stored.shape
    total, squares = np.zeros(len(columns)), np.zeros(len(columns))
    for _, block in read_checked(stored, (range(known), columns), destination.dtype):
        block = block.astype(np.float64)
        total += block.sum(axis=0)
        squares += np.square(block).sum(axis=0)
    mean = total / known
    deviation = np.sqrt(np.maximum(squares / known - np.square(mean), 0))
    rng = np.random.default_rng(seed)
    for row in range(known, rows.stop):
        noise = rng.standard_normal(width)  # of every new row, so that each is the same wherever it lies
        if row >= rows.start:
            destination[row - rows.start] = mean + deviation * noise[columns.start : columns.stop]


def _read_vector(stored: StoredTensor, part: Part, dtype: np.dtype) -> np.ndarray:
    buffer = _allocate(tuple(map(len, part)), dtype)
    copy_part(stored, part, buffer)
    return buffer


def _read_stack(layers: list[StoredTensor], part: Part, dtype: np.dtype) -> np.ndarray:
    """`part` of a parameter [L, in, out] or [L, n], from each layer's [out, in] or [n]."""
    buffer = _allocate(tuple(map(len, part)), dtype)
    for place, layer in enumerate(part[0]):
        copy_part(layers[layer], part[:0:-1], buffer[place, ...].T)
    return buffer


def _read_table(stored: StoredTensor, twin: StoredTensor | None, part: Part, dtype: np.dtype, seed: int) -> np.ndarray:
    """`part` of an embedding or head [V, D], whose rows may be more than the stored ones; `twin` must hold the same."""
    buffer = _allocate(tuple(map(len, part)), dtype)
    rows, columns = part
    here = (range(rows.start, max(rows.start, min(rows.stop, stored.shape[0]))), columns)
    copy_part(stored, here, buffer)
    if twin is not None:
        blocks = zip(read_blocks(twin, here), read_blocks(stored, here), strict=True)
        if not all(np.array_equal(ours, theirs) for (_, ours), (_, theirs) in blocks):
            raise WeightsError(f"{twin.file}: config.json ties the head to the embedding, but '{twin.name}' differs from '{stored.name}'")
    if rows.stop > stored.shape[0]:
        _add_rows(stored, part, buffer, seed)
    return buffer


def _make_array(like: jax.ShapeDtypeStruct, read: Callable[[Part], np.ndarray]) -> jax.Array:
    """The array whose parts `read` gives: of every part that devices of this process hold, once, and one after the other on the host."""
    whole = tuple(map(range, like.shape))
    if like.sharding is None:
        return jax.device_put(read(whole))
    devices: dict[Part, list[Any]] = {}
    for device, index in like.sharding.addressable_devices_indices_map(like.shape).items():
        part = tuple(indices[axis] for indices, axis in zip(whole, index or (), strict=True))
        devices.setdefault(part, []).append(device)
    pieces: list[jax.Array] = []
    for part, holders in devices.items():
        buffer = read(part)
        pieces += jax.block_until_ready([jax.device_put(buffer, device) for device in holders])
        del buffer
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, pieces)


def _check_tensors(folder: Path, tensors: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]], *, tied: bool) -> None:
    """Every expected tensor is there, in its shape, and nothing else, save what is known to hold no weight; no weight is read."""
    missing = sorted(shapes.keys() - tensors.keys())
    if missing:
        raise WeightsError(f"{folder}: {len(missing)} of {len(shapes)} tensors are missing: {list_some(missing)}")
    # Old files store the rotary frequencies (computed here) and, of a tied head, the embedding a second time.
    unused = {name for name in tensors if name not in shapes and not name.endswith(".rotary_emb.inv_freq")}
    head, table = (_FIXED_NAMES[key] for key in (("head",), ("embedding",)))
    if tied and head in tensors:
        unused.discard(head)
        shapes = {**shapes, head: shapes[table]}
    if unused:
        raise WeightsError(f"{folder}: {len(unused)} tensors have no place in the model: {list_some(sorted(unused))}")
    for name, shape in shapes.items():
        stored = tensors[name]
        if stored.shape != shape:
            raise WeightsError(f"{stored.file}: tensor '{name}': expected shape {shape}, got {stored.shape}")
        if stored.dtype not in FLOATS:
            raise WeightsError(f"{stored.file}: tensor '{name}': expected one of {', '.join(sorted(FLOATS))}, got {stored.dtype}")


def load_weights(folder: Path, config: ModelConfig, *, min_vocab_size: int = 0, seed: int = 0) -> Decoder:
    """The model of a Hugging Face folder, its weights stored in `config.param_dtype` and laid out over the mesh in context.

    Sizes come from the folder's config.json (`read_model_config`); dtypes, dropout and remat from `config`. Parameters are filled one at
    a time, the largest first, each on the host and then on its devices, shard by shard: beside the model itself, memory holds one shard of
    one parameter. A process reads what its devices hold. Every tensor's name, shape and type is checked before the first is read.

    Args:
      min_vocab_size: the embedding (and separate head) get more rows, drawn with `seed`, where the file has fewer: for tokens that were
        added to the model's own tokenizer.

    Raises:
      ConfigError: config.json describes another kind of model, or one that does not divide over the mesh.
      WeightsError: a file or tensor is missing, superfluous, damaged, of the wrong shape or type, or not finite.
    """
    config, stored_vocab = read_model_config(folder, config)
    graphdef, abstract = nnx.split(abstract_model(config, vocab_size=max(stored_vocab, min_vocab_size)))
    parameters = sorted(_flat_parameters(abstract).items(), key=lambda pair: -pair[1].size)
    names = {path: _name_tensors(path, config.num_layers) for path, _ in parameters}
    shapes: dict[str, tuple[int, ...]] = {}
    for path, variable in parameters:
        if path not in _FIXED_NAMES:
            shape = variable.shape[:0:-1]  # [out, in]; a vector is its own transpose
        else:
            shape = (stored_vocab, *variable.shape[1:]) if path in _TABLES else variable.shape
        shapes |= dict.fromkeys(names[path], shape)
    with open_tensors(folder) as tensors:
        _check_tensors(folder, tensors, shapes, tied=config.tie_embeddings)
        for path, variable in track(parameters, description=f"load {folder.name}", unit="parameter"):
            sources, dtype = [tensors[name] for name in names[path]], np.dtype(variable.dtype)
            if path in _TABLES:
                twin = tensors.get(_FIXED_NAMES["head",]) if config.tie_embeddings else None
                read = functools.partial(_read_table, sources[0], twin, dtype=dtype, seed=seed)
            elif path in _FIXED_NAMES:
                read = functools.partial(_read_vector, sources[0], dtype=dtype)
            else:
                read = functools.partial(_read_stack, sources, dtype=dtype)
            variable.set_value(_make_array(variable.get_value(), read))
    return nnx.merge(graphdef, abstract)


def _plan_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


@contextlib.contextmanager
def _new_export(folder: Path) -> Iterator[Path | None]:
    """The temporary folder that becomes `folder`; None in a process other than 0, which reads with the others and writes nothing."""
    if not is_main_process():
        yield None
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder}: expected a folder that does not exist yet, or an empty one; give another or remove it")
    with new_folder(folder) as temporary:
        yield temporary


def _write_tensors(file: Path | None, shapes: dict[str, tuple[int, ...]], dtype: np.dtype, arrays: Iterable[np.ndarray]) -> None:
    if file is None:
        collections.deque(arrays, maxlen=0)
    else:
        write_tensors(file, shapes, dtype, arrays)


_take_layer = jax.jit(lambda stacked, layer: stacked[layer])


def export_weights(
    model: Decoder, folder: Path, *, dtype: str | None = None, stop_ids: tuple[int, ...] = (), max_shard_bytes: int = 2 * 10**9
) -> None:
    """Writes config.json and safetensors that transformers loads; the folder appears whole or not at all.

    Weights may lie over the devices of many processes: all of them call this, process 0 writes. One tensor is on the host at a time.

    Args:
      dtype: dtype of the written weights; None keeps `config.param_dtype`.
      stop_ids: token ids that end an answer, written as `eos_token_id`.
      max_shard_bytes: a new file is begun above this size.

    Raises:
      WeightsError: the model carries unmerged adapters, a weight is not finite, or `folder` is not empty.
      OSError: the disk is full or not writable.
    """
    config = model.config
    parameters = _flat_parameters(model)
    if any(map(_is_adapter, parameters.values())):
        raise WeightsError(f"{folder}: the model carries adapters; call merge_adapters first, or export_adapters to write them alone")
    to_dtype = jnp.dtype(dtype or config.param_dtype)
    sources: dict[str, tuple[ParameterPath, int | None]] = {}
    for path in parameters:
        stacked = path not in _FIXED_NAMES
        sources |= {name: (path, layer if stacked else None) for layer, name in enumerate(_name_tensors(path, config.num_layers))}

    def read(name: str) -> np.ndarray:
        path, layer = sources[name]
        value = parameters[path][...]
        array = read_whole(value if layer is None else _take_layer(value, layer)).astype(to_dtype, copy=False)
        if not np.isfinite(array).all():
            raise WeightsError(f"{folder}: weight '{name}' holds NaN or infinity; nothing was written")
        return np.ascontiguousarray(array if layer is None else array.T)

    shapes = {name: parameters[path].shape if layer is None else parameters[path].shape[:0:-1] for name, (path, layer) in sources.items()}
    sizes = {name: math.prod(shapes[name]) * to_dtype.itemsize for name in sorted(shapes)}
    shards = _plan_shards(sizes, max_shard_bytes)
    files = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with _new_export(folder) as temporary:
        for file, shard in track(list(zip(files, shards, strict=True)), description=f"export {folder.name}", unit="file"):
            place = None if temporary is None else temporary / file
            _write_tensors(place, {name: shapes[name] for name in shard}, to_dtype, map(read, shard))
        if temporary is None:
            return
        if len(shards) > 1:
            listed = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": listed}
            (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        described = describe_model(config, vocab_size=model.vocab_size, dtype=to_dtype.name, stop_ids=stop_ids)
        (temporary / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def export_adapters(model: Decoder, folder: Path, *, base_model: str) -> None:
    """Writes the adapters alone in PEFT's format (adapter_config.json, adapter_model.safetensors), whole or not at all.

    All processes call this, process 0 writes, as in `export_weights`.

    Args:
      base_model: folder or hub name of the base weights, for `PeftModel.from_pretrained` to find.

    Raises:
      WeightsError: the model carries no adapters, or `folder` is not empty.
      OSError: the disk is full or not writable.
    """
    parameters = _flat_parameters(model)
    adapted = [path[:-1] for path in parameters if path[-1] == "lora_a"]
    if not adapted:
        raise WeightsError(f"{folder}: the model carries no adapters; export_weights writes the weights themselves")
    tensors: dict[str, np.ndarray] = {}
    for parent in adapted:
        names = _name_tensors((*parent, "kernel"), model.config.num_layers)
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            for name, value in zip(names, read_whole(parameters[(*parent, ours)][...]), strict=True):
                tensors[f"base_model.model.{name.removesuffix('.weight')}.{theirs}.weight"] = np.ascontiguousarray(value.T)
    rank = parameters[(*adapted[0], "lora_a")].shape[-1]
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": float(read_whole(parameters[(*adapted[0], "lora_scale")][...])[0]) * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(parent[-1] for parent in adapted),
        "inference_mode": True,
    }
    with _new_export(folder) as temporary:
        if temporary is None:
            return
        shapes = {name: value.shape for name, value in tensors.items()}
        write_tensors(temporary / "adapter_model.safetensors", shapes, np.dtype(np.float32), tensors.values())
        (temporary / "adapter_config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit integers that spreads every bit (MurmurHash3's finaliser, Austin Appleby, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """[4] uint32: sums over the elements of a mix of their bits and their place; sums of integers do not depend on the order."""
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        place = _mix(place + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) + jnp.uint32(0x9E3779B9))
    return jnp.stack([jnp.sum(_mix(bits ^ _mix(place + jnp.uint32(lane))), dtype=jnp.uint32) for lane in range(4)])


def weights_hash(model: nnx.Module | Mapping[Any, Any]) -> str:
    """Content hash of the base weights of a module or an `nnx.State` (names, shapes, dtypes and bits; adapters left out), as 32 hex digits.

    Computed where the weights are, 16 bytes a parameter leaving the device, so that it costs a fraction of a second and is the same on
    any device and mesh. It finds accidents, not forgeries.
    """
    base = {path: variable for path, variable in _flat_parameters(model).items() if not _is_adapter(variable)}
    sums = jax.device_get({path: _checksum(variable[...]) for path, variable in base.items()})
    digest = hashlib.sha256()
    for path, value in sorted(sums.items()):
        variable = base[path]
        digest.update(f"{'.'.join(path)} {variable.shape} {variable.dtype} {value.astype('<u4').tobytes().hex()}\n".encode())
    return digest.hexdigest()[:32]
