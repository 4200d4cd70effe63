"""The whole job from a Hugging Face folder: LoRA SFT, merged, a new adapter for GRPO, ranking before and after, export."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tomli_w

pytest.importorskip("torch", reason="the weights are compared with those that torch saves")

import torch
import transformers
from etils import epath
from flax import nnx
from safetensors.numpy import load_file, save_file

from mllmrec_jax.checkpoint import CheckpointError
from mllmrec_jax.cli import main
from mllmrec_jax.config import LoraConfig, MeshConfig, OptimizerConfig, PromptConfig, RunConfig, load_config, to_dict
from mllmrec_jax.data.bpe import train_bpe
from mllmrec_jax.data.examples import list_training_texts
from mllmrec_jax.data.load import load_dataset
from mllmrec_jax.evaluate.protocol import score_shards
from mllmrec_jax.generate.rollout import make_keys
from mllmrec_jax.model.hf_weights import weights_hash
from mllmrec_jax.pipeline import Run, grpo_policy, make_base_model, open_run, run_all, sft_policy
from mllmrec_jax.train.grpo_loop import make_rollout
from mllmrec_jax.train.metrics_log import read_metrics
from mllmrec_jax.train.state import Policy, merge_policy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 392  # rows of the saved model, some more than its tokenizer has, as in the published Qwen3 folders
ITEMS = 24  # more than those spare rows: where items are tokens, the embedding grows


@dataclasses.dataclass
class Job:
    """A finished run and what it said."""

    config: RunConfig
    report: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.config.output / self.config.name

    def open(self) -> Run:
        return open_run(self.config, training=False)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def make_config(folder: Path, *, item_tokens: bool) -> RunConfig:
    base = load_config(ROOT / "configs" / "quickstart.toml")
    adam = OptimizerConfig(learning_rate=1e-2)
    lora = LoraConfig(rank=4, alpha=8.0)
    return dataclasses.replace(
        base,
        name="hf",
        output=folder / "runs",
        cache=folder / "cache",
        data=dataclasses.replace(
            base.data,
            history_len=3,
            negatives=3,
            posterworld=dataclasses.replace(base.data.posterworld, items=ITEMS, users=40, min_length=12, max_length=14),
        ),
        prompt=PromptConfig(style="compact", answer_title=False, max_prompt_tokens=256),
        tokenizer=dataclasses.replace(base.tokenizer, kind="huggingface", path=folder / "model", item_tokens=item_tokens),
        model=dataclasses.replace(base.model, weights=folder / "model"),
        sft=dataclasses.replace(
            base.sft, mode="lora", lora=lora, optimizer=adam, max_steps=40, batch_size=8, checkpoint_every=15, history_loss_weight=0.0
        ),
        grpo=dataclasses.replace(
            base.grpo,
            mode="lora",
            lora=lora,
            optimizer=dataclasses.replace(adam, eps=1e-6),  # rounding of tiny gradients is not scaled up
            max_steps=3,
            batch_size=4,
            max_new_tokens=8,
            checkpoint_every=2,
            temperature=1.0,
        ),
        evaluate=dataclasses.replace(base.evaluate, batch_size=8, bootstrap=100, examples=2),
        mesh=MeshConfig(1, 1, 1),  # of the tests' eight devices
    )


def save_model(config: RunConfig, *, tied: bool) -> None:
    """A random Qwen3 of transformers' own class in `model.weights`, with a byte-level BPE and its chat template beside the weights."""
    folder = config.model.weights
    assert folder is not None
    dataset = load_dataset(config.data, config.cache)
    texts = list_training_texts(dataset, config.prompt, item_tokens=False)
    shutil.copytree(train_bpe(texts, vocab_size=VOCABULARY - 8, cache=config.cache / "tokenizers"), folder)
    sizes = transformers.Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=512, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(sizes).eval().save_pretrained(folder)


