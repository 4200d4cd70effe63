"""A random Qwen3 of transformers, a tokenizer for it, and clocks around calls of it: what trl_step.py and hf_*.py share."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from peer_work import PeerWork, make_call_row
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CompileConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD_ID, END_ID, FIRST_ID = 0, 1, 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PACKAGES = ("transformers", "torch")


def make_tokenizer(work: PeerWork) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocab_size` entries: two special tokens, and whole words `t2`, `t3` ... split at spaces: n words are n tokens."""
    names = {"<pad>": PAD_ID, "<end>": END_ID} | {f"t{i}": i for i in range(FIRST_ID, work.vocab_size)}
    words = Tokenizer(models.WordLevel(names, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", padding_side="left")


def make_model(work: PeerWork, *, dtype: torch.dtype, attention: str) -> Qwen3ForCausalLM:
    """A Qwen3 of the given sizes with random weights."""
    config = Qwen3Config(
        vocab_size=work.vocab_size,
        hidden_size=work.hidden_size,
        intermediate_size=work.intermediate_size,
        num_hidden_layers=work.num_layers,
        num_attention_heads=work.num_heads,
        num_key_value_heads=work.num_kv_heads,
        head_dim=work.head_dim,
        max_position_embeddings=work.prompt_tokens + work.max_new_tokens,
        rms_norm_eps=work.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": work.rope_theta},
        tie_word_embeddings=True,
        attn_implementation=attention,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).to(dtype)


def add_options(parser: argparse.ArgumentParser, *, compiled: bool) -> None:
    """Settings of `generate` that may favour the peer. The defaults, `compiled` among them, are the fastest that were found."""
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="dtype of weights and activations")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="attention of the transformers model")
    parser.add_argument("--cache", choices=("dynamic", "static"), default="static", help="cache_implementation of `generate`")
    words = "torch.compile the decoding steps; needs --cache static and a C++ compiler"
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=compiled, help=words)


def read_generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_options` reads, as arguments of `generate`.

    Raises:
        ValueError: compilation without a static cache, which `generate` would leave out with no more than a warning.
    """
    if args.compile and args.cache != "static":
        raise ValueError(f"--compile: expected --cache static with it, got --cache {args.cache}")
    options = {"cache_implementation": args.cache, "disable_compile": not args.compile}
    if args.compile:
        options["compile_config"] = CompileConfig()
        options["compile_config"]._compile_all_devices = True  # otherwise transformers compiles on accelerators only
    return options


def time_calls(
    call: Callable[[torch.Tensor], torch.Tensor], batches: Sequence[torch.Tensor], work: PeerWork
) -> tuple[list[float], list[float]]:
    """Calls `call` on each batch of prompts.

    Args:
        call: prompts [..., prompt_tokens] to sequences [rows, prompt_tokens + max_new_tokens].
        batches: prompts, on the device; warm-up included.
        work: sizes.

    Returns:
        Seconds, and processor seconds of all threads, of each call.

    Raises:
        ValueError: a completion has another length, or an end token: the seconds would be of other work.
    """
    seconds, cpu = [], []
    for batch in batches:
        started = time.perf_counter(), time.process_time()
        sequences = call(batch)
        seconds.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])
        new = sequences[:, work.prompt_tokens :]
        if new.shape[1] != work.max_new_tokens or bool((new == END_ID).any()):
            raise ValueError(f"generate: expected {work.max_new_tokens} new tokens and no end token, got {tuple(new.shape)}")
    return seconds, cpu


def describe_calls(
    name: str, args: argparse.Namespace, work: PeerWork, call: str, times: tuple[list[float], list[float]]
) -> dict[str, Any]:
    """The row of what `time_calls` timed; arguments as `make_call_row`."""
    settings = {key: value for key, value in vars(args).items() if key not in ("steps", "warmup", "json")} | {
        "adapters": None,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
    }
    seconds, cpu = times
    return make_call_row(name, work, settings, PACKAGES, call=call, seconds=seconds, cpu_s=cpu, warmup=args.warmup)
