"""FLOPs and bytes of each phase, as formulas of the model's and the work's sizes.

A multiply-add is two FLOPs. Only matrix products are counted: norms, rotary embedding, softmax and sampling are left out, which XLA's own
count includes (tests hold the two together). `flops` is what the compiled programs execute: masked attention scores, the padding of
blocks, and what rematerialisation computes again. `model_flops` is what the mathematics asks for: causal pairs only, nothing twice; MFU is
made of it. `bytes` is the least that has to cross the memory bus: weights once a pass over the layers, caches, saved layer inputs, the
vocabulary once a chunk of rows; activations within a layer are taken to stay on chip, so a program moves more.

Everything is for one call on the whole mesh. `Sizes` describe the shared layout (a prompt and its G completions); `repeat_prompts` gives
the sizes of the same work where each completion has a copy of its prompt.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax.numpy as jnp

from mllmrec_jax.config import GrpoConfig, LogprobConfig, LoraConfig, ModelConfig, SftConfig
from mllmrec_jax.model.attention import QUERY_BLOCK, cut_prompt


class Sizes(NamedTuple):
    """One batch: B prompts of P tokens with G completions of C tokens each, and a vocabulary of V tokens."""

    prompts: int
    prompt_tokens: int
    group_size: int
    new_tokens: int
    vocabulary: int

    @property
    def tokens(self) -> int:
        """Tokens the layers see: B (P + G C)."""
        return self.prompts * (self.prompt_tokens + self.group_size * self.new_tokens)

    @property
    def unshared_tokens(self) -> int:
        """Tokens a trainer that repeats prompts has: B G (P + C)."""
        return self.prompts * self.group_size * (self.prompt_tokens + self.new_tokens)

    @property
    def completion_tokens(self) -> int:
        """B G C: the rows that meet the vocabulary."""
        return self.prompts * self.group_size * self.new_tokens


def repeat_prompts(sizes: Sizes) -> Sizes:
    """The same work in the repeated layout: B G prompts, one completion each."""
    return sizes._replace(prompts=sizes.prompts * sizes.group_size, group_size=1)


class Work(NamedTuple):
    """What a phase costs."""

    flops: float
    """Executed."""
    model_flops: float
    """Needed."""
    bytes: float
    """Least that is moved."""

    def plus(self, *others: Work) -> Work:
        """The sum of this and `others`."""
        return Work(*(sum(parts) for parts in zip(self, *others, strict=True)))

    def times(self, count: float) -> Work:
        """`count` of these, one after the other."""
        return Work(*(count * part for part in self))


NO_WORK = Work(0.0, 0.0, 0.0)


class Linears(NamedTuple):
    """Elements of one layer's weight matrices."""

    kernels: int
    down: int
    """Of the last of them: its product is not needed again in the backward pass."""
    adapters: int
    down_adapter_b: int


def count_linears(model: ModelConfig, lora: LoraConfig | None = None) -> Linears:
    """Elements of the seven linear layers of one layer, and of their adapters (none without `lora`)."""
    d, heads, kv, ffn = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim, model.intermediate_size
    shapes = {"q_proj": (d, heads), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (heads, d)}
    shapes |= {"gate_proj": (d, ffn), "up_proj": (d, ffn), "down_proj": (ffn, d)}
    kernels = sum(a * b for a, b in shapes.values())
    if lora is None:
        return Linears(kernels, ffn * d, 0, 0)
    adapters = sum(lora.rank * (a + b) for name, (a, b) in shapes.items() if name in lora.targets)
    return Linears(kernels, ffn * d, adapters, lora.rank * d if "down_proj" in lora.targets else 0)


def count_parameters(model: ModelConfig, vocabulary: int) -> int:
    """Weights of the decoder without adapters: layers' matrices, norms and biases, embedding, and the head where it is not tied."""
    per_layer = count_linears(model).kernels + 2 * model.hidden_size
    per_layer += 2 * model.head_dim if model.family == "qwen3" else 0
    per_layer += (model.num_heads + 2 * model.num_kv_heads) * model.head_dim if model.family == "qwen2" else 0
    tables = vocabulary * model.hidden_size * (1 if model.tie_embeddings else 2)
    return model.num_layers * per_layer + model.hidden_size + tables


