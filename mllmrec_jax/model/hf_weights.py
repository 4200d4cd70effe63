"""Weights from and to Hugging Face folders (safetensors, one file or sharded), and their content hash.

A layer's tensor `model.layers.3.mlp.up_proj.weight` [out, in] is slice 3 of our stacked kernel [L, in, out].
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mllmrec_jax.config import ModelConfig
from mllmrec_jax.data.atomic import new_folder
from mllmrec_jax.model.hf_config import describe_model, read_model_config
from mllmrec_jax.model.lora import LoraParam, LoraScale
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.progress import track

# Bytes of a source tensor that are in memory beside their destination at a time.
READ_BYTES = 4 * 2**20
ALIGNMENT = 64  # bytes
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64", "F32", "F16", "BF16"}
_FIXED_NAMES = {("embedding",): "model.embed_tokens.weight", ("norm", "weight"): "model.norm.weight", ("head",): "lm_head.weight"}
_ROOM_NAMES = {
    "attention": "self_attn",
    "feed_forward": "mlp",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
}


class WeightsError(ValueError):
    """Weights that cannot be used; the message names file, tensor, expected and got."""


class _Stored(NamedTuple):
    """One tensor of an open safetensors file, read by rows."""

    file: Path
    name: str
    rows: Any
    shape: tuple[int, ...]
    dtype: str


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


def _list_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a folder, and the index's tensor -> file name, where there is an index."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise WeightsError(f"{folder}: expected {SINGLE} or {INDEX}, got both; remove the one that is out of date")
    if single.is_file():
        return [single], None
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {', '.join(others)} may hold pickled code and is never loaded: convert it to safetensors" if others else ""
        raise WeightsError(f"{folder}: expected {SINGLE} or {INDEX}, got neither{hint}")
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(listed.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: expected a JSON object with a 'weight_map' of tensor to file name, got {error!r}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise WeightsError(f"{index}: expected the name of a file in {folder}, got {name!r}")
    return [folder / name for name in names], listed


@contextlib.contextmanager
def _open_tensors(folder: Path) -> Iterator[dict[str, _Stored]]:
    """Every tensor of the folder, unread, while the files are mapped."""
    files, listed = _list_files(folder)
    with contextlib.ExitStack() as stack:
        tensors: dict[str, _Stored] = {}
        for file in files:
            try:
                handle = stack.enter_context(safe_open(file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{file}: not a whole safetensors file: {error}") from None
            for name in list(handle.keys()):
                if name in tensors:
                    raise WeightsError(f"{file}: tensor '{name}' is in {tensors[name].file.name} too")
                rows = handle.get_slice(name)
                tensors[name] = _Stored(file, name, rows, tuple(rows.get_shape()), rows.get_dtype())
        if listed is not None:
            wrong = sorted(
                name for name in tensors.keys() | listed.keys() if name not in tensors or listed.get(name) != tensors[name].file.name
            )
            if wrong:
                raise WeightsError(f"{folder / INDEX}: does not list what the files hold: {_some(wrong)}")
        yield tensors


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _read_blocks(stored: _Stored) -> Iterator[tuple[slice, np.ndarray]]:
    width = int(np.prod(stored.shape[1:], dtype=np.int64)) * 4
    step = max(1, READ_BYTES // max(1, width))
    for start in range(0, stored.shape[0], step):
        rows = slice(start, min(start + step, stored.shape[0]))
        yield rows, stored.rows[rows]


def _copy_tensor(stored: _Stored, destination: np.ndarray) -> None:
    """Reads a tensor into `destination` (a view of its shape), a block of rows at a time, in the destination's dtype."""
    if stored.shape != destination.shape:
        raise WeightsError(f"{stored.file}: tensor '{stored.name}': expected shape {destination.shape}, got {stored.shape}")
    if stored.dtype not in FLOATS:
        raise WeightsError(f"{stored.file}: tensor '{stored.name}': expected one of {', '.join(sorted(FLOATS))}, got {stored.dtype}")
    for rows, block in _read_blocks(stored):
        with np.errstate(over="ignore"):  # seen below, by name
            block = block.astype(destination.dtype, copy=False)
        if not np.isfinite(block).all():
            raise WeightsError(f"{stored.file}: tensor '{stored.name}' holds NaN or infinity in rows {rows.start} to {rows.stop - 1}")
        destination[rows] = block


