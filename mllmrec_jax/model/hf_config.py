"""`config.json` of a Hugging Face model folder, to and from `ModelConfig`.

Every key that would change the function is either read or checked: a model that we would compute differently is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from mllmrec_jax.config import ConfigError, ModelConfig, RopeScalingConfig

ARCHITECTURES: dict[str, Literal["qwen3", "qwen2", "llama"]] = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
}
DEFAULT_ROPE_THETA = 10_000.0  # what transformers takes where the file names none, for all three families
QWEN3_HEAD_DIM = 128  # likewise; the other two divide the hidden size


class _Reader:
    """Typed access to the keys of one JSON object; errors name the file and the key."""

    def __init__(self, raw: dict[str, Any], path: Path, prefix: str = ""):
        self.raw, self.path, self.prefix = raw, path, prefix

    def fail(self, key: str, expected: str) -> ConfigError:
        got = repr(self.raw[key]) if key in self.raw else "nothing"
        return ConfigError(f"{self.path}: key '{self.prefix}{key}': expected {expected}, got {got}")

    def number(self, key: str, default: int | float | None = None) -> float:
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.fail(key, "a positive number")
        return float(value)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value):
            raise self.fail(key, "an integer")
        return int(value)

    def only(self, key: str, accepted: Any, why: str) -> None:
        """Absent and null are accepted too."""
        value = self.raw.get(key)
        if value is not None and value != accepted:
            raise self.fail(key, f"{accepted!r} ({why})")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; expected a Hugging Face model folder") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw


def _check_sliding_window(reader: _Reader, num_layers: int) -> None:
    layers = reader.raw.get("layer_types")
    if layers is not None:
        if list(layers) != ["full_attention"] * num_layers:
            raise reader.fail("layer_types", f"{num_layers} times 'full_attention'")
        return
    # Layers below max_window_layers attend to everything; where that is all of them, no window is in use.
    windowed = reader.raw.get("use_sliding_window") and reader.raw.get("sliding_window") is not None
    if windowed and reader.integer("max_window_layers", default=num_layers) < num_layers:
        raise reader.fail("use_sliding_window", "False (every layer attends to the whole sequence)")


def _read_rope(reader: _Reader, max_position: int) -> tuple[float, RopeScalingConfig]:
    """Theta and rescaling; transformers 5 writes both in `rope_parameters`, older files `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if reader.raw.get("rope_parameters") is not None else "rope_scaling"
    values = reader.raw.get(key) or {}
    if not isinstance(values, dict):
        raise reader.fail(key, "an object")
    rope = _Reader(values, reader.path, f"{key}.")
    theta = reader.number("rope_theta", default=DEFAULT_ROPE_THETA)
    theta = rope.number("rope_theta", default=theta)
    for place in (reader, rope):
        place.only("partial_rotary_factor", 1.0, "every channel of a head is rotated")
    kind_key = "type" if "rope_type" not in values and "type" in values else "rope_type"
    kind = values.get(kind_key, "default")
    if kind not in ("default", "llama3"):
        raise rope.fail(kind_key, "'default' or 'llama3'")
    if kind == "default":
        return theta, RopeScalingConfig()
    scaling = RopeScalingConfig(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=rope.integer("original_max_position_embeddings", default=max_position),
    )
    if scaling.factor < 1:
        raise rope.fail("factor", "at least 1")
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise rope.fail("high_freq_factor", f"more than low_freq_factor = {scaling.low_freq_factor}")
    return theta, scaling


def read_model_config(folder: Path, base: ModelConfig) -> tuple[ModelConfig, int]:
    """Family and sizes from `folder`/config.json, everything else from `base`; and the vocabulary size (rows of the embedding).

    Raises:
      ConfigError: the file is missing or not JSON, lacks a size, or describes a model that `Decoder` would compute differently.
    """
    path = folder / "config.json"
    reader = _Reader(_read_json(path), path)
    architectures = reader.raw.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
        raise reader.fail("architectures", f"one of {', '.join(ARCHITECTURES)}")
    family = ARCHITECTURES[architectures[0]]
    reader.only("hidden_act", "silu", "the gated feed-forward layer's activation")
    reader.only("quantization_config", None, "weights in float32, float16 or bfloat16")
    if family != "qwen2":  # whose query, key and value biases are part of the family, whatever the file says
        reader.only("attention_bias", False, f"{family} has no attention biases")
    reader.only("mlp_bias", False, "feed-forward layers have no biases")

    hidden_size, num_heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    num_layers, max_position = reader.integer("num_hidden_layers"), reader.integer("max_position_embeddings")
    num_kv_heads = reader.integer("num_key_value_heads", default=num_heads if family == "llama" else None)
    if num_heads % num_kv_heads:
        raise reader.fail("num_attention_heads", f"a multiple of num_key_value_heads = {num_kv_heads}")
    if family != "qwen3" and reader.raw.get("head_dim") is None and hidden_size % num_heads:
        raise reader.fail("hidden_size", f"a multiple of num_attention_heads = {num_heads} where no head_dim is given")
    head_dim = reader.integer("head_dim", default=QWEN3_HEAD_DIM if family == "qwen3" else hidden_size // num_heads)
    if head_dim % 2:
        raise reader.fail("head_dim", f"an even number (rotary pairs; without the key it is {head_dim})")
    _check_sliding_window(reader, num_layers)
    theta, scaling = _read_rope(reader, max_position)
    tie = reader.raw.get("tie_word_embeddings", False)
    if not isinstance(tie, bool):
        raise reader.fail("tie_word_embeddings", "true or false")
    config = dataclasses.replace(
        base,
        family=family,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=reader.number("rms_norm_eps", default=1e-6),
        tie_embeddings=tie,
    )
    return config, reader.integer("vocab_size")


def describe_model(config: ModelConfig, *, vocab_size: int, dtype: str, stop_ids: tuple[int, ...] = ()) -> dict[str, Any]:
    """The content of a `config.json` that transformers reads, version 5's keys beside those of version 4."""
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling.factor != 1:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return {
        "architectures": [name for name, family in ARCHITECTURES.items() if family == config.family],
        "model_type": config.family,
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, **rope},
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling.factor == 1 else rope,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.family == "qwen2",
        "use_sliding_window": False,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": list(stop_ids) or None,
        "use_cache": True,
    }