@pytest.fixture(scope="module", params=[(True, False), (False, True)], ids=["tied", "untied-items"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    tied, item_tokens = request.param
    config = make_config(tmp_path_factory.mktemp("hf"), item_tokens=item_tokens)
    save_model(config, tied=tied)
    return Job(config, run_all(config))


ONLY_ITEM_TOKENS = pytest.mark.parametrize("job", [(False, True)], indirect=True, ids=["untied-items"])


def score(job: Job, policy: Policy) -> np.ndarray:
    run = job.open()
    return score_shards(policy, policy.trained, run.prepared.test.shards, job.config)


def edit(job: Job, folder: Path, change: Callable[[Path], None]) -> RunConfig:
    """The job's configuration, its run and its model folder copied to `folder` and the latter changed."""
    shutil.copytree(job.folder, folder / "runs" / job.config.name)
    shutil.copytree(job.config.output.parent / "model", folder / "model")
    change(folder / "model")
    model = dataclasses.replace(job.config.model, weights=folder / "model")
    return dataclasses.replace(job.config, output=folder / "runs", model=model)


def test_the_run_learns_and_reports_both_stages(job: Job):
    assert {"random", "popularity", "covisitation", "oracle", "sft", "grpo"} <= job.report["metrics"].keys()
    losses = [row["loss"] for row in read_metrics(job.folder / "sft.jsonl")]
    assert losses[-1] < losses[0] - 1


def test_merging_the_sft_adapter_changes_no_ranking_score(job: Job):
    run = job.open()
    sft, trained = run.load_sft()
    adapted = score(job, sft._replace(trained=trained))
    merged = grpo_policy(job.config, sft, trained)
    np.testing.assert_allclose(score(job, merged), adapted, atol=2e-4)
    bare = score(job, sft_policy(job.config, run.prepared))
    assert np.abs(bare - adapted).max() > 1  # nats: the adapter did something


def test_the_reference_of_grpo_is_the_sft_policy(job: Job):
    rows = read_metrics(job.folder / "grpo.jsonl")
    assert 0 <= rows[0]["kl"] < 1e-9  # the new adapter starts at 0: policy and reference are the same weights
    assert all(row["logprob_mismatch"] < 1e-4 for row in rows)


def read_item_rows(run: Run, policy: Policy, trained: Any) -> tuple[np.ndarray, np.ndarray]:
    """Embedding rows of the item tokens, and the means of the rows of the items' texts."""
    tokenizer, items = run.prepared.tokenizer, run.prepared.dataset.items
    assert tokenizer.item_range is not None
    assert tokenizer.item_range == (VOCABULARY - 8, VOCABULARY - 8 + ITEMS)
    model = merge_policy(policy, trained)
    rows = np.asarray(model.embedding[...])
    assert len(rows) == tokenizer.vocab_size > VOCABULARY
    texts = [tokenizer.encode_text(f"[ITEM_{id_}] {items[id_].title}") for id_ in sorted(items)]
    return rows[slice(*tokenizer.item_range)], np.stack([rows[ids].mean(axis=0) for ids in texts])


@ONLY_ITEM_TOKENS
def test_item_tokens_start_from_their_texts_and_adapters_leave_them_there(job: Job):
    run = job.open()
    for policy, trained in run.load_policies().values():
        rows, means = read_item_rows(run, policy, trained)
        np.testing.assert_allclose(rows, means, atol=1e-6)


@ONLY_ITEM_TOKENS
def test_full_mode_trains_item_tokens(job: Job, tmp_path: Path):
    sft = dataclasses.replace(job.config.sft, mode="full", max_steps=2)
    run = open_run(dataclasses.replace(job.config, output=tmp_path, sft=sft))
    policy, trained = run.sft(resume=False)
    started, _ = read_item_rows(run, policy, policy.trained)
    rows, _ = read_item_rows(run, policy, trained)
    assert (np.abs(rows - started).max(axis=1) > 1e-3).all()


def test_checkpoints_hold_adapters_and_the_hash_of_the_base_alone(job: Job):
    run = job.open()
    base = make_base_model(job.config, run.prepared)
    base_shapes = {tuple(value.shape) for value in jax.tree.leaves(nnx.state(base)) if value.ndim > 1}
    for stage, steps in (("sft", 40), ("grpo", 3)):
        folder = job.folder / "checkpoints" / stage / str(steps)
        metadata = ocp.StandardCheckpointHandler().metadata(epath.Path(folder / "state"))
        stored = {tuple(leaf.shape) for leaf in jax.tree.leaves(metadata.tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))}
        assert stored and not stored & base_shapes
    identity = json.loads((job.folder / "checkpoints" / "sft" / "40" / "identity" / "metadata").read_text())
    assert identity["base_weights"] == weights_hash(base)


def _move_one_weight(model: Path) -> None:
    tensors = dict(load_file(model / "model.safetensors"))
    moved = tensors["model.layers.1.mlp.up_proj.weight"].copy()
    moved[3, 5] = np.nextafter(moved[3, 5], np.float32(9))
    save_file({**tensors, "model.layers.1.mlp.up_proj.weight": moved}, model / "model.safetensors", metadata={"format": "pt"})


def _change_rope(model: Path) -> None:
    described = json.loads((model / "config.json").read_text())
    described["rope_parameters"]["rope_theta"] = 2e4
    (model / "config.json").write_text(json.dumps(described))


@pytest.mark.parametrize(("change", "differing"), [(_move_one_weight, "base_weights"), (_change_rope, "config")])
def test_a_changed_base_model_is_refused_on_resume(job: Job, tmp_path: Path, change: Callable[[Path], None], differing: str):
    config = edit(job, tmp_path, change)
    with pytest.raises(CheckpointError, match=rf"\({differing}: expected"):
        run_all(config, resume=True)


def test_a_base_model_that_moved_is_the_same_one(job: Job, tmp_path: Path):
    config = edit(job, tmp_path, lambda _: None)
    run = open_run(config, resume=True)
    assert set(run.load_policies()) == {"sft", "grpo"}


def test_the_export_gives_the_same_greedy_answers_in_transformers(job: Job, tmp_path: Path):
    main(["export", str(job.folder / "config.toml"), "--folder", str(tmp_path / "export")])
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert type(reference) is transformers.Qwen3ForCausalLM
    run = job.open()
    policy, trained = run.load_policies()["grpo"]
    tokenizer, shards = run.prepared.tokenizer, run.prepared.test.shards
    rows = np.arange(4)
    examples = shards.read_rows(rows)
    prompt, length = jnp.asarray(examples["prompt"]), jnp.asarray(examples["prompt_length"])
    greedy = make_rollout(policy, dataclasses.replace(job.config.grpo, top_k=1), stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id)
    ours = greedy(trained, policy.frozen, prompt, length, make_keys(0, 0, jnp.asarray(rows), 1))
    for row in rows:
        ids = torch.tensor(examples["prompt"][row, : examples["prompt_length"][row]].tolist())[None]
        mask = torch.ones_like(ids)
        theirs = reference.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=job.config.grpo.max_new_tokens, pad_token_id=tokenizer.pad_id
        )[0, ids.shape[1] :]
        assert theirs.tolist() == np.asarray(ours.completion[row, 0, : ours.completion_length[row, 0]]).tolist()


