"""Times one GRPO step of Google's Tunix GRPOLearner on the work of configs/bench/peer_tiny.toml.

    profiling/peers/make_env.sh tunix ENV
    ENV/bin/python profiling/peers/tunix_step.py --steps 10 --json FILE

Model, adapters (qwix), sampler, reference log-probs, loss, backward and optimizer are Tunix's own; this file gives sizes, a
tokenizer and prompts, and holds the clocks. README.md beside it lists what had to be arranged and which settings were tried.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from peer_work import CONFIG, LORA_TARGETS, PeerWork, check_config, emit_row, make_parser, make_prompts, make_row
from tunix.models.qwen3 import model as qwen3
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout import base_rollout, vanilla_rollout

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class NumberTokenizer:
    """Text of n numbers is n tokens, the numbers being the ids.

    Padding and end have ids that the model cannot sample (its vocabulary ends before them), so that no completion ends early and
    no sampled token is taken for padding. Neither id reaches the embedding: prompts fill their width and completions theirs.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        return [int(number) for number in text.split()]

    def decode(self, ids: list[int], **kwargs: Any) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        return None

    def pad_id(self) -> int:
        return self._vocab_size

    def eos_id(self) -> int:
        return self._vocab_size + 1


def make_models(work: PeerWork, *, dtype: jnp.dtype, remat: qwen3.RematConfig) -> tuple[qwen3.Qwen3, nnx.Module]:
    """A Qwen3 of the given sizes with random weights, as reference, and the same with LoRA on every linear layer, as actor."""
    config = qwen3.ModelConfig(
        num_layers=work.num_layers,
        vocab_size=work.vocab_size,
        embed_dim=work.hidden_size,
        hidden_dim=work.intermediate_size,
        num_heads=work.num_heads,
        head_dim=work.head_dim,
        num_kv_heads=work.num_kv_heads,
        rope_theta=int(work.rope_theta),
        norm_eps=work.norm_eps,
        use_tied_embedding=True,
        remat_config=remat,
        dtype=dtype,
        param_dtype=dtype,
    )
    base = qwen3.Qwen3(config, rngs=nnx.Rngs(0))
    # Tunix leaves the feed-forward weights at zero, to be loaded from a file: here nothing is loaded.
    rng = np.random.default_rng(0)
    for layer in base.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            linear.kernel.set_value(jnp.asarray(rng.normal(0.0, 0.02, linear.kernel.get_value().shape), dtype))
    adapters = qwix.LoraProvider(module_path="|".join(f".*{target}" for target in LORA_TARGETS), rank=work.lora_rank, alpha=work.lora_alpha)
    return base, qwix.apply_lora_to_model(base, adapters, rngs=nnx.Rngs(1), **base.get_model_input())


class PlainRollout(vanilla_rollout.VanillaRollout):
    """Tunix's vanilla sampler on the actor's own variables, without remat and with a clock.

    The sampler merges the model inside `lax.while_loop` from variables of the trace around it; `nnx.remat` writes them back, which
    flax refuses ("Cannot mutate Param from a different trace level"). Sampling has no backward pass, so nothing is lost.
    """

    def __init__(self, rollout_actor: nnx.Module, tokenizer: Any, mesh: Any, rollout_config: base_rollout.RolloutConfig) -> None:
        twin = nnx.merge(*nnx.split(rollout_actor))
        for _, module in nnx.iter_modules(twin):
            if isinstance(getattr(module, "config", None), qwen3.ModelConfig):
                module.config = dataclasses.replace(module.config, remat_config=qwen3.RematConfig.NONE)
        cache = base_rollout.CacheConfig(
            cache_size=rollout_config.kv_cache_size,
            num_layers=twin.config.num_layers,
            num_kv_heads=twin.config.num_kv_heads,
            head_dim=twin.config.head_dim,
        )
        super().__init__(twin, tokenizer, cache)
        self.generate_s: list[float] = []
        self.lengths: set[int] = set()

    def generate(self, *args: Any, **kwargs: Any) -> base_rollout.RolloutOutput:
        start = time.perf_counter()
        output = super().generate(*args, **kwargs)
        self.generate_s.append(time.perf_counter() - start)
        self.lengths.update(len(tokens) for tokens in output.tokens)
        return output


