"""Worker of bench_logprob_kl.py: the same jobs in PyTorch, by torch.compile, Liger Kernel and Cut Cross-Entropy."""

from __future__ import annotations

import functools
import inspect
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from logprob_kl_work import (
    BETA,
    DISTRIBUTIONS,
    MARGIN,
    Case,
    Size,
    append_line,
    compute_truth,
    describe_error,
    describe_machine,
    find_share,
    list_stage,
    make_row,
    parse_worker_arguments,
    pick_rows,
    relative_error,
    run_worker,
    sequence_tokens,
    time_calls,
    timing_seconds,
)

try:
    import torch
except ModuleNotFoundError as error:
    options = parse_worker_arguments()
    for case in list_stage("torch", options.stage, tiny=options.tiny):
        for distribution in DISTRIBUTIONS:
            append_line(options.lines, make_row(case, distribution, status="skipped", reason=describe_error(error)))
    sys.exit(0)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORED = -100


class Inputs(NamedTuple):
    hidden: torch.Tensor
    head: torch.Tensor
    hidden_ref: torch.Tensor
    target: torch.Tensor
    logp_ref: torch.Tensor
    advantage: torch.Tensor
    weight: torch.Tensor


def compute_logp(hidden: torch.Tensor, head: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The plain formula: logits in the matmul's dtype, softmax in float32."""
    logits = (hidden @ head.T).float()
    return logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)


def compute_k3_loss(logp: torch.Tensor, logp_ref: torch.Tensor, x: Inputs) -> torch.Tensor:
    gap = logp_ref - logp
    loss = -x.advantage * torch.exp(logp - logp.detach()) + BETA * (torch.exp(gap) - gap - 1)
    return (x.weight * loss).sum() / x.weight.sum()


def make_logp(row: str) -> Callable[..., torch.Tensor]:
    """(hidden, head, target) to log-probs that have a gradient."""
    if row == "torch.compile":
        return torch.compile(compute_logp, dynamic=False)
    import cut_cross_entropy

    call = cut_cross_entropy.linear_cross_entropy
    if "accum_e_fp32" in inspect.signature(call).parameters:  # later than 25.1: a name a variant
        choice: dict[str, Any] = {"impl": "cce_exact" if row == "CCE exact" else "cce"}
    else:
        choice = {"filter_eps": None if row == "CCE exact" else "auto"}
    return lambda hidden, head, target: -call(hidden, head, target, reduction="none", **choice)


def make_loss(case: Case) -> Callable[[Inputs], torch.Tensor]:
    """The job's loss; what it is a loss of differs only for Liger CE, which knows no other than the mean negative log-prob."""
    if case.row == "Liger CE":
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        nll = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED)
        return lambda x: nll(x.head, x.hidden, torch.where(x.weight > 0, x.target, IGNORED))
    if case.row == "Liger GRPO":
        from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

        sequences = case.size.n // sequence_tokens(case.size)
        # One chunk: it streams over 2048 tokens at a time inside.
        grpo = LigerFusedLinearGRPOLoss(beta=BETA, loss_type="bnpo", chunk_size=sequences)

        def loss(x: Inputs) -> torch.Tensor:
            batch = (sequences, -1)
            hidden, hidden_ref = x.hidden.view(*batch, x.hidden.shape[1]), x.hidden_ref.view(*batch, x.hidden.shape[1])
            advantage = x.advantage.view(batch)[:, 0]
            return grpo(hidden, x.head, x.target.view(batch), x.weight.view(batch), advantage, ref_input=hidden_ref, ref_weight=x.head)[0]

        return loss
    logp = make_logp(case.row)

    def loss(x: Inputs) -> torch.Tensor:
        logp_ref = x.logp_ref
        if case.job == "policy_ref":
            with torch.no_grad():
                logp_ref = logp(x.hidden_ref, x.head, x.target)
        return compute_k3_loss(logp(x.hidden, x.head, x.target), logp_ref, x)

    return loss


def make_function(case: Case) -> Callable[[Inputs], Any]:
    """Inputs to log-probs (`forward`), or to the gradients: (hidden,), with grad_head (hidden, head)."""
    if case.job == "forward":
        logp = make_logp(case.row)

        @torch.no_grad()
        def forward(x: Inputs) -> torch.Tensor:
            return logp(x.hidden, x.head, x.target)

        return forward
    loss = make_loss(case)

    def gradient(x: Inputs) -> tuple[torch.Tensor, ...]:
        wanted = [x.hidden.detach().requires_grad_()]
        x = x._replace(hidden=wanted[0])
        if case.job == "grad_head":
            wanted.append(x.head.detach().requires_grad_())
            x = x._replace(head=wanted[1])
        return torch.autograd.grad(loss(x), wanted)

    return gradient


