"""Times one GRPO step of Hugging Face TRL's GRPOTrainer on the work of configs/bench/peer_tiny.toml, or of another of these.

    profiling/peers/make_env.sh trl ENV
    ENV/bin/python profiling/peers/trl_step.py --steps 10 --json FILE
    python profiling/peers/trl_step.py --config configs/bench/qwen3_0_6b.toml --device cuda --dtype bfloat16 --micro-batch 16

Generation, reference log-probs, loss, backward and optimizer are TRL's own; this file holds the clocks, and hf_model.py makes a random
Qwen3 and a tokenizer. README.md beside it lists what had to be arranged and which settings were tried.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Read when torch is loaded. Threads that spin for one without a core make a call ten times as long on a machine shared with others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from datasets import Dataset
from hf_model import DTYPES, FIRST_ID, make_model, make_tokenizer
from peer_work import CONFIG, LORA_TARGETS, PeerWork, check_config, emit_row, make_parser, make_prompts, make_row, read_work
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer with a clock around its generation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.generate_s: list[float] = []
        self.lengths: set[int] = set()
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        output = super()._generate_single_turn(*args, **kwargs)
        self.generate_s.append(time.perf_counter() - start)
        self.lengths.update(len(completion) for completion in output[0])
        return output


class StepClock(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next (the first: from the start of training)."""

    def __init__(self) -> None:
        self.step_s: list[float] = []
        self.cpu_s: list[float] = []
        self._last = (0.0, 0.0)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._last = (time.perf_counter(), time.process_time())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = (time.perf_counter(), time.process_time())
        self.step_s.append(now[0] - self._last[0])
        self.cpu_s.append(now[1] - self._last[1])
        self._last = now


def main() -> None:
    """Runs warm-up and measured steps and emits the row."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="dtype of weights and activations")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="attention of the transformers model")
    parser.add_argument("--micro-batch", type=int, default=4, help="completions a backward pass; 16 is the whole batch")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model in training (TrainingArguments.torch_compile)")
    parser.add_argument("--cache", default=None, help="GRPOConfig.cache_implementation, for example static")
    parser.add_argument("--config", type=Path, default=CONFIG, help="TOML of `mllmrec bench step` whose sizes are taken")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it trains")
    args = parser.parse_args()

    work = PeerWork()
    if args.config != CONFIG:
        work = read_work(args.config)
    elif CONFIG.exists():
        check_config(work)
    completions = work.prompts * work.group_size
    steps = args.warmup + args.steps
    tokenizer = make_tokenizer(work)
    prompts = make_prompts(work, steps, first_id=FIRST_ID).reshape(-1, work.prompt_tokens)
    texts = [" ".join(f"t{token}" for token in prompt) for prompt in prompts]
    if tokenizer(texts[0])["input_ids"] != prompts[0].tolist():
        raise ValueError("tokenizer: expected the prompt's own ids back, got others; a prompt would not have the length it should")
    rng = np.random.default_rng(0)

    def random_reward(completions: list[str], **kwargs: Any) -> list[float]:
        return rng.normal(size=len(completions)).tolist()

    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=args.device == "cpu",
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            max_steps=steps,
            per_device_train_batch_size=args.micro_batch,
            gradient_accumulation_steps=completions // args.micro_batch,
            num_generations=work.group_size,
            num_iterations=1,
            max_completion_length=work.max_new_tokens,
            generation_kwargs={"min_new_tokens": work.max_new_tokens},
            temperature=work.temperature,
            top_p=work.top_p,
            top_k=0,
            beta=work.beta,
            loss_type="grpo",
            scale_rewards="none",
            cache_implementation=args.cache,
            learning_rate=work.learning_rate,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_grad_norm=work.max_grad_norm,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            torch_compile=args.compile,
        )
        trainer = TimedTrainer(
            model=make_model(work, dtype=DTYPES[args.dtype], attention=args.attention),
            reward_funcs=random_reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=work.lora_rank, lora_alpha=work.lora_alpha, lora_dropout=0.0, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM"
            ),
            callbacks=[clock],
        )
        trainer.train()
    if trainer.lengths != {work.max_new_tokens}:
        raise ValueError(f"generation: expected completions of {work.max_new_tokens} tokens, got lengths {sorted(trainer.lengths)}")

    settings = {key: getattr(args, key) for key in ("dtype", "attention", "micro_batch", "compile", "cache", "device")}
    settings |= {"gradient_checkpointing": "non-reentrant", "optimizer": "adamw_torch_fused", "threads": torch.get_num_threads()}
    settings["omp_wait_policy"] = os.environ["OMP_WAIT_POLICY"]
    settings["trainable_parameters"] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    packages = ("trl", "transformers", "peft", "accelerate", "torch")
    row = make_row(
        "trl",
        work,
        settings,
        packages,
        step_s=clock.step_s,
        generate_s=trainer.generate_s,
        cpu_s=clock.cpu_s,
        warmup=args.warmup,
    )
    emit_row(row, args.json)


if __name__ == "__main__":
    main()
