"""One run = one `RunConfig`: frozen nested dataclasses, loaded strictly from TOML.

Defaults live here and nowhere else. A field's docstring is its `--help` text and gives its unit.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError

from mllmrec_jax.preprocess_config import PreprocessConfig
from mllmrec_jax.schema import ConfigT, Count, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, config_class


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names file, key, expected, got."""


@config_class
class PosterworldConfig:
    """The embedded data set: a generated catalogue with rendered posters and users with drifting tastes."""

    items: PositiveInt = 300
    """Catalogue size (items)."""
    users: PositiveInt = 3000
    """Number of users."""
    min_length: PositiveInt = 12
    """Shortest user sequence (interactions)."""
    max_length: PositiveInt = 30
    """Longest user sequence (interactions)."""
    seed: int = 0
    """Seed of catalogue, users and pictures."""


@config_class
class DataConfig:
    """Raw interactions, split, windows and candidates."""

    source: Literal["posterworld", "movielens", "mllmrec"] = "posterworld"
    """Reader: `posterworld` generates, `movielens` reads 1M or 100K, `mllmrec` reads the MLLMRec-R1 layout."""
    path: Path | None = None
    """Folder with the raw files (not used by posterworld)."""
    sequences: str | None = None
    """File in `path` with lines `user item item ...` in chronological order, read instead of the ratings."""
    images: Path | None = None
    """Folder with `<item id>.jpg` pictures, where they are not in `path`/images."""
    min_interactions: PositiveInt = 2
    """Users with fewer interactions are left out and counted."""
    max_bad_rows: Count = 0
    """Malformed rows to skip (and count) before giving up (rows)."""
    split: Literal["by_user", "leave_one_out", "global_time", "given"] = "by_user"
    """`by_user`: disjoint users 7:1:2 (the paper's); `leave_one_out`: last item tests; `global_time`: two cuts in time;
    `given`: as train.tsv, valid.tsv and test.tsv say (source `mllmrec`)."""
    split_ratios: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.7, 0.1, 0.2)
    """Shares of train, valid and test (of users, or of time); must sum to 1."""
    split_seed: int = 0
    """Seed of the permutation of users."""
    history_len: PositiveInt = 8
    """Interactions shown before the target (items)."""
    sft_windows: Literal["last", "all", "cover"] = "last"
    """SFT examples: a training user's last item as the target (the paper's), every item, or as few windows as hold every item once."""
    sft_user_share: Fraction = 1.0
    """Share of the training users whose windows SFT sees; below 1, GRPO gets the others, so that no prompt of its was learned by heart."""
    sft_history_len: Count = 0
    """Interactions shown before the target in SFT examples; 0 means `history_len` (items)."""
    sft_resamples: PositiveInt = 1
    """How many times SFT's windows are cut, each time with other places, negatives and candidate order."""
    grpo_windows: Literal["last", "all"] = "last"
    """GRPO's prompts: a training user's last item as the target, or every item."""
    negatives: PositiveInt = 9
    """Candidates beside the target, never interacted with by the user in any split (items)."""
    negative_sampling: Literal["uniform", "popularity"] = "uniform"
    """How evaluation and training negatives are drawn."""
    candidate_seed: int = 0
    """Seed of the candidate lists."""
    posterworld: PosterworldConfig = dataclasses.field(default_factory=PosterworldConfig)


ItemField = Literal["title", "genres", "caption"]


@config_class
class PromptConfig:
    """What a prompt says; the same renderer serves SFT, GRPO and inference."""

    noun: str = "movie"
    """What an item is called in the text."""
    style: Literal["full", "compact"] = "full"
    """`full`: the paper's wording; `compact`: the same parts in a few tokens, for models trained from random weights."""
    history_fields: tuple[ItemField, ...] = ("title",)
    """What is written after `[ITEM_<id>]` in the history."""
    candidate_fields: tuple[ItemField, ...] = ("title",)
    """What is written after `[ITEM_<id>]` in the candidate list."""
    answer_title: bool = True
    """Whether the answer is `[ITEM_<id>] <title>` (the paper's) or `[ITEM_<id>]` alone."""
    list_candidates: bool = True
    """Whether the prompt lists the candidates."""
    reasoning: bool = False
    """Whether training prompts show the user's reasoning trace, where the data hold one; evaluation prompts never do."""
    max_prompt_tokens: PositiveInt = 1024
    """Longest prompt; longer ones drop their oldest history first (tokens)."""
    max_title_chars: PositiveInt = 200
    """Longer titles are cut, with an ellipsis (characters)."""


