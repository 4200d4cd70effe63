"""The main job: prepare, SFT, GRPO, evaluation before and after, report. Every stage finds what earlier stages left in the run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mllmrec_jax.baselines.covisitation import score_covisitation
from mllmrec_jax.baselines.popularity import score_popularity
from mllmrec_jax.checkpoint import Checkpoints
from mllmrec_jax.config import ConfigError, MeshConfig, ModelConfig, RunConfig, fingerprint
from mllmrec_jax.data.atomic import write_file
from mllmrec_jax.data.candidates import locate_targets
from mllmrec_jax.data.loader import check_buckets, iterate_all
from mllmrec_jax.data.posterworld import build_world, oracle_scores
from mllmrec_jax.data.records import Item
from mllmrec_jax.data.shards import Shards
from mllmrec_jax.data.splits import full_pasts
from mllmrec_jax.distributed import is_main_process, main_process_first
from mllmrec_jax.evaluate.protocol import RankedModel, compare_models, rank_models, score_shards, tabulate_metrics
from mllmrec_jax.evaluate.report import CandidateView, ExampleView, ItemView, build_report, write_report
from mllmrec_jax.generate.rollout import check_positions, make_keys
from mllmrec_jax.model.hf_config import read_model_config
from mllmrec_jax.model.hf_weights import export_weights, load_weights, weights_hash
from mllmrec_jax.model.lora import add_adapters
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.model.sharded import make_sharded
from mllmrec_jax.model.vocabulary import set_item_rows
from mllmrec_jax.objectives.logprobs import check_logprob
from mllmrec_jax.prepare import Prepared, TestLists, prepare_data
from mllmrec_jax.prompts import sanitise_text
from mllmrec_jax.provenance import write_provenance
from mllmrec_jax.sharding import (
    check_model,
    current_mesh,
    find_own_rows,
    make_mesh,
    place,
    place_batch,
    read_own_rows,
    round_batch,
    share_rows,
    use_mesh,
)
from mllmrec_jax.train.grpo_loop import make_rollout, run_grpo
from mllmrec_jax.train.metrics_log import read_metrics
from mllmrec_jax.train.sft_loop import run_sft
from mllmrec_jax.train.stage import start_state
from mllmrec_jax.train.state import Policy, TrainState, fold_policy, make_optimizer, merge_policy, split_policy


class RunFolderError(RuntimeError):
    """A run folder that is in the way, or that lacks what a stage needs."""


def find_run_folder(config: RunConfig) -> Path:
    """`output`/`name`."""
    if config.name in ("", ".", "..") or Path(config.name).name != config.name:
        raise ConfigError(f"name: expected the name of one folder in {config.output}, got {config.name!r}")
    return config.output / config.name


def open_run_folder(config: RunConfig, *, resume: bool, overwrite: bool) -> Path:
    """`output`/`name`, refused where it holds another run's results (profiles are none) and neither flag says what to do with them."""
    folder = find_run_folder(config)
    if folder.exists() and any(path.name != "profile" for path in folder.iterdir()):
        if overwrite:
            if not (folder / "provenance.json").is_file():
                raise RunFolderError(
                    f"{folder}: is not a run folder (no provenance.json), so --overwrite does not delete it; choose another --name"
                )
            shutil.rmtree(folder)
        elif not resume:
            raise RunFolderError(
                f"{folder}: holds a run already; go on with --resume, start over with --overwrite, or choose another --name"
            )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check_vocabulary(model: ModelConfig, size: int) -> None:
    mesh = current_mesh()
    if mesh is not None:
        check_model(model, mesh, vocab_size=size, batch_size=0)


