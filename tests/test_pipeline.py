"""The main job at toy size: all stages, resume to the same floats (also after SIGKILL), refusals before any work."""

import dataclasses
import json
import multiprocessing
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllmrec_jax.checkpoint import CheckpointError, Checkpoints
from mllmrec_jax.cli import main
from mllmrec_jax.config import ConfigError, MeshConfig, ModelConfig, OptimizerConfig, RunConfig, check_config, load_config
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.pipeline import RunFolderError, open_run, open_run_folder, run_all
from mllmrec_jax.train import grpo_loop, sft_loop
from mllmrec_jax.train.metrics_log import read_metrics
from mllmrec_jax.train.sft_loop import run_sft
from mllmrec_jax.train.stage import TrainingError
from mllmrec_jax.train.state import TrainState, apply_gradients, init_state, make_optimizer, split_policy

ROOT = Path(__file__).resolve().parents[1]


def make_config(folder: Path, **changes: Any) -> RunConfig:
    base = load_config(ROOT / "configs" / "quickstart.toml")
    config = dataclasses.replace(
        base,
        name="toy",
        output=folder / "runs",
        cache=folder / "cache",
        data=dataclasses.replace(
            base.data,
            posterworld=dataclasses.replace(base.data.posterworld, items=40, users=60, min_length=12, max_length=16),
        ),
        tokenizer=dataclasses.replace(base.tokenizer, vocab_size=400),
        model=dataclasses.replace(base.model, num_layers=1, hidden_size=32, intermediate_size=48, num_heads=2, num_kv_heads=1, head_dim=16),
        sft=dataclasses.replace(base.sft, max_steps=6, batch_size=4, accumulation=2, checkpoint_every=2),
        grpo=dataclasses.replace(base.grpo, max_steps=4, batch_size=2, accumulation=2, group_size=4, checkpoint_every=1),
        evaluate=dataclasses.replace(base.evaluate, batch_size=8, bootstrap=100, examples=2),
        mesh=MeshConfig(1, 1, 1),  # of the tests' eight devices
    )
    return dataclasses.replace(config, **changes)


def train(config: RunConfig, *, resume: bool = False) -> dict[str, Any]:
    """Both stages; returns the trained weights as numpy."""
    run = open_run(config, resume=resume)
    sft, sft_trained = run.sft(resume=resume)
    _, grpo_trained = run.grpo(sft, sft_trained, resume=resume)
    return jax.tree.map(np.asarray, {"sft": sft_trained, "grpo": grpo_trained})


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, Any], dict[str, Any]]:
    """One uninterrupted run: its configuration, report and weights."""
    config = make_config(tmp_path_factory.mktemp("straight"))
    report = run_all(config)
    run = open_run(config, training=False)
    weights = {name: jax.tree.map(np.asarray, trained) for name, (_, trained) in run.load_policies().items()}
    return config, report, weights


def test_report_holds_every_row_and_metric(straight):
    config, report, _ = straight
    folder = config.output / config.name
    assert json.loads((folder / "report.json").read_text()) == report
    names = [f"{kind}@{k}" for kind in ("HR", "NDCG") for k in (1, 3, 5, 10)] + ["MRR"]
    for row in ("random", "popularity", "covisitation", "oracle", "sft", "grpo"):
        metrics = report["metrics"][row]
        assert metrics["users"] == 12
        for name in names:
            low, high = metrics[name]["ci95"]
            assert low <= metrics[name]["mean"] <= high
    assert report["metrics"]["random"]["HR@3"]["mean"] == pytest.approx(0.3)
    assert (folder / "report.html").stat().st_size > 10_000


def test_run_folder_says_what_the_run_was(straight):
    config, _, _ = straight
    folder = config.output / config.name
    assert load_config(folder / "config.toml") == config
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["device"]["platform"] == "cpu"
    assert provenance["versions"]["jax"] == jax.__version__


def test_metrics_are_logged_every_step(straight):
    config, _, _ = straight
    folder = config.output / config.name
    sft, grpo = (read_metrics(folder / f"{stage}.jsonl") for stage in ("sft", "grpo"))
    assert [row["step"] for row in sft] == list(range(6))
    assert [row["step"] for row in grpo] == list(range(4))
    wanted = {
        "reward_mean", "format_rate", "hit_rate", "kl", "entropy", "clip_fraction", "no_signal_share", "completion_length",
        "truncated_share", "logprob_mismatch", "tokens_per_second", "generate_s", "reward_s", "update_s", "step_s", "grad_norm",
        "learning_rate",
    }  # fmt: skip
    for row in grpo:
        assert wanted <= row.keys()
        assert row["logprob_mismatch"] < 1e-4  # on-policy: rounding only
    assert any((folder / "tensorboard" / "grpo").iterdir())