@config_class
class TokenizerConfig:
    """Which tokenizer, and whether `[ITEM_<id>]` is one token."""

    kind: Literal["train_bpe", "huggingface", "sentencepiece"] = "train_bpe"
    """`train_bpe` trains a small byte-level BPE on the catalogue and the prompts' own wording."""
    path: Path | None = None
    """Folder (huggingface) or `.model` file (sentencepiece)."""
    chat_template: Path | None = None
    """Jinja chat template used instead of the tokenizer's own."""
    vocab_size: PositiveInt = 1024
    """Size of a trained BPE before item tokens (tokens)."""
    item_tokens: bool = True
    """Whether each catalogue item's `[ITEM_<id>]` is added as one token."""


@config_class
class RopeScalingConfig:
    """Llama 3.1's rescaling of the slow rotary frequencies for a longer context (arXiv:2407.21783, section 3.4)."""

    factor: Annotated[float, Field(ge=1)] = 1.0
    """What frequencies of wavelengths beyond the original context are divided by; 1 is off."""
    low_freq_factor: PositiveFloat = 1.0
    """Wavelengths above original_max_position / low_freq_factor are divided in full."""
    high_freq_factor: PositiveFloat = 4.0
    """Wavelengths below original_max_position / high_freq_factor are kept; those between are blended."""
    original_max_position: PositiveInt = 8192
    """Context the model was first trained with (tokens)."""


@config_class
class ModelConfig:
    """A decoder of the Qwen3, Qwen2 or Llama family; sizes are read from `weights`/config.json where that is given."""

    family: Literal["qwen3", "qwen2", "llama"] = "qwen3"
    """Qwen3 has query/key norms, Qwen2 has query/key/value biases, Llama has neither."""
    weights: Path | None = None
    """Hugging Face folder (config.json, safetensors); none means random weights."""
    num_layers: PositiveInt = 3
    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 384
    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt = 2
    head_dim: PositiveInt = 32
    max_position: PositiveInt = 2048
    """Longest sequence the model takes (tokens)."""
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: RopeScalingConfig = dataclasses.field(default_factory=RopeScalingConfig)
    norm_eps: PositiveFloat = 1e-6
    tie_embeddings: bool = True
    """Whether the output head is the embedding table."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of embedding and residual-branch values dropped in SFT (never in GRPO, rollout or ranking)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype of activations."""
    param_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Storage dtype of frozen base weights (weights that are trained are float32)."""
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass recomputes: nothing, all but matrix products, or whole layers."""
    cache_dtype: Literal["compute", "bfloat16", "int8"] = "compute"
    """How keys and values are kept while completions are generated: as computed, rounded, or in 8 bits with a scale a head and token."""


LinearName = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL_LINEARS: tuple[LinearName, ...] = get_args(LinearName)


@config_class
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W x + alpha / rank * B A x."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 16.0
    targets: tuple[LinearName, ...] = ALL_LINEARS
    """Linear layers that carry an adapter."""


@config_class
class OptimizerConfig:
    """AdamW with a warm-up and a decay."""

    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay after the warm-up, to `final_fraction` of the peak at the last step."""
    warmup_steps: Count = 0
    """Linear warm-up (optimizer steps)."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the end, as a fraction of the peak."""
    weight_decay: NonNegativeFloat = 0.0
    b1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    b2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: PositiveFloat = 1e-8
    max_grad_norm: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down; 0 is off."""


@config_class
class SftConfig:
    """Supervised fine-tuning on the answer."""

    mode: Literal["lora", "full"] = "lora"
    """Train adapters, or every weight."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    epochs: PositiveInt = 3
    """Passes over the training windows."""
    max_steps: Count = 0
    """Stop after this many optimizer steps; 0 means the epochs decide."""
    batch_size: PositiveInt = 2
    """Examples a micro-batch."""
    accumulation: PositiveInt = 8
    """Micro-batches an optimizer step."""
    history_loss_weight: NonNegativeFloat = 0.0
    """Weight of the next-item loss on the history's item tokens, beside the answer's loss (0: answer only, the paper's)."""
    checkpoint_every: PositiveInt = 500
    """Optimizer steps between checkpoints."""


@config_class
class RewardConfig:
    """(completion, target) -> score."""

    preset: Literal["paper", "code"] = "paper"
    """`paper`: -1 / 0.3 / 1.3; `code`: -1 / 0.3 / 1.0 for wrong format / right format / hit."""
    require_membership: bool = False
    """Whether an answer outside the candidate list counts as wrong format."""
    require_title: bool = False
    """Whether an answer whose title is not the item's counts as wrong format."""


