"""Whole runs over meshes and over processes: the numbers of one device; stopped, killed and resumed anywhere."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tomli_w

from mllmrec_jax.config import ConfigError, MeshConfig, OptimizerConfig, RunConfig, load_config, to_dict
from mllmrec_jax.distributed import EXIT_PREEMPTED
from mllmrec_jax.pipeline import open_run, run_all
from mllmrec_jax.train.metrics_log import read_metrics
from mllmrec_launch.local import LocalOptions, find_free_port, plan_local

ROOT = Path(__file__).resolve().parents[1]
CLOCKS = ("_s", "tokens_per_second")
# What follows from the sampled tokens alone.
SAMPLED = ("reward_mean", "reward_std", "format_rate", "hit_rate", "no_signal_share", "completion_length", "truncated_share")
STAGES = ("sft", "grpo")


def make_config(folder: Path, name: str, sizes: Sequence[int], *, sft_steps: int = 24, grpo_steps: int = 3, every: int = 100) -> RunConfig:
    """A model, a vocabulary and batches that divide over eight devices in every way."""
    base = load_config(ROOT / "configs" / "quickstart.toml")
    return dataclasses.replace(
        base,
        name=name,
        output=folder / "runs",
        cache=folder / "cache",
        data=dataclasses.replace(
            base.data, posterworld=dataclasses.replace(base.data.posterworld, items=40, users=60, min_length=12, max_length=16)
        ),
        tokenizer=dataclasses.replace(base.tokenizer, vocab_size=280),  # 320 with the items
        model=dataclasses.replace(
            base.model, num_layers=1, hidden_size=32, intermediate_size=48, num_heads=8, num_kv_heads=8, head_dim=8
        ),
        sft=dataclasses.replace(
            base.sft, max_steps=sft_steps, batch_size=8, accumulation=2, checkpoint_every=every,
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=4),
        ),
        grpo=dataclasses.replace(
            base.grpo, max_steps=grpo_steps, batch_size=8, accumulation=2, group_size=4, checkpoint_every=every, temperature=1.0
        ),
        evaluate=dataclasses.replace(base.evaluate, batch_size=6, bootstrap=100, examples=2),
        mesh=MeshConfig(*sizes),
    )  # fmt: skip


def train(config: RunConfig) -> None:
    """Both stages, from wherever they are."""
    run = open_run(config, resume=True)
    run.grpo(*run.sft(resume=True), resume=True)


def read_rows(config: RunConfig, stage: str) -> list[dict[str, Any]]:
    """Metrics of a run without those that depend on the clock."""
    rows = read_metrics(config.output / config.name / f"{stage}.jsonl")
    return [{name: value for name, value in row.items() if not name.endswith(CLOCKS)} for row in rows]


def read_weights(config: RunConfig) -> list[np.ndarray]:
    """Trained weights of both stages of a finished run, read on one device, whatever mesh it ran on."""
    run = open_run(dataclasses.replace(config, mesh=MeshConfig(1, 1, 1)), training=False)
    return [np.asarray(x) for _, trained in run.load_policies().values() for x in jax.tree.leaves(trained)]


def assert_close(config: RunConfig, expected: RunConfig) -> None:
    """The same samples, and the same floats to rounding."""
    for stage in STAGES:
        ours, theirs = read_rows(config, stage), read_rows(expected, stage)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert {name: a.get(name) for name in SAMPLED} == {name: b.get(name) for name in SAMPLED}
            np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-5, atol=1e-6, err_msg=str((stage, a, b)))
    for a, b in zip(read_weights(config), read_weights(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def assert_same(config: RunConfig, expected: RunConfig) -> None:
    """The same floats."""
    for stage in STAGES:
        assert read_rows(config, stage) == read_rows(expected, stage)
    for a, b in zip(read_weights(config), read_weights(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def read_report(config: RunConfig) -> dict[str, Any]:
    return json.loads((config.output / config.name / "report.json").read_text())


def clean_environment() -> dict[str, str]:
    """Of a process in no cluster that finds this clone's packages, computes on the CPU and keeps its programs."""
    other = ("SLURM", "OMPI", "KUBERNETES", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(other)}
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "launch", "tests/processes"))
    return kept | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


Launch = Callable[..., subprocess.Popen[str]]


@contextlib.contextmanager
def launching(folder: Path) -> Iterator[Launch]:
    """Starts `mllmrec run --resume` of a configuration: `processes` of `devices` each, by the launcher, or one without it."""
    started: list[subprocess.Popen[str]] = []

    def start(config: RunConfig, *, processes: int, devices: int) -> subprocess.Popen[str]:
        toml = folder / f"{config.name}.toml"
        toml.write_text(tomli_w.dumps(to_dict(config)))
        words = [sys.executable, "-m", "mllmrec_jax.cli"]
        environment = clean_environment()
        if processes == 1:
            words += ["run", str(toml), "--resume"]
            environment["JAX_NUM_CPU_DEVICES"] = str(devices)
        else:
            words += ["launch", "local", str(toml), "--cpu", "--processes", str(processes), "--devices-per-process", str(devices)]
        with open(folder / f"{config.name}.log", "a") as log:
            started.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log, text=True))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.terminate()
            process.wait()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    with launching(tmp_path) as start:
        yield start