@functools.lru_cache(maxsize=1)
def make_inputs(size: Size) -> dict[str, Inputs]:
    """By distribution; drawn as in logprob_kl_jax.py."""
    draw = torch.Generator(DEVICE).manual_seed(size.n + size.d)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, device=DEVICE)

    head = (normal(size.v, size.d) * size.d**-0.5).bfloat16()
    inputs = {}
    for distribution in DISTRIBUTIONS:
        target = torch.randint(size.v, (size.n,), generator=draw, device=DEVICE)
        hidden = normal(size.n, size.d)
        if distribution == "trained_like":
            margin = MARGIN[0] + (MARGIN[1] - MARGIN[0]) * torch.rand(size.n, 1, generator=draw, device=DEVICE)
            hidden += margin * head[target].float()
        hidden_ref = hidden + 0.1 * normal(size.n, size.d)
        logit = (hidden_ref * head[target].float()).sum(-1)
        logp_ref = torch.nn.functional.logsigmoid(logit - np.log(size.v) - 0.5)
        advantage = normal(size.n // sequence_tokens(size)).repeat_interleave(sequence_tokens(size))
        weight = torch.ones(size.n, device=DEVICE)
        inputs[distribution] = Inputs(hidden.bfloat16(), head, hidden_ref.bfloat16(), target, logp_ref, advantage, weight)
    return inputs


def find_errors(case: Case, function: Callable[[Inputs], Any], x: Inputs) -> dict[str, float]:
    """As in logprob_kl_jax.py."""
    picked = pick_rows(case.size.n)
    rows = torch.from_numpy(picked).to(DEVICE)
    parts = x.head.split(16384)

    def read(values: torch.Tensor) -> np.ndarray:
        return values.double().cpu().numpy()

    logits, logits_ref = (
        np.concatenate([read(h[rows].double() @ part.double().T) for part in parts], axis=1) for h in (x.hidden, x.hidden_ref)
    )
    target, logp_ref, advantage = x.target[rows].cpu().numpy(), read(x.logp_ref[rows]), read(x.advantage[rows])
    truth = compute_truth(logits, logits_ref, target, logp_ref, advantage, job=case.job, nll=case.row == "Liger CE")
    errors = {"top_probability": truth.top_probability, "entropy": truth.entropy}
    with_head = case.job == "grad_head"
    out = function(x._replace(weight=torch.zeros_like(x.weight).index_fill_(0, rows, 1.0)) if with_head else x)
    if case.job == "forward":
        return {**errors, "logp_error": float(np.abs(read(out[rows]) - truth.logp).max())}
    d_logits = torch.from_numpy(truth.d_logits / (len(picked) if with_head else case.size.n)).to(DEVICE)
    d_parts = d_logits.split(16384, dim=1)
    pulls = torch.stack([d @ part.double() for d, part in zip(d_parts, parts, strict=True)])
    errors["gradient_error"] = relative_error(read(out[0][rows]), read(pulls.sum(0)))
    if with_head:
        wrong = right = 0.0
        for d, part in zip(d_parts, out[1].split(16384), strict=True):
            expected = d.T @ x.hidden[rows].double()
            wrong += float((part.double() - expected).square().sum())
            right += float(expected.square().sum())
        errors["head_gradient_error"] = (wrong / right) ** 0.5
    return errors


def wait(_: Any = None) -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure_matmul(tiny: bool) -> float:
    """As in logprob_kl_jax.py."""
    size = 256 if tiny else 8192
    a, b = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    torch.matmul(a, b)
    return 2 * size**3 / (time_calls(lambda: a @ b, wait, seconds=timing_seconds(tiny)).ms["p50"] * 1e-3) / 1e12


def measure_memory(function: Callable[[Inputs], Any], x: Inputs) -> int | None:
    """Most bytes that one call allocates at a time, results included; None without a GPU."""
    if DEVICE == "cpu":
        return None
    wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(x)
    wait()
    return torch.cuda.max_memory_allocated() - before


def main() -> int:
    options = parse_worker_arguments()
    torch.set_float32_matmul_precision("high")  # Liger GRPO's backward multiplies float32
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    matmul_tflops = measure_matmul(options.tiny)
    packages = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "numpy")
    append_line(options.lines, describe_machine("torch", device, matmul_tflops, packages))
    functions: dict[Case, tuple[Callable[[Inputs], Any], float]] = {}

    def prepare(cases: list[Case]) -> None:
        functions.clear()
        torch._dynamo.reset()
        make_inputs(cases[0].size)

    def measure(case: Case, distribution: str) -> dict[str, Any]:
        x = make_inputs(case.size)[distribution]
        try:
            if case not in functions:
                started = time.perf_counter()
                function = make_function(case)
                function(x)
                wait()
                functions[case] = function, time.perf_counter() - started
            function, compile_s = functions[case]
            memory = measure_memory(function, x)
            timing = time_calls(lambda: function(x), wait, seconds=timing_seconds(options.tiny))
            errors = find_errors(case, function, x)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise
        return {
            "ms": timing.ms,
            "samples": timing.samples,
            "calls_a_sample": timing.calls_a_sample,
            "compile_s": round(compile_s, 3),
            "share": find_share(case, timing.ms["p50"], matmul_tflops),
            "allocator_bytes": memory,
            "extra_bytes": memory,
            **errors,
        }

    def is_usable() -> bool:
        try:
            return int(torch.arange(8, device=DEVICE).sum()) == 28
        except Exception:
            return False

    return run_worker("torch", measure, prepare, is_usable)


if __name__ == "__main__":
    sys.exit(main())