class TimedPrompts:
    """The training batches; their arrival at the learner marks the start of a step, their exhaustion the end of the last one."""

    def __init__(self, texts: list[str], batch: int) -> None:
        self._texts = texts
        self._batch = batch
        self.asked: list[tuple[float, float]] = []

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(self._texts), self._batch):
            self.asked.append((time.perf_counter(), time.process_time()))
            yield {"prompts": np.array(self._texts[start : start + self._batch])}
        self.asked.append((time.perf_counter(), time.process_time()))


def main() -> None:
    """Runs warm-up and measured steps and emits the row."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="dtype of weights and activations")
    parser.add_argument("--remat", choices=("BLOCK", "DECODER"), default="DECODER", help="Tunix's RematConfig")
    parser.add_argument("--micro-batch", type=int, default=2, help="prompts a backward pass; 2 is the whole batch")
    args = parser.parse_args()

    work = PeerWork()
    if CONFIG.exists():
        check_config(work)
    steps = args.warmup + args.steps
    prompts = make_prompts(work, steps, first_id=0).reshape(-1, work.prompt_tokens)
    data = TimedPrompts([" ".join(map(str, prompt)) for prompt in prompts], work.prompts)
    base, actor = make_models(work, dtype=DTYPES[args.dtype], remat=qwen3.RematConfig[args.remat])

    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=actor,
        reference=base,
        tokenizer=NumberTokenizer(work.vocab_size),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine=PlainRollout,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.chain(optax.clip_by_global_norm(work.max_grad_norm), optax.adamw(work.learning_rate)),
                eval_every_n_steps=steps + 1,
                max_steps=steps + 1,
                mini_batch_size=work.prompts,
                train_micro_batch_size=args.micro_batch,
                rollout_micro_batch_size=work.prompts,
                compute_logps_micro_batch_size=args.micro_batch,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=work.max_new_tokens,
                max_prompt_length=work.prompt_tokens,
                kv_cache_size=work.prompt_tokens + work.max_new_tokens,
                temperature=work.temperature,
                top_p=work.top_p,
                top_k=None,
            ),
        ),
    )
    rng = np.random.default_rng(0)

    def random_reward(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        return rng.normal(size=len(completions)).tolist()

    learner = GRPOLearner(
        rl_cluster=cluster,
        algo_config=GRPOConfig(num_generations=work.group_size, num_iterations=1, beta=work.beta, kl_loss_mode="low_var_kl"),
        reward_fns=random_reward,
    )
    learner.train(data)
    rollout = cluster.rollout
    if rollout.lengths != {work.max_new_tokens}:
        raise ValueError(f"generation: expected completions of {work.max_new_tokens} tokens, got lengths {sorted(rollout.lengths)}")
    if cluster.actor_trainer.train_steps != steps:
        raise ValueError(f"training: expected {steps} optimizer steps, got {cluster.actor_trainer.train_steps}")
    adapters = [jax.tree.leaves(nnx.state(model, nnx.LoRAParam)) for model in (cluster.actor_trainer.model, rollout.model())]
    if not all(np.array_equal(trained, sampled) for trained, sampled in zip(*adapters, strict=True)):
        raise ValueError("rollout: expected the trained adapters in the sampler, got others; weights would need synchronising each step")

    wall, cpu = np.diff(np.array(data.asked), axis=0).T.tolist()
    settings = {key: getattr(args, key) for key in ("dtype", "remat", "micro_batch")} | {
        "rollout": "vanilla",
        "devices": jax.device_count(),
    }
    settings["trainable_parameters"] = sum(leaf.size for leaf in adapters[0])
    packages = ("google-tunix", "jax", "jaxlib", "flax", "qwix", "optax")
    row = make_row(
        "tunix",
        work,
        settings,
        packages,
        step_s=wall,
        generate_s=rollout.generate_s,
        cpu_s=cpu,
        warmup=args.warmup,
    )
    emit_row(row, args.json)


if __name__ == "__main__":
    main()