def launch(config: RunConfig, *words: str) -> None:
    """The launcher with two processes of one CPU device each."""
    toml = config.output / "two.toml"
    toml.parent.mkdir(exist_ok=True)
    toml.write_text(tomli_w.dumps(to_dict(config)))
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "launch", "tests/processes"))
    command = [sys.executable, "-m", "mllmrec_jax.cli", "launch", "local", str(toml), "--cpu", *words]
    environment = os.environ | {"PYTHONPATH": paths, "XLA_FLAGS": ""}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


@ONLY_ITEM_TOKENS
def test_two_processes_train_and_export_what_one_does(job: Job, tmp_path: Path):
    """Weights, adapters and the grown vocabulary cut in two; the export read by two processes, and by one."""
    config = dataclasses.replace(job.config, output=tmp_path / "runs", mesh=MeshConfig(1, 2, 1))
    launch(config)
    launch(config, "--command", "export")
    folder = config.output / config.name
    for stage in ("sft", "grpo"):
        ours, theirs = read_metrics(folder / f"{stage}.jsonl"), read_metrics(job.folder / f"{stage}.jsonl")
        assert stage == "sft" or any(row["reward_std"] > 0 for row in ours)
        for a, b in zip(ours, theirs, strict=True):
            names = [name for name in b if not name.endswith(("_s", "tokens_per_second"))]
            np.testing.assert_allclose([a[name] for name in names], [b[name] for name in names], rtol=2e-5, atol=1e-6)
    report = json.loads((folder / "report.json").read_text())
    assert report["provenance"]["device"]["processes"] == 2
    assert report["metrics"] == json.loads((job.folder / "report.json").read_text())["metrics"]

    main(["export", str(folder / "config.toml"), "--mesh.fsdp", "1", "--folder", str(tmp_path / "by-one")])
    main(["export", str(job.folder / "config.toml"), "--folder", str(tmp_path / "of-one")])
    names = ("config.json", "model.safetensors")
    by_two, by_one, of_one = (path / names[1] for path in (folder / "grpo-huggingface", tmp_path / "by-one", tmp_path / "of-one"))
    assert sorted(path.name for path in by_two.parent.iterdir()) == sorted(names)
    one, expected = load_file(by_one), load_file(of_one)
    for name, value in load_file(by_two).items():
        np.testing.assert_allclose(value, one[name], rtol=0, atol=2e-7, err_msg=name)  # merging the same adapters
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-4, err_msg=name)