def _allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array, aligned so that `jax.device_put` on the CPU takes its memory over instead of copying it."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _add_rows(table: np.ndarray, known: int, seed: int) -> None:
    """Fills rows `known`.. of an embedding table from a normal distribution with the known rows' mean and deviation by column.

    Rows that differ, because with frozen base weights they are all that tells the new tokens apart.
    """
    total, squares = np.zeros(table.shape[1]), np.zeros(table.shape[1])
    step = max(1, READ_BYTES // (8 * table.shape[1]))
    for start in range(0, known, step):
        block = table[start : min(start + step, known)].astype(np.float64)
        total += block.sum(axis=0)
        squares += np.square(block).sum(axis=0)
    mean = total / known
    deviation = np.sqrt(np.maximum(squares / known - np.square(mean), 0))
    table[known:] = mean + deviation * np.random.default_rng(seed).standard_normal((len(table) - known, table.shape[1]))


def _check_names(folder: Path, tensors: Mapping[str, _Stored], expected: list[str], *, tied: bool) -> None:
    """Every expected tensor is there, and nothing else, save what is known to hold no weight."""
    missing = sorted(set(expected) - set(tensors))
    if missing:
        raise WeightsError(f"{folder}: {len(missing)} of {len(expected)} tensors are missing: {_some(missing)}")
    # Old files store the rotary frequencies (computed here) and, of a tied head, the embedding a second time.
    unused = {name for name in tensors if name not in set(expected) and not name.endswith(".rotary_emb.inv_freq")}
    head, table = (tensors.get(_FIXED_NAMES[key]) for key in (("head",), ("embedding",)))
    if tied and head is not None and table is not None:
        same = head.shape == table.shape and head.dtype == table.dtype
        if not same or not all(np.array_equal(a, b) for (_, a), (_, b) in zip(_read_blocks(head), _read_blocks(table), strict=True)):
            raise WeightsError(f"{head.file}: config.json ties the head to the embedding, but '{head.name}' differs from '{table.name}'")
        unused.discard(head.name)
    if unused:
        raise WeightsError(f"{folder}: {len(unused)} tensors have no place in the model: {_some(sorted(unused))}")


def load_weights(folder: Path, config: ModelConfig, *, min_vocab_size: int = 0, seed: int = 0) -> Decoder:
    """The model of a Hugging Face folder, its weights stored in `config.param_dtype`.

    Sizes come from the folder's config.json (`read_model_config`); dtypes, dropout and remat from `config`. Parameters are filled one at
    a time, the largest first, each on the host and then on the default device: beside the model itself, memory holds one parameter.

    Args:
      min_vocab_size: the embedding (and separate head) get more rows, drawn with `seed`, where the file has fewer: for tokens that were
        added to the model's own tokenizer.

    Raises:
      ConfigError: config.json describes another kind of model.
      WeightsError: a file or tensor is missing, superfluous, damaged, of the wrong shape or type, or not finite.
    """
    config, stored_vocab = read_model_config(folder, config)
    vocab_size = max(stored_vocab, min_vocab_size)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(config, vocab_size=vocab_size, rngs=nnx.Rngs(0))))
    parameters = sorted(_flat_parameters(abstract).items(), key=lambda pair: -pair[1].size)
    names = {path: _name_tensors(path, config.num_layers) for path, _ in parameters}
    with _open_tensors(folder) as tensors:
        _check_names(folder, tensors, [name for group in names.values() for name in group], tied=config.tie_embeddings)
        for path, variable in track(parameters, description=f"load {folder.name}", unit="parameter"):
            buffer = _allocate(variable.shape, np.dtype(variable.dtype))
            if path in (("embedding",), ("head",)):
                _copy_tensor(tensors[names[path][0]], buffer[:stored_vocab])
                _add_rows(buffer, stored_vocab, seed)
            elif path in _FIXED_NAMES:
                _copy_tensor(tensors[names[path][0]], buffer)
            else:
                for layer, name in enumerate(names[path]):
                    _copy_tensor(tensors[name], buffer[layer, ...].T)  # [out, in]; a vector is its own transpose
            variable.set_value(jax.device_put(buffer))
            del buffer
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