def test_resumed_equals_uninterrupted(straight, tmp_path):
    """Stopped after 2 of 6 SFT steps and, later, after 2 of 4 rollouts, the run ends with the same floats."""
    config, _, expected = straight
    config = dataclasses.replace(config, output=tmp_path)
    folder = config.output / config.name

    def stop_after(stage: str, step: int) -> None:
        """Removes what was written after `step`: what a kill just after that checkpoint leaves."""
        for checkpoint in (folder / "checkpoints" / stage).iterdir():
            if checkpoint.name.isdigit() and int(checkpoint.name) > step:
                shutil.rmtree(checkpoint)

    train(config)
    stop_after("grpo", 3)
    assert_equal(train(config, resume=True), expected)
    stop_after("sft", 4)
    assert_equal(train(config, resume=True), expected)
    assert [row["step"] for row in read_metrics(folder / "sft.jsonl")] == list(range(6))


@pytest.mark.slow
def test_killed_at_any_moment_resumes_to_the_same_floats(straight, tmp_path):
    """Six SIGKILLs, each at a random moment after a save has begun, in a run that saves at every step."""
    config, _, _ = straight
    config = dataclasses.replace(
        config,
        sft=dataclasses.replace(config.sft, max_steps=12, checkpoint_every=1),
        grpo=dataclasses.replace(config.grpo, max_steps=10, checkpoint_every=1),
        output=tmp_path / "whole",
    )
    expected = train(config)
    command = ["run", str(tmp_path / "whole" / "toy" / "config.toml"), "--resume", f"--output={tmp_path}"]
    # Processes of a server that has done the imports start within a second.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mllmrec_jax.cli", "mllmrec_jax.pipeline"])
    moments = np.random.default_rng(0)
    cut = 0
    for stage, delay in (("sft", 0.0), ("sft", 0.1), ("sft", 0.1), ("grpo", 0.0), ("grpo", 0.1), ("grpo", 0.1)):
        folder = tmp_path / "toy" / "checkpoints" / stage
        seen = _list_saves(folder)
        process = context.Process(target=main, args=(command,))
        process.start()
        deadline = time.monotonic() + 180
        while process.is_alive() and time.monotonic() < deadline and _list_saves(folder) <= seen:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, delay))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        cut += any("tmp" in path.name for path in folder.iterdir())
    assert cut >= 2  # in the middle of a save
    assert_equal(train(dataclasses.replace(config, output=tmp_path), resume=True), expected)


def _list_saves(folder: Path) -> set[int]:
    """Steps of which a checkpoint is there or being written."""
    return {int(path.name.split(".")[0]) for path in folder.iterdir()} if folder.is_dir() else set()


def test_a_folder_in_the_way_is_refused(straight):
    config, _, _ = straight
    with pytest.raises(RunFolderError, match="--resume"):
        open_run(config)


def test_a_checkpoint_of_another_configuration_is_refused(straight):
    config, _, _ = straight
    other = dataclasses.replace(config, sft=dataclasses.replace(config.sft, history_loss_weight=0.75))
    with pytest.raises(CheckpointError, match="config"):
        open_run(other, resume=True).load_sft()


def test_other_base_weights_are_refused(straight):
    config, _, _ = straight
    run = open_run(config, training=False)
    sft, trained = run.load_sft()
    moved = jax.tree.map(lambda x: x + 1e-3, trained)
    with pytest.raises(CheckpointError, match="base_weights"):
        run.grpo(sft, moved, resume=True)


def test_prompts_longer_than_the_model_are_refused(tmp_path):
    config = make_config(tmp_path)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, max_position=16))
    with pytest.raises(ConfigError, match="max_position"):
        open_run(config).sft(resume=False)


def test_weights_that_are_not_finite_stop_the_run(straight, tmp_path):
    config, _, _ = straight
    run = open_run(dataclasses.replace(config, output=tmp_path), resume=False)
    sft, trained = open_run(config, resume=True).load_sft()
    with pytest.raises((RuntimeError, ValueError), match="nan"):
        run.grpo(sft, jax.tree.map(lambda x: x * jnp.nan, trained), resume=False)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.parametrize("fault", ["gradient", "first update", "weights"])
