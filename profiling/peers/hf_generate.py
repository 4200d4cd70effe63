"""Times one rollout by Hugging Face transformers' `generate` on the work of configs/bench/peer_tiny.toml.

    profiling/peers/make_env.sh trl ENV
    ENV/bin/python profiling/peers/hf_generate.py --steps 10 --json FILE

The model is the random Qwen3 of hf_model.py without adapters, which favours the peer: ours applies them. README.md beside this file
lists which settings were tried.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in trl_step.py

import torch
from hf_model import DTYPES, FIRST_ID, add_options, describe_calls, make_model, read_generation_options, time_calls
from peer_work import CONFIG, PeerWork, check_config, emit_row, make_parser, make_prompts
from transformers import DynamicCache, Qwen3ForCausalLM


def generate_repeated(model: Qwen3ForCausalLM, prompts: torch.Tensor, group_size: int, options: dict[str, Any]) -> torch.Tensor:
    """`generate`'s own way to several completions: it computes each prompt [B, P] `group_size` times."""
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), num_return_sequences=group_size, **options)


def generate_shared(model: Qwen3ForCausalLM, prompts: torch.Tensor, group_size: int, options: dict[str, Any]) -> torch.Tensor:
    """Each prompt [B, P] computed once, but for its last token; `generate` goes on from `group_size` copies of its cache."""
    cache = DynamicCache(config=model.config)
    model(prompts[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(group_size)
    rows = prompts.repeat_interleave(group_size, 0)
    options = {name: value for name, value in options.items() if name != "cache_implementation"}
    return model.generate(rows, attention_mask=torch.ones_like(rows), past_key_values=cache, **options)


METHODS = {"repeated": generate_repeated, "shared": generate_shared}


def main() -> None:
    """Runs warm-up and measured rollouts and emits the row."""
    parser = make_parser(__doc__.splitlines()[0])
    add_options(parser, compiled=False)
    parser.add_argument("--prompt", choices=sorted(METHODS), default="repeated", help="shared: the cache of a prompt made once and copied")
    args = parser.parse_args()
    if args.prompt == "shared" and args.cache != "dynamic":
        parser.error(f"--prompt shared: expected --cache dynamic with it, whose rows can be copied, got --cache {args.cache}")

    work = PeerWork()
    if CONFIG.exists():
        check_config(work)
    model = make_model(work, dtype=DTYPES[args.dtype], attention=args.attention).eval()
    prompts = torch.from_numpy(make_prompts(work, args.warmup + args.steps, first_id=FIRST_ID))
    options = read_generation_options(args) | {
        "do_sample": True,
        "temperature": work.temperature,
        "top_p": work.top_p,
        "top_k": 0,
        "min_new_tokens": work.max_new_tokens,
        "max_new_tokens": work.max_new_tokens,
    }
    with torch.inference_mode():
        times = time_calls(lambda batch: METHODS[args.prompt](model, batch, work.group_size, options), list(prompts), work)
    emit_row(describe_calls("hf-generate", args, work, "rollout", times), args.json)


if __name__ == "__main__":
    main()