def _save_tensors(tensors: dict[str, np.ndarray], file: Path) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(f"{file}: cannot be written: {error}; nothing was left behind") from None


def _check_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder}: expected a folder that does not exist yet, or an empty one; give another or remove it")


def export_weights(
    model: Decoder, folder: Path, *, dtype: str | None = None, stop_ids: tuple[int, ...] = (), max_shard_bytes: int = 2 * 10**9
) -> None:
    """Writes config.json and safetensors that transformers loads; the folder appears whole or not at all.

    Args:
      dtype: dtype of the written weights; None keeps `config.param_dtype`.
      stop_ids: token ids that end an answer, written as `eos_token_id`.
      max_shard_bytes: a new file is begun above this size; one file's tensors are in memory at a time.

    Raises:
      WeightsError: the model carries unmerged adapters, a weight is not finite, or `folder` is not empty.
      OSError: the disk is full or not writable.
    """
    config = model.config
    parameters = _flat_parameters(model)
    if any(map(_is_adapter, parameters.values())):
        raise WeightsError(f"{folder}: the model carries adapters; call merge_adapters first, or export_adapters to write them alone")
    _check_new(folder)
    to_dtype = jnp.dtype(dtype or config.param_dtype)
    sources: dict[str, tuple[ParameterPath, int | None]] = {}
    for path in parameters:
        stacked = path not in _FIXED_NAMES
        sources |= {name: (path, layer if stacked else None) for layer, name in enumerate(_name_tensors(path, config.num_layers))}

    def read(name: str) -> np.ndarray:
        path, layer = sources[name]
        value = parameters[path][...]
        array = np.asarray(value if layer is None else value[layer]).astype(to_dtype, copy=False)
        if not np.isfinite(array).all():
            raise WeightsError(f"{folder}: weight '{name}' holds NaN or infinity; nothing was written")
        return np.ascontiguousarray(array if layer is None else array.T)

    sizes = {
        name: parameters[path].size // (1 if layer is None else config.num_layers) * to_dtype.itemsize
        for name, (path, layer) in sources.items()
    }
    shards = _plan_shards(dict(sorted(sizes.items())), max_shard_bytes)
    files = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with new_folder(folder) as temporary:
        for file, shard in track(list(zip(files, shards, strict=True)), description=f"export {folder.name}", unit="file"):
            _save_tensors({name: read(name) for name in shard}, temporary / file)
        if len(shards) > 1:
            listed = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": listed}
            (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        described = describe_model(config, vocab_size=model.vocab_size, dtype=to_dtype.name, stop_ids=stop_ids)
        (temporary / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def export_adapters(model: Decoder, folder: Path, *, base_model: str) -> None:
    """Writes the adapters alone in PEFT's format (adapter_config.json, adapter_model.safetensors), whole or not at all.

    Args:
      base_model: folder or hub name of the base weights, for `PeftModel.from_pretrained` to find.

    Raises:
      WeightsError: the model carries no adapters, or `folder` is not empty.
    """
    parameters = _flat_parameters(model)
    layers = model.config.num_layers
    adapted = [path[:-1] for path in parameters if path[-1] == "lora_a"]
    if not adapted:
        raise WeightsError(f"{folder}: the model carries no adapters; export_weights writes the weights themselves")
    _check_new(folder)
    tensors: dict[str, np.ndarray] = {}
    for parent in adapted:
        names = _name_tensors((*parent, "kernel"), layers)
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            stacked = np.asarray(parameters[(*parent, ours)][...])
            for name, value in zip(names, stacked, strict=True):
                tensors[f"base_model.model.{name.removesuffix('.weight')}.{theirs}.weight"] = np.ascontiguousarray(value.T)
    rank = parameters[(*adapted[0], "lora_a")].shape[-1]
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": float(parameters[(*adapted[0], "lora_scale")][...][0]) * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(parent[-1] for parent in adapted),
        "inference_mode": True,
    }
    with new_folder(folder) as temporary:
        _save_tensors(tensors, temporary / "adapter_model.safetensors")
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