def read_log(folder: Path, config: RunConfig) -> str:
    return (folder / f"{config.name}.log").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("meshes")


@pytest.fixture(scope="module")
def one_device(folder: Path) -> RunConfig:
    config = make_config(folder, "one", (1, 1, 1))
    run_all(config)
    return config


def test_what_does_not_divide_over_the_mesh_is_refused_before_any_work(tmp_path: Path) -> None:
    config = make_config(tmp_path, "refused", (1, 8, 1))

    def refused(message: str, config: RunConfig) -> None:
        with pytest.raises(ConfigError, match=message):
            open_run(config)
        assert not config.output.exists() and not config.cache.exists()

    refused(
        r"grpo.batch_size: expected a multiple of 8 .*got 4",
        dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, batch_size=4)),
    )
    refused(
        r"sft.batch_size: expected a multiple of 8 .*got 12",
        dataclasses.replace(config, sft=dataclasses.replace(config.sft, batch_size=12)),
    )
    refused(r"model.hidden_size: .*got 36", dataclasses.replace(config, model=dataclasses.replace(config.model, hidden_size=36)))
    refused("mesh: expected .* 8 devices, got data = 4, fsdp = 4", dataclasses.replace(config, mesh=MeshConfig(4, 4, 1)))


def test_a_vocabulary_that_does_not_divide_is_refused_with_its_size(tmp_path: Path) -> None:
    config = make_config(tmp_path, "refused", (1, 8, 1))
    config = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, vocab_size=281))
    with pytest.raises(ConfigError, match=r"vocabulary: expected a multiple of 8 \(fsdp x tensor\) .*got 321"):
        open_run(config).sft(resume=False)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices", "sizes"), [(1, 4, (1, 2, 2)), (2, 2, (1, 1, 4)), (4, 1, (2, 2, 1))])
def test_processes_and_meshes_change_no_number(
    one_device: RunConfig, folder: Path, tmp_path: Path, launch: Launch, processes: int, devices: int, sizes: tuple[int, ...]
) -> None:
    config = make_config(folder, f"{processes}-{'-'.join(map(str, sizes))}", sizes)
    assert launch(config, processes=processes, devices=devices).wait(400) == 0, read_log(tmp_path, config)
    rows = read_rows(config, "grpo")
    assert {row["format_rate"] for row in rows} != {0.0}  # the rewards differ, so that something is learned
    assert_close(config, one_device)
    ours, theirs = read_report(config), read_report(one_device)
    assert [example["grpo_answers"] for example in ours["examples"]] == [example["grpo_answers"] for example in theirs["examples"]]
    assert ours["metrics"] == theirs["metrics"]
    assert ours["provenance"]["device"]["processes"] == processes
    again = load_config(config.output / config.name / "config.toml")
    assert again == config  # how the processes found each other is not part of a run


@pytest.fixture(scope="module")
def eight(folder: Path) -> RunConfig:
    """An uninterrupted run on eight devices of one process."""
    config = make_config(folder, "eight", (1, 8, 1), grpo_steps=4, every=2)
    train(config)
    return config


@pytest.fixture(scope="module")
def pair(folder: Path) -> RunConfig:
    """An uninterrupted run of two processes that saves after every step."""
    config = make_config(folder, "pair", (1, 2, 1), sft_steps=40, grpo_steps=30, every=1)
    with launching(folder) as launch:
        assert launch(config, processes=2, devices=1).wait(400) == 0, read_log(folder, config)
    return config


def list_saves(config: RunConfig, stage: str, *, whole: bool = False) -> set[int]:
    """Steps of which a checkpoint is there or, unless `whole`, being written."""
    found = config.output / config.name / "checkpoints" / stage
    names = [path.name for path in found.iterdir()] if found.is_dir() else []
    return {int(name.split(".")[0]) for name in names if name.isdigit() or not whole}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 2, 4), (1, 4, 1)], ids=str)
def test_a_stopped_run_goes_on_on_any_mesh(eight: RunConfig, sizes: tuple[int, ...], stage: str) -> None:
    config = dataclasses.replace(eight, name=f"{stage}-{'-'.join(map(str, sizes))}", mesh=MeshConfig(*sizes))
    run = config.output / config.name
    shutil.copytree(eight.output / eight.name, run)
    stopped = STAGES.index(stage)
    shutil.rmtree(run / "checkpoints" / stage / str(max(list_saves(config, stage))))
    for later in STAGES[stopped:]:
        (run / f"{later}.finished").unlink()
    for later in STAGES[stopped + 1 :]:
        shutil.rmtree(run / "checkpoints" / later)
    train(config)
    (assert_same if sizes == (1, 8, 1) else assert_close)(config, eight)