def make_base_model(config: RunConfig, prepared: Prepared) -> Decoder:
    """The model before SFT: read from `model.weights`, or random.

    Raises:
      ConfigError: the model's vocabulary is smaller than the tokenizer's or does not divide over the mesh, or prompts are longer than the
        model takes.
    """
    tokenizer, model = prepared.tokenizer, config.model
    if model.weights is None:
        _check_vocabulary(model, tokenizer.vocab_size)
        decoder = make_sharded(lambda: Decoder(model, vocab_size=tokenizer.vocab_size, rngs=nnx.Rngs(config.seed)))
    else:
        sizes, vocab_size = read_model_config(model.weights, model)
        first_item = tokenizer.item_range[0] if tokenizer.item_range else tokenizer.vocab_size
        if vocab_size < first_item:
            raise ConfigError(
                f"{model.weights}: the model's vocabulary has {vocab_size} rows, expected at least the tokenizer's {first_item} tokens; "
                "use the tokenizer that belongs to these weights"
            )
        _check_vocabulary(sizes, max(vocab_size, tokenizer.vocab_size))
        decoder = load_weights(model.weights, sizes, min_vocab_size=tokenizer.vocab_size, seed=config.seed)
        if tokenizer.item_range:
            texts = [
                tokenizer.encode_text(f"[ITEM_{id_}] {sanitise_text(prepared.dataset.items[id_].title)}")
                for id_ in sorted(prepared.dataset.items)
            ]
            set_item_rows(decoder, tokenizer.item_range[0], texts)
    for shards in (prepared.sft, prepared.grpo, prepared.test.shards, prepared.test_popularity.shards):
        longest = int(shards.prompt_length.max())
        new = shards.item_answer.shape[1] if shards is prepared.sft else max(config.grpo.max_new_tokens, shards.item_answer.shape[1])
        check_positions(longest, new, decoder.config.max_position)
        check_buckets(config.loader.buckets, longest)
    return decoder


def _place_policy(policy: Policy) -> Policy:
    return policy._replace(trained=place(policy.trained), frozen=place(policy.frozen))


def sft_policy(config: RunConfig, prepared: Prepared) -> Policy:
    """The base model split for SFT, with fresh adapters in lora mode, over the mesh in context."""
    model = make_base_model(config, prepared)
    if config.sft.mode == "lora":
        add_adapters(model, config.sft.lora, rngs=nnx.Rngs(config.seed + 1))
    return _place_policy(split_policy(model, config.sft.mode))


def grpo_policy(config: RunConfig, sft: Policy, trained: Any) -> Policy:
    """SFT's result as GRPO's base: its adapter is merged in memory and a new one goes on top."""
    model = fold_policy(sft, trained)
    dtype = jnp.dtype(config.model.param_dtype)
    for _, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        parameter.set_value(parameter[...].astype(dtype))
    if config.grpo.mode == "lora":
        add_adapters(model, config.grpo.lora, rngs=nnx.Rngs(config.seed + 2))
    return _place_policy(split_policy(model, config.grpo.mode))


def _hash_base(config: RunConfig, policy: Policy) -> str:
    """Of the weights SFT starts from."""
    return weights_hash(policy.frozen if config.sft.mode == "lora" else policy.trained)


def _hash_result(policy: Policy, trained: Any) -> str:
    """Of the weights GRPO starts from, SFT's adapters beside their base: merged they are rounded, which differs from mesh to mesh."""
    parts = {"frozen": policy.frozen, "trained": trained}
    flat = {name: dict(nnx.to_flat_state(state)) for name, state in parts.items()}
    return weights_hash(nnx.from_flat_state({(name, *path): nnx.Param(x[...]) for name, part in flat.items() for path, x in part.items()}))