def _itemsizes(model: ModelConfig) -> tuple[int, int]:
    """Bytes of a stored weight and of an activation."""
    return jnp.dtype(model.param_dtype).itemsize, jnp.dtype(model.dtype).itemsize


def _pad(count: int, block: int) -> int:
    """`count` in full blocks, where it is more than one."""
    return count if count <= block else -(-count // block) * block


class Pairs(NamedTuple):
    """Query-key pairs of one batch and one head."""

    executed: float
    needed: float
    blocked: float
    """Of `executed`, those in blocks, whose backward pass makes the scores again; up to `QUERY_BLOCK` rows keep them."""


def count_prompt_pairs(sizes: Sizes) -> Pairs:
    """Causal self-attention of the prompts: each block of rows meets the keys up to its own end, P (P + 1) / 2 pairs count."""
    p = sizes.prompt_tokens
    executed = float(sizes.prompts * sum((end - start) * end for start, end in cut_prompt(p)))
    return Pairs(executed, sizes.prompts * p * (p + 1) / 2, executed if p > QUERY_BLOCK else 0.0)


def count_completion_pairs(sizes: Sizes) -> Pairs:
    """Completions to their prompt and to their own earlier tokens: C (P + C) a completion are made, C (P + (C + 1) / 2) count."""
    b, p, g, c, _ = sizes
    members = max(1, QUERY_BLOCK // max(1, c))
    executed = float(b * _pad(g, members) * c * (p + c))
    return Pairs(executed, b * g * c * (p + (c + 1) / 2), executed if g > members else 0.0)


def _attention_flops(model: ModelConfig, pairs: float) -> float:
    """Two products (scores, mixing) of head_dim for each pair and query head, in all layers."""
    return 4.0 * model.num_layers * pairs * model.num_heads * model.head_dim


def count_cache(model: ModelConfig, tokens: int) -> float:
    """Keys and values of `tokens` tokens in all layers, as `model.cache_dtype` keeps them, once."""
    heads = model.num_layers * tokens * model.num_kv_heads
    # In 8 bits, a float32 scale a head and token.
    a_head = {"compute": _itemsizes(model)[1] * model.head_dim, "bfloat16": 2 * model.head_dim, "int8": model.head_dim + 4}
    return 2.0 * heads * a_head[model.cache_dtype]


def _weight_bytes(model: ModelConfig, lora: LoraConfig | None) -> float:
    """The layers' matrices, read once; adapters are float32."""
    linears = count_linears(model, lora)
    return float(model.num_layers * (linears.kernels * _itemsizes(model)[0] + 4 * linears.adapters))


def count_prefill(model: ModelConfig, sizes: Sizes, *, lora: LoraConfig | None = None) -> Work:
    """All prompts through the layers, their keys and values kept; no head."""
    linears, pairs = count_linears(model, lora), count_prompt_pairs(sizes)
    tokens = sizes.prompts * sizes.prompt_tokens
    trunk = 2.0 * model.num_layers * (linears.kernels + linears.adapters) * tokens
    moved = _weight_bytes(model, lora) + count_cache(model, tokens) + tokens * model.hidden_size * _itemsizes(model)[0]
    return Work(trunk + _attention_flops(model, pairs.executed), trunk + _attention_flops(model, pairs.needed), moved)


def count_sampling(model: ModelConfig, sizes: Sizes) -> Work:
    """The head on the last states of all members, once a new token; the vocabulary is read once a token."""
    product = 2.0 * sizes.completion_tokens * model.hidden_size * sizes.vocabulary
    return Work(product, product, float(sizes.new_tokens * model.hidden_size * sizes.vocabulary * _itemsizes(model)[0]))


def count_decode(model: ModelConfig, sizes: Sizes, *, lora: LoraConfig | None = None) -> Work:
    """The C - 1 steps after the first token, heads left out (`count_sampling`).

    Each step reads all weights, the prompts' keys and values once a group, and the cache of new tokens, whose C places are all attended to.
    """
    b, p, g, c, _ = sizes
    steps = c - 1
    linears = count_linears(model, lora)
    trunk = 2.0 * model.num_layers * (linears.kernels + linears.adapters) * b * g * steps
    executed, needed = b * _pad(g, QUERY_BLOCK) * steps * (p + c), b * g * steps * (p + c / 2)
    # The keys and values of new tokens are read whole and written once.
    cached = count_cache(model, b * p) + count_cache(model, b * g * (c + 1))
    moved = steps * (_weight_bytes(model, lora) + cached)
    return Work(trunk + _attention_flops(model, executed), trunk + _attention_flops(model, needed), moved)


def count_rollout(model: ModelConfig, sizes: Sizes, *, lora: LoraConfig | None = None) -> Work:
    """Prefill, decoding and the head for every new token; sampling itself is no matrix product and is left out."""
    return count_prefill(model, sizes, lora=lora).plus(count_sampling(model, sizes), count_decode(model, sizes, lora=lora))


def count_forward(
    model: ModelConfig, sizes: Sizes, *, lora: LoraConfig | None = None, saves: bool = False, weights_read: bool = True
) -> Work:
    """Prompts and completions through the layers on one token axis, as training and ranking do; no head.

    With `saves` each layer's input is written for a backward pass. `weights_read` is False where another pass beside this one reads the
    same weights (policy and reference).
    """
    linears, pairs = count_linears(model, lora), (count_prompt_pairs(sizes), count_completion_pairs(sizes))
    trunk = 2.0 * model.num_layers * (linears.kernels + linears.adapters) * sizes.tokens
    executed, needed = sum(part.executed for part in pairs), sum(part.needed for part in pairs)
    weight, activation = _itemsizes(model)
    moved = sizes.tokens * model.hidden_size * weight + (_weight_bytes(model, lora) if weights_read else 0.0)
    moved += model.num_layers * sizes.tokens * model.hidden_size * activation if saves else 0.0
    return Work(trunk + _attention_flops(model, executed), trunk + _attention_flops(model, needed), moved)


def count_backward(model: ModelConfig, sizes: Sizes, *, lora: LoraConfig | None, mode: Literal["lora", "full"]) -> Work:
    """Gradients through the layers, with what `model.remat` computes again; no head.

    The gradient to an activation costs a product of the forward's size, the gradient to a weight another, which frozen kernels are spared.
    Rematerialisation of whole layers does the forward again, but for the last product, whose result only the next layer reads; "dots"
    keeps the products and makes attention again.
    """
    linears, pairs = count_linears(model, lora), (count_prompt_pairs(sizes), count_completion_pairs(sizes))
    executed, needed = sum(part.executed for part in pairs), sum(part.needed for part in pairs)
    per_token = linears.kernels * (2 if mode == "full" else 1) + 2 * linears.adapters
    trunk = 2.0 * model.num_layers * sizes.tokens * per_token
    again, scores_again = 0.0, _attention_flops(model, sum(part.blocked for part in pairs)) / 2
    if model.remat == "full":
        again = 2.0 * model.num_layers * sizes.tokens * (linears.kernels - linears.down + linears.adapters - linears.down_adapter_b)
    if model.remat != "none":
        scores_again += _attention_flops(model, executed)
    activation = _itemsizes(model)[1]
    passes = 2 if model.remat == "full" else 1
    trained = 4.0 * model.num_layers * (linears.kernels if mode == "full" else linears.adapters)
    moved = passes * _weight_bytes(model, lora) + model.num_layers * sizes.tokens * model.hidden_size * activation + trained
    flops = trunk + again + 2 * _attention_flops(model, executed) + scores_again
    return Work(flops, trunk + 2 * _attention_flops(model, needed), moved)


HeadJob = Literal["forward", "accumulate", "recompute", "train"]


def count_head(
    model: ModelConfig, rows: int, vocabulary: int, logprob: LogprobConfig, *, job: HeadJob, reference: bool = False, exact: bool = False
) -> Work:
    """The log-prob operation on `rows` states, in products of 2 rows D V.

    Args:
      job: "forward": log-probs. "accumulate": and the gradient of a frozen head's loss in the same pass. "recompute": that gradient in a
        second pass that makes the logits again. "train": the same with a gradient to the head.
      reference: a second policy's log-probs beside the first's.
      exact: the gradient is of the exact KL, which makes the reference's logits again too.
    """
    backward = {"forward": (0, 0), "accumulate": (1, 1), "recompute": (2, 1), "train": (3, 2)}[job]
    products = 1 + reference + backward[0] + (1 if exact and job in ("recompute", "train") else 0)
    needed = 1 + reference + backward[1]
    chunk = logprob.chunk_tokens if logprob.implementation == "xla_chunked" else rows
    product = 2.0 * _pad(rows, chunk) * model.hidden_size * vocabulary
    table = vocabulary * model.hidden_size * _itemsizes(model)[0] * -(-rows // chunk)
    states = rows * model.hidden_size * _itemsizes(model)[1]
    moved = products * table + (1 + reference + (2 if job != "forward" else 0)) * states
    return Work(products * product, needed * 2.0 * rows * model.hidden_size * vocabulary, float(moved))


def count_optimizer(trained: float) -> Work:
    """AdamW on `trained` float32 weights: weight, gradient and two moments read, all but the gradient written; no products."""
    return Work(0.0, 0.0, 7 * 4.0 * trained)


def count_trained(model: ModelConfig, vocabulary: int, *, lora: LoraConfig, mode: Literal["lora", "full"]) -> int:
    """Weights the optimizer holds."""
    return count_parameters(model, vocabulary) if mode == "full" else model.num_layers * count_linears(model, lora).adapters


def count_update(model: ModelConfig, sizes: Sizes, grpo: GrpoConfig, logprob: LogprobConfig, *, reuse: bool = False) -> dict[str, Work]:
    """One optimizer step of GRPO on `grpo.accumulation` micro-batches of `sizes`: by phase.

    With `reuse` the policy's forward pass is taken from the rollout, and the backward pass starts from its layers' inputs, as it does under
    full rematerialisation; `model_flops` still holds the forward pass out, as it was the rollout's.
    """
    full, exact = grpo.mode == "full", grpo.kl_estimator == "exact" and grpo.beta > 0
    lora, reference = None if full else grpo.lora, grpo.beta > 0
    job: HeadJob = "train" if full else "recompute" if exact else "accumulate"
    replayed = dataclasses.replace(model, remat="full") if reuse else model
    parts = {
        "forward": NO_WORK if reuse else count_forward(model, sizes, lora=lora, saves=True),
        # In full mode the reference has weights of its own.
        "reference": count_forward(model, sizes, weights_read=full or reuse) if reference else NO_WORK,
        "head": count_head(model, sizes.completion_tokens, sizes.vocabulary, logprob, job=job, reference=reference, exact=exact),
        "backward": count_backward(replayed, sizes, lora=lora, mode=grpo.mode),
    }
    parts = {name: work.times(grpo.accumulation) for name, work in parts.items()}
    parts["optimizer"] = count_optimizer(count_trained(model, sizes.vocabulary, lora=grpo.lora, mode=grpo.mode))
    return parts


def count_sft(model: ModelConfig, sizes: Sizes, sft: SftConfig, logprob: LogprobConfig) -> dict[str, Work]:
    """One optimizer step of SFT on `sft.accumulation` micro-batches of `sizes` (G = 1): by phase."""
    full = sft.mode == "full"
    job: HeadJob = "train" if full else "accumulate"
    lora = None if full else sft.lora
    rows = [sizes.completion_tokens] + ([sizes.prompts * (sizes.prompt_tokens - 1)] if sft.history_loss_weight else [])
    parts = {
        "forward": count_forward(model, sizes, lora=lora, saves=True),
        "head": NO_WORK.plus(*(count_head(model, count, sizes.vocabulary, logprob, job=job) for count in rows)),
        "backward": count_backward(model, sizes, lora=lora, mode=sft.mode),
    }
    parts = {name: work.times(sft.accumulation) for name, work in parts.items()}
    parts["optimizer"] = count_optimizer(count_trained(model, sizes.vocabulary, lora=sft.lora, mode=sft.mode))
    return parts


def sum_work(parts: dict[str, Work]) -> Work:
    """All phases together."""
    return NO_WORK.plus(*parts.values())