def wait_for(condition: Callable[[], bool], is_alive: Callable[[], bool], what: Callable[[], str]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert is_alive() and time.monotonic() < end, what()
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(1, 8), (2, 1)])
def test_sigterm_saves_and_the_run_goes_on_to_the_same_floats(
    request: pytest.FixtureRequest, tmp_path: Path, launch: Launch, processes: int, devices: int
) -> None:
    expected: RunConfig = request.getfixturevalue("eight" if processes == 1 else "pair")
    config = dataclasses.replace(expected, output=tmp_path)
    log = tmp_path / f"{config.name}.log"
    for stage in STAGES:
        process = launch(config, processes=processes, devices=devices)
        wait_for(lambda: len(read_rows(config, stage)) >= 2, lambda: process.poll() is None, log.read_text)  # noqa: B023
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == EXIT_PREEMPTED, log.read_text()
        assert len(re.findall(f"stopped by SIGTERM after {stage} step", log.read_text())) == processes
        assert not (tmp_path / config.name / "report.json").exists()
    assert launch(config, processes=processes, devices=devices).wait(300) == 0, log.read_text()
    assert_same(config, expected)


# What a process of a run to be killed does. It comes from a server that has done the imports, and keeps every compiled program.
FORKED = """
import os, runpy
os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
os.dup2(1, 2)
os.environ["XLA_FLAGS"] = ""  # one device
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
runpy.run_path(keep_programs)
from mllmrec_jax.cli import main
main(words)
"""
KEEP_PROGRAMS = ROOT / "tests" / "processes" / "sitecustomize.py"
PRELOADED = ["mllmrec_jax.cli", "mllmrec_jax.pipeline", "transformers.models.auto.tokenization_auto", "grain", "tyro"]


@contextlib.contextmanager
def forking(config: RunConfig, folder: Path) -> Iterator[list[Any]]:
    """Two processes of `mllmrec run --resume`, told of each other as the launcher does."""
    toml, log = folder / "forked.toml", folder / "forked.log"
    toml.write_text(tomli_w.dumps(to_dict(config)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    processes = []
    for command in plan_local(LocalOptions(config=str(toml), processes=2, cpu=True), [], port=find_free_port()):
        words = list(command.words[command.words.index("run") :])
        processes.append(
            context.Process(target=exec, args=(FORKED, {"words": words, "log": str(log), "keep_programs": str(KEEP_PROGRAMS)}))
        )
        processes[-1].start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def read_checkpoint(folder: Path) -> list[np.ndarray]:
    """Every array of a checkpoint, whole, without knowing whose it is."""
    reader = ocp.PyTreeCheckpointer()
    stored = reader.metadata(folder / "state").item_metadata
    assert stored is not None
    wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored.tree)
    return jax.tree.leaves(reader.restore(folder / "state", restore_args=wanted))


@pytest.mark.slow
def test_killed_at_twenty_moments_no_whole_checkpoint_is_lost(pair: RunConfig, tmp_path: Path) -> None:
    """SIGKILLs of either of two processes: half of them after a save has begun, half anywhere in the time it takes to get there.

    Each run goes on from what the one before left; the last one comes to the end, with the numbers of a run that was never stopped.
    """
    config = dataclasses.replace(pair, output=tmp_path)
    checkpoints, log = config.output / config.name / "checkpoints", tmp_path / "forked.log"
    moments = np.random.default_rng(0)
    start_s = 10.0  # that a run takes to its first save

    def list_all(*, whole: bool) -> list[tuple[int, int]]:
        return sorted((place, step) for place, stage in enumerate(STAGES) for step in list_saves(config, stage, whole=whole))

    def run_and_kill(place: int, *, after_save: bool) -> bool:
        """Whether a save was cut, in a run killed in stage `place` or in one after it."""
        nonlocal start_s
        begin = time.monotonic()
        end = math.inf if after_save else begin + moments.uniform(0, start_s)
        seen = max(list_all(whole=False), default=(0, 0))
        with forking(config, tmp_path) as processes:
            saves = lambda: max(list_all(whole=False), default=(0, 0)) > max(seen, (place, 0))  # noqa: E731
            alive = lambda: all(process.is_alive() for process in processes)  # noqa: E731
            wait_for(lambda: time.monotonic() > end or saves(), alive, log.read_text)
            if after_save:
                start_s = time.monotonic() - begin
                time.sleep(moments.uniform(0, 0.1))
            whole, victim = list_all(whole=True), moments.integers(2)
            processes[victim].kill()
            processes[victim].join()
            processes[1 - victim].join(moments.uniform(0, 1))  # the other one may end for it, or have no time to
        assert list_all(whole=True)[-1:] >= whole[-1:]
        for stage, step in list_all(whole=True):
            state = read_checkpoint(checkpoints / STAGES[stage] / str(step))
            assert all(np.isfinite(x).all() for x in state)
            assert any(x.shape == () and x == step for x in state)
        return list_all(whole=True) != list_all(whole=False)

    cut = [run_and_kill(place, after_save=after_save) for place in (0, 1) for _ in range(5) for after_save in (True, False)]
    assert len(cut) == 20 and sum(cut) >= 3
    with forking(config, tmp_path) as processes:
        for process in processes:
            process.join(300)
            assert process.exitcode == 0, log.read_text()
    assert_same(config, pair)