@config_class
class GrpoConfig:
    """Group-relative policy optimisation (Shao et al. 2024, arXiv:2402.03300)."""

    mode: Literal["lora", "full"] = "lora"
    """Train adapters (the reference is the same weights without them), or every weight (a frozen copy is the reference)."""
    lora: LoraConfig = dataclasses.field(default_factory=lambda: LoraConfig(alpha=32.0))
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    epochs: PositiveInt = 3
    """Passes over the training windows."""
    max_steps: Count = 0
    """Stop after this many rollouts; 0 means the epochs decide."""
    batch_size: PositiveInt = 4
    """Prompts a micro-batch."""
    accumulation: PositiveInt = 8
    """Micro-batches an optimizer step; one rollout makes batch_size * accumulation groups."""
    updates_per_rollout: PositiveInt = 1
    """Optimizer steps on one rollout."""
    reuse_rollout: bool = True
    """The first update on a rollout takes the policy's forward pass from it, at the price of keeping each layer's input of all its
    tokens (layers x hidden_size values a token) until then; off, it is computed again."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Completions a prompt, G."""
    max_new_tokens: PositiveInt = 128
    """Longest completion, C (tokens)."""
    temperature: PositiveFloat = 0.9
    top_p: Fraction = 0.9
    top_k: Count = 0
    """0 keeps every token."""
    beta: NonNegativeFloat = 0.1
    """Weight of the KL penalty to the SFT policy."""
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k3"
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo"] = "grpo"
    scale_rewards: Literal["none", "group", "batch"] = "none"
    """Standard deviation the advantages are divided by."""
    eps_low: PositiveFloat = 0.2
    eps_high: PositiveFloat = 0.2
    """Clip range 1 - eps_low .. 1 + eps_high of the probability ratio (clip-higher: eps_high above eps_low)."""
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    checkpoint_every: PositiveInt = 100
    """Rollouts between checkpoints."""


@config_class
class LogprobConfig:
    """The fused log-prob / KL operation."""

    implementation: Literal["triton", "xla_chunked", "reference"] = "xla_chunked"
    """`triton` (NVIDIA GPU) and `xla_chunked` (any device) never hold tokens x vocabulary; `reference` does."""
    chunk_tokens: PositiveInt = 1024
    """Rows of logits that `xla_chunked` holds at a time (tokens)."""


@config_class
class EvaluateConfig:
    """Ranking of frozen candidate lists, beside floors."""

    batch_size: PositiveInt = 32
    """Users a batch."""
    max_users: Count = 0
    """Test users ranked; 0 means all."""
    bootstrap: PositiveInt = 2000
    """Bootstrap resamples of users behind each 95% interval."""
    seed: int = 0
    """Seed of the bootstrap."""
    examples: Count = 12
    """Example prompts, answers and rankings shown in the report."""


@config_class
class LoaderConfig:
    """Input pipeline."""

    buckets: tuple[PositiveInt, ...] = ()
    """Prompt lengths batches are padded to, ascending; empty means the longest prompt (tokens)."""
    prefetch: PositiveInt = 4
    """Batches read ahead."""
    threads: PositiveInt = 1
    """Reading threads."""


MeshSize = Annotated[int, Field(ge=-1)]


@config_class
class MeshConfig:
    """Devices as data x fsdp x tensor; their product is the number of devices, and one of them may be -1, what is left."""

    data: MeshSize = -1
    """Devices that share out batches and hold all weights."""
    fsdp: MeshSize = 1
    """Devices that share out batches and weights; a layer's weights are gathered for its computation."""
    tensor: MeshSize = 1
    """Devices that share out heads, feed-forward and vocabulary."""


@config_class
class DistributedConfig:
    """The processes of one run and how they find each other."""

    method: Literal["none", "auto", "slurm", "mpi", "kubernetes", "tpu", "explicit"] = "none"
    """`none`: one process; `auto`: whatever cluster JAX detects; `explicit`: from the three fields below; the others: from what the
    scheduler tells its processes, where a field below does not say otherwise. `mllmrec launch` sets it."""
    coordinator: str | None = None
    """`host:port` of process 0, reachable from every process."""
    process_count: PositiveInt | None = None
    """Processes of the run."""
    process_index: Count | None = None
    """This process, from 0."""
    heartbeat_timeout_s: Annotated[int, Field(ge=10, le=50)] = 30
    """A process silent for this long is taken for dead, and the others stop (seconds)."""
    initialization_timeout_s: PositiveInt = 300
    """How long processes wait for each other at the start (seconds)."""


