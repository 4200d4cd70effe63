"""The part of a run's configuration that `mllmrec preprocess` reads."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, get_args

from pydantic import Field

from mllmrec_jax.schema import Fraction, PositiveFloat, PositiveInt, config_class

Stage = Literal["caption", "pseudo_cot", "refine_cot", "sanitize", "embed", "score", "mix", "emit"]
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
    """`local`: a small dual encoder trained on the catalogue's own title-picture pairs."""
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
class TransformersConfig:
    """Backend `transformers`: models on this machine."""

    model: str = "Qwen/Qwen3-VL-8B-Instruct"
    """Folder or hub name of the model that writes, where a stage names none."""


@config_class
class OpenaiConfig:
    """Backend `openai`: any server with that interface."""

    model: str = ""
    """Model that writes, as the server calls it, where a stage names none."""


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