def _identity(config: RunConfig, stage: str, policy: Policy, shards: Shards, base_weights: str) -> dict[str, Any]:
    """What a checkpoint of `stage` belongs to, on any mesh."""
    # As the weights' config.json says; where the folder lies does not matter, its weights have a hash of their own.
    model = dataclasses.replace(merge_policy(policy).config, weights=None)
    return {
        "stage": stage,
        "config": fingerprint(getattr(config, stage), model, config.logprob, config.seed, list(config.loader.buckets)),
        "data": fingerprint(shards.manifest["provenance"]),
        "base_weights": base_weights,
    }


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _on_mesh(method: Callable[Concatenate[Run, Arguments], Result]) -> Callable[Concatenate[Run, Arguments], Result]:
    @functools.wraps(method)
    def call(run: Run, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with use_mesh(run.mesh):
            return method(run, *args, **kwargs)

    return call


@dataclasses.dataclass
class Run:
    """One run folder, its prepared data, the weights of the stages done so far, and the devices they lie on.

    In a run of many processes each has one and calls the same methods; process 0 alone writes files, beside its part of a checkpoint.
    """

    config: RunConfig
    folder: Path
    prepared: Prepared
    provenance: dict[str, Any]
    mesh: Mesh

    @_on_mesh
    def sft(self, *, resume: bool) -> tuple[Policy, Any]:
        """Runs (or finishes, or finds finished) SFT; returns its policy and trained weights."""
        policy = sft_policy(self.config, self.prepared)
        identity = _identity(self.config, "sft", policy, self.prepared.sft, _hash_base(self.config, policy))
        self._mark_unfinished("sft")
        trained, steps = run_sft(self.config, policy, self.prepared.sft, folder=self.folder, identity=identity, resume=resume)
        self._mark_finished("sft", steps)
        return policy, trained

    @_on_mesh
    def load_sft(self) -> tuple[Policy, Any]:
        """The trained weights of a finished SFT stage.

        Raises:
          RunFolderError: SFT is not finished in this folder.
          CheckpointError: it belongs to another configuration.
        """
        steps = self.require_finished("sft")
        policy = sft_policy(self.config, self.prepared)
        identity = _identity(self.config, "sft", policy, self.prepared.sft, _hash_base(self.config, policy))
        return policy, self._load_trained("sft", policy, identity, steps)

    @_on_mesh
    def load_policies(self) -> dict[str, tuple[Policy, Any]]:
        """The finished stages of this folder: SFT, and GRPO where it is there."""
        sft, sft_trained = self.load_sft()
        policies = {"sft": (sft, sft_trained)}
        if self._marker("grpo").is_file():
            policy = grpo_policy(self.config, sft, sft_trained)
            identity = _identity(self.config, "grpo", policy, self.prepared.grpo, _hash_result(sft, sft_trained))
            policies["grpo"] = (policy, self._load_trained("grpo", policy, identity, self.require_finished("grpo")))
        return policies

    def _load_trained(self, stage: Literal["sft", "grpo"], policy: Policy, identity: dict[str, Any], steps: int) -> Any:
        like = start_state(policy.trained, make_optimizer(getattr(self.config, stage).optimizer, 1))
        with contextlib.closing(Checkpoints(self.folder / "checkpoints" / stage, identity)) as checkpoints:
            return TrainState(*checkpoints.restore(tuple(like), steps)[1]).trained

    @_on_mesh
    def grpo(self, sft: Policy, sft_trained: Any, *, resume: bool) -> tuple[Policy, Any]:
        """Runs (or finishes, or finds finished) GRPO on SFT's result; returns its policy and trained weights."""
        policy = grpo_policy(self.config, sft, sft_trained)
        shown = self.config.prompt.max_title_chars
        titles = {item.id: sanitise_text(item.title, shown) for item in self.prepared.dataset.items.values()}
        self._mark_unfinished("grpo")
        trained, steps = run_grpo(
            self.config,
            policy,
            self.prepared.grpo,
            self.prepared.tokenizer,
            titles,
            folder=self.folder,
            identity=_identity(self.config, "grpo", policy, self.prepared.grpo, _hash_result(sft, sft_trained)),
            resume=resume,
        )
        self._mark_finished("grpo", steps)
        return policy, trained

    def _marker(self, stage: str) -> Path:
        return self.folder / f"{stage}.finished"

    def _mark_unfinished(self, stage: str) -> None:
        if is_main_process():
            self._marker(stage).unlink(missing_ok=True)

    def _mark_finished(self, stage: str, steps: int) -> None:
        if is_main_process():
            write_file(self._marker(stage), f"{steps}\n".encode())

    def require_finished(self, stage: str) -> int:
        """Steps of a finished stage; a half-trained one is never taken for it."""
        if not self._marker(stage).is_file():
            raise RunFolderError(
                f"{self.folder}: expected a finished {stage} stage, found none; run `mllmrec {stage}` (with --resume to go on)"
            )
        return int(self._marker(stage).read_text())

    def floor_scores(self, lists: TestLists) -> dict[str, np.ndarray]:
        """Scores of everything that needs no language model, on the same lists."""
        prepared, histories = self.prepared, [window.history for window in lists.windows]
        scores = {
            "popularity": score_popularity(prepared.splits.train_histories, lists.candidates),
            "covisitation": score_covisitation(prepared.splits.train_histories, histories, lists.candidates),
        }
        if self.config.data.source == "posterworld":
            world = build_world(self.config.data.posterworld)
            scores["oracle"] = oracle_scores(world, full_pasts(lists.windows, prepared.dataset), lists.candidates)
        return scores

    @_on_mesh
    def report(self, policies: dict[str, tuple[Policy, Any]]) -> dict[str, Any]:
        """Ranks with every policy and floor, and writes `report.json` and `report.html`."""
        config, prepared = self.config, self.prepared
        tables: list[dict[str, Any]] = []
        ranked: list[dict[str, RankedModel]] = []
        for label, lists in (("", prepared.test), (", popularity negatives", prepared.test_popularity)):
            scores = {
                name: score_shards(policy, trained, lists.shards, config, description=f"rank with {name}{label}")
                for name, (policy, trained) in policies.items()
            }
            count = min(len(lists.windows), config.evaluate.max_users or len(lists.windows))
            floors = {name: values[:count] for name, values in self.floor_scores(lists).items()}
            target = locate_targets(lists.windows, lists.candidates)[:count]
            ranked.append(rank_models({**floors, **scores}, target))
            tables.append(tabulate_metrics(ranked[-1], config.evaluate))
        pairs = [("grpo", "sft"), ("grpo", "covisitation"), ("grpo", "popularity"), ("sft", "covisitation"), ("sft", "popularity")]
        report = build_report(
            name=config.name,
            metrics=tables[0],
            metrics_popularity_negatives=tables[1],
            comparisons=compare_models(ranked[0], pairs, config.evaluate),
            curves={stage: read_metrics(self.folder / f"{stage}.jsonl") for stage in ("sft", "grpo")},
            examples=self._examples(policies, ranked[0]),
            provenance=self.provenance,
            notes=list(prepared.notes),
        )
        if is_main_process():
            write_report(self.folder, report)
        return report

    def _examples(self, policies: dict[str, tuple[Policy, Any]], ranked: dict[str, RankedModel]) -> list[ExampleView]:
        config, prepared, lists = self.config, self.prepared, self.prepared.test
        count = min(config.evaluate.examples, len(next(iter(ranked.values())).scores))
        if not count:
            return []
        # Evenly spread over the test users, so that the choice does not depend on the outcome.
        rows = np.linspace(0, len(next(iter(ranked.values())).scores) - 1, count).astype(np.int64)
        answers = {name: self._sample_answers(policy, trained, rows) for name, (policy, trained) in policies.items()}
        prompts = lists.shards.read_rows(rows)
        views = []
        for index, row in enumerate(rows):
            window = lists.windows[row]
            candidates = tuple(
                CandidateView(
                    _view(prepared.dataset.items[int(item)], self.folder),
                    *(float(ranked[name].scores[row, column]) if name in ranked else None for name in ("sft", "grpo")),
                    is_target=int(item) == window.target,
                )
                for column, item in enumerate(lists.candidates[row])
            )
            ranks = {name: float(ranked[name].ranks.average[row]) for name in policies}
            prompt = prompts["prompt"][index][: prompts["prompt_length"][index]]
            views.append(
                ExampleView(
                    user=window.user,
                    history=tuple(_view(prepared.dataset.items[item], self.folder) for item in window.history),
                    candidates=candidates,
                    prompt=prepared.tokenizer.decode(prompt, keep_stops=True),
                    sft_answers=answers.get("sft", [()] * count)[index],
                    grpo_answers=answers.get("grpo", [()] * count)[index],
                    sft_rank=ranks.get("sft"),
                    grpo_rank=ranks.get("grpo"),
                )
            )
        return views

    def _sample_answers(self, policy: Policy, trained: Any, rows: np.ndarray, *, answers: int = 4) -> list[tuple[str, ...]]:
        """A few sampled answers for each of the test rows, at GRPO's temperature."""
        config, tokenizer = self.config, self.prepared.tokenizer
        rollout = make_rollout(policy, config.grpo, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id)
        size = round_batch(len(rows))
        own = find_own_rows(size)
        texts: list[tuple[str, ...]] = []
        for batch in iterate_all(self.prepared.test.shards, batch_size=size, rows=rows):
            prompt, length, row = place_batch([x[own] for x in (batch.prompt, batch.prompt_length, batch.row.astype(np.int32))])
            sampled = rollout(trained, policy.frozen, prompt, length, make_keys(config.seed, 0, row, answers))
            whole = share_rows(read_own_rows((sampled.completion, sampled.completion_length)))
            for group, lengths in zip(*(x[batch.valid] for x in whole), strict=True):
                texts.append(tuple(tokenizer.decode(row[:length]) for row, length in zip(group, lengths, strict=True)))
        return texts


def _view(item: Item, folder: Path) -> ItemView:
    """`item` for a report in `folder`: its picture's path is relative to that, so that a run folder and its cache can move together."""
    # Resolved first: `..` behind a symbolic link leads elsewhere.
    image = None if item.image is None else Path(os.path.relpath(item.image.resolve(), folder.resolve()))
    return ItemView(item.id, item.title, image, item.caption)


def open_mesh(config: MeshConfig) -> Mesh:
    """The mesh of a run: over all devices of all processes, or, in one process, over the first ones where the sizes ask for fewer.

    Raises:
      ConfigError: the sizes and the number of devices do not go together.
    """
    devices = jax.devices()
    sizes = config.data, config.fsdp, config.tensor
    return make_mesh(config, devices[: math.prod(sizes)] if jax.process_count() == 1 and -1 not in sizes else devices)


def _check_run(config: RunConfig, mesh: Mesh, *, training: bool) -> None:
    """What can be known to fail before any data are read."""
    check_logprob(config.logprob)
    weights = config.model.weights
    model = config.model if weights is None else read_model_config(weights, config.model)[0]
    for stage in ("sft", "grpo"):
        try:
            # The vocabulary is known once the tokenizer is.
            check_model(model, mesh, vocab_size=0, batch_size=getattr(config, stage).batch_size if training else 0)
        except ConfigError as error:
            raise ConfigError(str(error).replace("batch_size", f"{stage}.batch_size", 1)) from None


def open_run(config: RunConfig, *, resume: bool = False, overwrite: bool = False, training: bool = True) -> Run:
    """Opens the run folder, writes what is known of the run, prepares its data, and lays out its devices.

    With `training` False the folder must hold a run, whose provenance stays as it is.

    Raises:
      ConfigError: the log-prob implementation cannot run here, or model or batches do not divide over the mesh.
      RunFolderError: the folder is in the way, or is not there.
    """
    mesh = open_mesh(config.mesh)
    _check_run(config, mesh, training=training)
    folder = config.output / config.name
    with main_process_first():
        if training and is_main_process():
            open_run_folder(config, resume=resume, overwrite=overwrite)
            write_provenance(folder, config)
        elif not (folder / "provenance.json").is_file():
            raise RunFolderError(f"{folder}: expected a run folder, found none; train first with `mllmrec run` or `mllmrec sft`")
    provenance = json.loads((folder / "provenance.json").read_text())
    if is_main_process():
        sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
        used = f"{mesh.size} of {jax.device_count()} {jax.devices()[0].device_kind} devices"
        print(f"run folder {folder}; log-prob implementation: {config.logprob.implementation}; {used}, mesh {sizes}")
    with main_process_first():
        prepared = prepare_data(config)
    return Run(config, folder, prepared, provenance, mesh)


def export_stage(run: Run, stage: str, folder: Path) -> None:
    """Writes a finished stage as a Hugging Face folder, adapters merged, tokenizer not included.

    Raises:
      RunFolderError: the stage is not there.
      WeightsError: `folder` is not empty.
      OSError: the disk is full or not writable.
    """
    run.require_finished(stage)
    policy, trained = run.load_sft() if stage == "sft" else run.load_policies()[stage]
    with use_mesh(run.mesh):
        export_weights(fold_policy(policy, trained), folder, stop_ids=run.prepared.tokenizer.stop_ids)


def run_all(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Prepare, SFT, GRPO, evaluation before and after; returns the content of `report.json`."""
    run = open_run(config, resume=resume, overwrite=overwrite)
    sft, sft_trained = run.sft(resume=resume)
    grpo, grpo_trained = run.grpo(sft, sft_trained, resume=resume)
    return run.report({"sft": (sft, sft_trained), "grpo": (grpo, grpo_trained)})