def test_no_checkpoint_is_written_after_a_step_that_was_not_finite(straight, tmp_path, monkeypatch, stage, fault):
    """The next checkpoint is due before the flag of a step is usually read: it must not be there, and a resumed run must lack nothing."""
    config, _, expected = straight
    config = dataclasses.replace(config, output=tmp_path, sft=dataclasses.replace(config.sft, checkpoint_every=1))
    loop = {"sft": sft_loop, "grpo": grpo_loop}[stage]
    make_step = getattr(loop, f"make_{stage}_step")

    def make_faulty_step(*arguments: Any, **options: Any) -> Any:
        step, calls = make_step(*arguments, **options), 0

        def faulty(state: TrainState, *rest: Any) -> Any:
            nonlocal calls
            calls += 1
            before = jax.tree.map(jnp.copy, state)
            after, metrics, *more = step(state, *rest)
            if calls == 2:
                if fault == "weights":
                    after = after._replace(trained=jax.tree.map(lambda x: x.at[0].set(jnp.inf), after.trained))
                else:
                    after = before  # what `apply_gradients` does
                if fault == "gradient":
                    metrics = {**metrics, "grad_norm": jnp.float32(jnp.nan)}
            return after, metrics, *more

        return faulty

    monkeypatch.setattr(loop, f"make_{stage}_step", make_faulty_step)
    with pytest.raises(TrainingError, match=f"{stage} step 1"):
        train(config)
    monkeypatch.undo()
    assert {path.name for path in (tmp_path / "toy" / "checkpoints" / stage).iterdir()} == {"1"}
    assert_equal(train(config, resume=True)[stage], expected[stage])


def test_lora_sft_needs_weights():
    base = load_config(ROOT / "configs" / "quickstart.toml")
    with pytest.raises(ConfigError, match="random weights"):
        check_config(dataclasses.replace(base, sft=dataclasses.replace(base.sft, mode="lora")))


def test_disk_full_while_saving_keeps_the_earlier_checkpoints(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "c", {"config": "a"})
    state = {"w": jnp.arange(4.0)}
    checkpoints.save(1, state)
    checkpoints.close()

    checkpoints = Checkpoints(tmp_path / "c", {"config": "a"})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.save(2, state)
    step, restored = Checkpoints(tmp_path / "c", {"config": "a"}).restore(state)
    assert step == 1
    np.testing.assert_array_equal(restored["w"], state["w"])


def test_weight_decay_reaches_matrices_and_nothing_else(tmp_path):
    """Stacked norms are [L, D] and once passed for matrices: a step without gradient must leave every norm and bias alone."""
    model = Decoder(ModelConfig(family="qwen2", num_layers=2), vocab_size=50, rngs=nnx.Rngs(0))
    policy = split_policy(model, "full")
    started = jax.tree.map(lambda x: x + 1.0, policy.trained)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), 10)
    state, _ = apply_gradients(init_state(started, optimizer), jax.tree.map(jnp.zeros_like, started), optimizer)
    for (path, before), (_, after) in zip(nnx.to_flat_state(started), nnx.to_flat_state(state.trained), strict=True):
        is_matrix = path[-1] in ("kernel", "embedding", "head")
        assert bool(np.any(np.asarray(before[...]) != np.asarray(after[...]))) is is_matrix, path


def test_training_a_stage_again_replaces_its_result(straight, tmp_path):
    """Orbax passes over steps it already has: without clearing, the second training's weights would be lost in silence."""
    config, _, _ = straight
    config = dataclasses.replace(config, output=tmp_path)
    run = open_run(config)
    sft, _ = run.sft(resume=False)
    policy = sft._replace(trained=jax.tree.map(lambda x: x * 1.01, sft.trained))
    checkpoints = run.folder / "checkpoints" / "sft"
    assert {path.name for path in checkpoints.iterdir() if path.name.isdigit()} == {"4", "6"}
    trained, steps = run_sft(config, policy, run.prepared.sft, folder=run.folder, identity={"other": 1}, resume=False)
    step, restored = Checkpoints(checkpoints, {"other": 1}).restore(tuple(init_state(trained, make_optimizer(config.sft.optimizer, 1))))
    assert (step, steps) == (6, 6)
    assert_equal(TrainState(*restored).trained, trained)


def test_half_trained_sft_is_not_taken_for_a_finished_one(straight):
    config, _, _ = straight
    run = open_run(config, training=False)
    marker = run.folder / "sft.finished"
    content = marker.read_text()
    marker.unlink()
    try:
        with pytest.raises(RunFolderError, match="finished sft"):
            run.load_sft()
    finally:
        marker.write_text(content)


@pytest.mark.parametrize("name", [".", "..", "", "a/b", "../x"])
def test_names_that_leave_the_output_folder_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="name"):
        open_run_folder(make_config(tmp_path, name=name), resume=False, overwrite=True)


def test_overwrite_deletes_run_folders_only(tmp_path):
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    (tmp_path / "runs" / "toy" / "thesis.tex").write_text("precious")
    with pytest.raises(RunFolderError, match="not a run folder"):
        open_run_folder(make_config(tmp_path), resume=False, overwrite=True)
    assert (tmp_path / "runs" / "toy" / "thesis.tex").is_file()
