"""Times the ranking evaluation of the public MLLMRec-R1 code's kind by Hugging Face transformers' `generate`.

    profiling/peers/make_env.sh trl ENV
    ENV/bin/python profiling/peers/hf_rank.py --steps 10 --json FILE

For each user and each K of the report one greedy generation, batch 1, with the sizes of `mllmrec bench rank` on
configs/bench/peer_tiny.toml. The model is the random Qwen3 of hf_model.py without adapters. README.md beside this file says how the public
code evaluates, what is left out here in the peer's favour, and which settings were tried.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in trl_step.py

import torch
from hf_model import DTYPES, FIRST_ID, add_options, describe_calls, make_model, read_generation_options, time_calls
from peer_work import CONFIG, PeerWork, check_config, emit_row, make_parser, make_prompts


def main() -> None:
    """Ranks users one after the other, warm-up first, and emits the row."""
    parser = make_parser(__doc__.splitlines()[0])
    add_options(parser, compiled=True)
    args = parser.parse_args()

    work = PeerWork()
    if CONFIG.exists():
        check_config(work)
    model = make_model(work, dtype=DTYPES[args.dtype], attention=args.attention).eval()
    # A prompt names its K, so that a user's prompts differ: [users, K's, prompt_tokens].
    prompts = torch.from_numpy(make_prompts(work, args.warmup + args.steps, first_id=FIRST_ID, prompts=len(work.cutoffs)))
    options = read_generation_options(args) | {
        "do_sample": False,
        "min_new_tokens": work.max_new_tokens,
        "max_new_tokens": work.max_new_tokens,
    }

    def rank_user(user: torch.Tensor) -> torch.Tensor:
        return torch.cat([model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **options) for prompt in user])

    with torch.inference_mode():
        times = time_calls(rank_user, list(prompts), work)
    row = describe_calls("hf-rank", args, work, "user", times)
    emit_row(row | {"users_per_s": round(1 / row["user_s"]["p50"], 4)}, args.json)


if __name__ == "__main__":
    main()