@config_class
class RunConfig:
    """Everything that shapes a run."""

    name: str = "run"
    """Names the run folder."""
    output: Path = Path("runs")
    """Folder that holds run folders."""
    cache: Path = Path("runs/cache")
    """Folder of content-addressed prepared data."""
    seed: int = 0
    """Seed of weights, shuffling and sampling."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    prompt: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    loader: LoaderConfig = dataclasses.field(default_factory=LoaderConfig)
    sft: SftConfig = dataclasses.field(default_factory=SftConfig)
    grpo: GrpoConfig = dataclasses.field(default_factory=GrpoConfig)
    logprob: LogprobConfig = dataclasses.field(default_factory=LogprobConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    preprocess: PreprocessConfig = dataclasses.field(default_factory=PreprocessConfig)


def _known_keys(cls: Any, location: tuple[str | int, ...]) -> list[str]:
    for part in location:
        if isinstance(part, int):  # a place in a list of sections
            continue
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if part not in fields:
            return []
        field = fields[part]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        cls = type(default[0] if isinstance(default, tuple) and default else default)
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def _explain(error: ValidationError, cls: Any, where: str) -> str:
    lines = []
    for issue in error.errors():
        key = ".".join(str(part) for part in issue["loc"])
        if issue["type"] == "unexpected_keyword_argument":
            parent = issue["loc"][:-1]
            known = _known_keys(cls, parent)
            nearest = difflib.get_close_matches(str(issue["loc"][-1]), known, n=1, cutoff=0.4)
            hint = f"; nearest known key: '{'.'.join([*map(str, parent), nearest[0]])}'" if nearest else ""
            lines.append(f"{where}: unknown key '{key}'{hint}; known here: {', '.join(known)}")
        else:
            expected = issue["msg"].removeprefix("Input should be ")
            lines.append(f"{where}: key '{key}': expected {expected}, got {issue['input']!r}")
    return "\n".join(lines)


def _parse(raw: dict[str, Any], cls: type[ConfigT], where: str) -> ConfigT:
    try:
        return TypeAdapter(cls).validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(_explain(error, cls, where)) from None


def check_config(config: RunConfig, where: str = "command line") -> RunConfig:
    """Validates ranges and the relations between fields; returns `config`.

    Raises:
      ConfigError: a value is out of range or two values contradict each other.
    """
    config = _parse(to_dict(config), RunConfig, where)
    problems = []
    if abs(sum(config.data.split_ratios) - 1) > 1e-6:
        problems.append(f"data.split_ratios: expected shares that sum to 1, got {config.data.split_ratios}")
    if config.data.source != "posterworld" and config.data.path is None:
        problems.append(f"data.path: expected the folder with the {config.data.source} files, got nothing; give --data.path FOLDER")
    if config.tokenizer.kind != "train_bpe" and config.tokenizer.path is None:
        problems.append(f"tokenizer.path: expected a {config.tokenizer.kind} tokenizer, got nothing")
    if config.model.num_heads % config.model.num_kv_heads:
        problems.append(
            f"model.num_heads: expected a multiple of model.num_kv_heads = {config.model.num_kv_heads}, got {config.model.num_heads}"
        )
    if config.model.head_dim % 2:
        problems.append(f"model.head_dim: expected an even number (rotary pairs), got {config.model.head_dim}")
    scaling = config.model.rope_scaling
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        problems.append(
            f"model.rope_scaling.high_freq_factor: expected more than low_freq_factor = {scaling.low_freq_factor}, "
            f"got {scaling.high_freq_factor}"
        )
    if list(config.loader.buckets) != sorted(set(config.loader.buckets)):
        problems.append(f"loader.buckets: expected ascending lengths, got {config.loader.buckets}")
    if config.sft.mode == "lora" and config.model.weights is None:
        problems.append("sft.mode: expected 'full' for random weights (model.weights is not set): adapters on noise learn little")
    if problems:
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON/TOML values; fields that are None are left out."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            pairs = ((f.name, plain(getattr(value, f.name))) for f in dataclasses.fields(value))
            return {name: item for name, item in pairs if item is not None}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config)


def load_config(path: Path, cls: type[ConfigT] = RunConfig) -> ConfigT:
    """Reads a TOML file strictly.

    Raises:
      ConfigError: the file is missing or not TOML, or holds an unknown key or a value of the wrong type.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    return _parse(raw, cls, str(path))


def fingerprint(*parts: Any) -> str:
    """A short content hash of configurations and plain values, for content-addressed names."""
    plain = [to_dict(part) if dataclasses.is_dataclass(part) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]
