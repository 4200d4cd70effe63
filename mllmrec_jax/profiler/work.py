"""What the profiled loop works on: prepared data, or random data of the configuration's largest sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from flax import nnx

from mllmrec_jax.config import RunConfig
from mllmrec_jax.data.examples import TokenisedExamples
from mllmrec_jax.data.shards import Shards, open_shards, write_shards
from mllmrec_jax.model.hf_config import read_model_config
from mllmrec_jax.model.lora import add_adapters
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.model.sharded import make_sharded
from mllmrec_jax.pipeline import make_base_model
from mllmrec_jax.prepare import prepare_data
from mllmrec_jax.prompts import sanitise_text
from mllmrec_jax.sharding import check_model, current_mesh, place
from mllmrec_jax.train.state import Policy, split_policy

Stage = Literal["sft", "grpo"]
DataSource = Literal["random", "prepared"]


class RandomTokenizer:
    """Stands in for a tokenizer where tokens mean nothing; no token ends a completion."""

    stop_ids: tuple[int, ...] = ()
    pad_id = 0

    def decode(self, ids: Iterable[int]) -> str:
        """The ids in decimal."""
        return " ".join(map(str, ids))


class Work(NamedTuple):
    """What `run_sft` and `run_grpo` take."""

    policy: Policy
    shards: Shards
    tokenizer: Any
    titles: Mapping[int, str]


def make_work(config: RunConfig, stage: Stage, source: DataSource, *, folder: Path) -> Work:
    """The model (`model.weights`, or random) with fresh adapters in lora mode, and the stage's data, over the mesh in context.

    Random data have prompts of exactly `prompt.max_prompt_tokens` tokens (or the last bucket's) and weights are random too; prepared data
    are the run's own, and the model is what SFT would start from.

    Args:
      config: of the run.
      stage: whose data and adapters.
      source: `random` or `prepared`.
      folder: where random shards may be written.

    Raises:
      ConfigError: model or batch do not divide over the mesh, or do not fit the data.
    """
    settings = getattr(config, stage)
    if source == "prepared":
        prepared = prepare_data(config)
        model = make_base_model(config, prepared)
        titles = {item.id: sanitise_text(item.title, config.prompt.max_title_chars) for item in prepared.dataset.items.values()}
        shards, tokenizer = getattr(prepared, stage), prepared.tokenizer
    else:
        sizes, vocab_size = config.model, config.tokenizer.vocab_size
        if config.model.weights is not None:
            sizes, vocab_size = read_model_config(config.model.weights, config.model)
        mesh = current_mesh()
        if mesh is not None:
            check_model(sizes, mesh, vocab_size=vocab_size, batch_size=settings.batch_size)
        model = make_sharded(lambda: Decoder(sizes, vocab_size=vocab_size, rngs=nnx.Rngs(config.seed)))
        write_shards(folder / "shards", draw_examples(config, stage, vocab_size=vocab_size), provenance={"random": config.seed})
        shards, tokenizer, titles = open_shards(folder / "shards", verify=False), RandomTokenizer(), {}
    if settings.mode == "lora":
        add_adapters(model, settings.lora, rngs=nnx.Rngs(config.seed + 1))
    policy = split_policy(model, settings.mode)
    return Work(policy._replace(trained=place(policy.trained), frozen=place(policy.frozen)), shards, tokenizer, titles)


def draw_examples(config: RunConfig, stage: Stage, *, vocab_size: int) -> TokenisedExamples:
    """Two batches of random examples of the largest sizes: prompts full, answers of `grpo.max_new_tokens` tokens."""
    settings, generator = getattr(config, stage), np.random.default_rng(config.seed)
    rows, items = 2 * settings.batch_size * settings.accumulation, config.data.negatives + 1
    width = min(config.prompt.max_prompt_tokens, *config.loader.buckets[-1:] or (config.prompt.max_prompt_tokens,))
    answer = config.grpo.max_new_tokens

    def draw_tokens(*shape: int) -> np.ndarray:
        return generator.integers(0, vocab_size, shape, dtype=np.int32)

    return TokenisedExamples(
        prompt=draw_tokens(rows, width),
        prompt_length=np.full(rows, width, np.int32),
        history_mask=np.ones((rows, width), np.uint8),
        answer=draw_tokens(rows, answer),
        answer_length=np.full(rows, answer, np.int32),
        candidates=np.tile(np.arange(items, dtype=np.int32), (rows, 1)),
        target=generator.integers(0, items, rows, dtype=np.int32),
        user=np.arange(rows, dtype=np.int64),
        provenance=np.zeros(rows, np.uint64),
        item_id=np.arange(items, dtype=np.int64),
        item_answer=draw_tokens(items, answer),
        item_answer_length=np.full(items, answer, np.int32),
        pad_id=0,
        dropped_history=0,
    )
