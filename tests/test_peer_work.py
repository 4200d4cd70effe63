"""The work peers are timed on and their comparison: profiling/peers/peer_work.py, compare.py (a folder of scripts, not a package)."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mllmrec_jax.bench.work import find_sizes
from mllmrec_jax.cli import main
from mllmrec_jax.config import load_config
from mllmrec_jax.evaluate.metrics import CUTOFFS

SCRIPT = Path(__file__).resolve().parents[1] / "profiling" / "peers" / "peer_work.py"
CONFIG = SCRIPT.parents[2] / "configs" / "bench" / "peer_tiny.toml"


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPT.with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def peer_work() -> ModuleType:
    return load_script("peer_work")


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    return load_script("compare")


def test_config_of_the_same_sizes_passes_and_another_size_is_refused(peer_work: ModuleType, tmp_path: Path) -> None:
    config = tmp_path / "peer.toml"
    config.write_text("[model]\nnum_layers = 4\n[grpo]\ngroup_size = 8\n[grpo.lora]\nrank = 16\n")
    peer_work.check_config(peer_work.PeerWork(), config)
    config.write_text("[grpo.lora]\nrank = 8\n")
    with pytest.raises(ValueError, match=r"peer\.toml: grpo\.lora\.rank: expected 16.*got 8"):
        peer_work.check_config(peer_work.PeerWork(), config)


def test_the_repository_config_is_the_peers_work(peer_work: ModuleType) -> None:
    peer_work.check_config(peer_work.PeerWork())


def test_work_of_another_configuration_has_its_sizes(peer_work: ModuleType, tmp_path: Path) -> None:
    assert peer_work.read_work(CONFIG) == peer_work.PeerWork()
    work = peer_work.read_work(CONFIG.with_name("qwen3_4b.toml"))
    sizes = find_sizes(load_config(CONFIG.with_name("qwen3_4b.toml")))
    assert (work.prompts, work.prompt_tokens, work.group_size, work.max_new_tokens, work.vocab_size) == sizes
    assert (work.num_layers, work.hidden_size, work.rope_theta) == (36, 2560, 1e6)
    several = tmp_path / "several.toml"
    several.write_text("[grpo]\naccumulation = 2\n")
    with pytest.raises(ValueError, match=r"several\.toml: grpo\.accumulation: expected 1 .*got 2"):
        peer_work.read_work(several)


def test_prompts_are_full_width_and_free_of_special_tokens(peer_work: ModuleType) -> None:
    work = peer_work.PeerWork()
    prompts = peer_work.make_prompts(work, 3, first_id=2)
    assert prompts.shape == (3, work.prompts, work.prompt_tokens)
    assert prompts.min() >= 2 and prompts.max() < work.vocab_size
    assert len(np.unique(prompts.reshape(-1, work.prompt_tokens), axis=0)) == 3 * work.prompts


def test_row_leaves_out_the_warm_up_and_splits_each_step(peer_work: ModuleType) -> None:
    row = peer_work.make_row(
        "peer",
        peer_work.PeerWork(),
        {},
        ["numpy"],
        step_s=[90.0, 2.0, 4.0, 3.0],
        generate_s=[50.0, 1.5, 1.0, 2.0],
        cpu_s=[100.0, 4.0, 8.0, 6.0],
        warmup=1,
    )
    assert row["step_s"]["p50"] == 3.0 and row["generate_s"]["p50"] == 1.5 and row["update_s"]["p50"] == 1.0
    assert row["cpu_s"]["p50"] == 6.0 and row["first_step_s"] == 90.0 and row["steps"] == 3


def test_row_refuses_steps_without_their_generation(peer_work: ModuleType) -> None:
    with pytest.raises(ValueError, match="got 1 generations in 2 steps"):
        peer_work.make_row("peer", peer_work.PeerWork(), {}, [], step_s=[1.0, 1.0], generate_s=[1.0], cpu_s=[1.0, 1.0], warmup=0)


def test_row_of_calls_leaves_out_the_warm_up_and_names_the_call(peer_work: ModuleType) -> None:
    work = peer_work.PeerWork()
    row = peer_work.make_call_row("peer", work, {}, [], call="user", seconds=[9.0, 2.0, 4.0, 3.0], cpu_s=[9.0, 4.0, 8.0, 6.0], warmup=1)
    assert row["user_s"]["p50"] == 3 and row["cpu_s"]["p50"] == 6 and row["first_user_s"] == 9 and row["steps"] == 3
    with pytest.raises(ValueError, match="more than 4 calls"):
        peer_work.make_call_row("peer", work, {}, [], call="user", seconds=[1.0] * 4, cpu_s=[1.0] * 4, warmup=4)


def test_a_users_prompts_are_as_many_as_the_reports_k(peer_work: ModuleType) -> None:
    work = peer_work.PeerWork()
    assert work.cutoffs == CUTOFFS
    assert peer_work.make_prompts(work, 2, first_id=2, prompts=len(work.cutoffs)).shape == (2, len(CUTOFFS), work.prompt_tokens)


def make_result(compare: ModuleType, work: str, program: str, peer_work: ModuleType, slow: float) -> dict[str, Any]:
    """What a program writes in a round in which the machine takes `slow` times as long: ours 0.5 s a phase, theirs 4 s."""
    if program != compare.OURS:
        sizes = dataclasses.asdict(peer_work.PeerWork())
        return {phase: {"p50": 4 * slow} for phase in compare.WORKS[work].phases} | {"work": sizes | {"cutoffs": list(sizes["cutoffs"])}}
    sizes = find_sizes(load_config(CONFIG))
    document: dict[str, Any] = {"benchmark": work, "shapes": sizes._asdict()}
    if work == "step":
        return document | {phase: {"p50": 0.5 * slow} for phase in compare.STEP}
    rows: list[dict[str, Any]] = [{"name": "rollout", "p50": 0.5 * slow}]
    if work == "rank":
        document["shapes"] = sizes._replace(prompts=32, group_size=10)._asdict()
        rows = [
            {"name": "rank", "p50": 16 * slow, "users_per_s": 32 / (16 * slow)},
            {"name": "generate_per_k", "p50": slow, "users_per_s": 1 / slow, "shape": {"cutoffs": list(CUTOFFS)}},
        ]
    if work == "update":
        del document["shapes"]
        points = itertools.product((4, 8), (("shared", 0.5), ("repeated", 1.5)))
        rows = [
            {"name": "update", "group_size": size, "layout": layout, "p50": size / 8 * seconds * slow} for size, (layout, seconds) in points
        ]
    return document | {"rows": rows}


@pytest.mark.parametrize("work", ["step", "rollout", "rank", "update"])
def test_table_is_of_medians_within_rounds(compare: ModuleType, peer_work: ModuleType, work: str) -> None:
    """A machine that is twice as slow in one round changes no ratio."""
    spec = compare.WORKS[work]
    rounds = [{name: make_result(compare, work, name, peer_work, slow) for name in (compare.OURS, *spec.peers)} for slow in (1.0, 2.0, 1.0)]
    for rows in rounds:
        compare.check_same_work(work, rows)
    table = compare.summarise_rounds([compare.read_round(spec, rows) for rows in rounds])
    assert next(iter(table)) == compare.OURS and table.keys() == spec.lines.keys()
    expected = {compare.OURS: 0.5, f"{compare.OURS}, a generation a K": 1.0, "prompts repeated": 1.5}
    for name, phase in itertools.product(table, spec.phases):
        seconds = expected.get(name, 4.0)
        assert table[name][phase] == pytest.approx(seconds) and table[name][f"{phase} x"] == pytest.approx(seconds / 0.5)
    lines = compare.format_table(spec, table).splitlines()
    assert len(lines) == 1 + len(table) and all(line.startswith(name) for line, name in zip(lines[1:], table, strict=True))


def test_a_busy_machine_is_seen_in_the_cores_a_peer_had(compare: ModuleType) -> None:
    rounds = [{compare.OURS: {}, "hf": {"user_s": {"p50": 2.0}, "cpu_s": {"p50": cpu}, "machine": {"cpus": 2}}} for cpu in (4.0, 2.0)]
    assert compare.describe_cores(rounds) == ["hf: 2.0, 1.0 of 2 cores"]
    assert compare.describe_cores([{compare.OURS: {}}]) == []


@pytest.mark.parametrize(
    ("work", "size", "value"), [("step", "group_size", 4), ("rollout", "prompts", 1), ("rank", "negatives", 99), ("rank", "cutoffs", [1])]
)
def test_results_of_other_sizes_are_not_compared(compare: ModuleType, peer_work: ModuleType, work: str, size: str, value: Any) -> None:
    rows = {name: make_result(compare, work, name, peer_work, 1.0) for name in (compare.OURS, *compare.WORKS[work].peers)}
    compare.check_same_work(work, rows)
    rows[next(iter(compare.WORKS[work].peers))]["work"][size] = value
    with pytest.raises(ValueError, match=f"{work}: .*expected .* to be ours"):
        compare.check_same_work(work, rows)


def test_a_peer_without_an_environment_is_left_out_and_an_empty_one_refused(compare: ModuleType, tmp_path: Path) -> None:
    rollout = compare.WORKS["rollout"]
    commands = compare.make_commands(rollout, steps=5, environments={"trl": None})
    assert list(commands) == [compare.OURS] and commands[compare.OURS][-2:] == ["--repeats", "20"]
    assert list(compare.read_round(rollout, {compare.OURS: {"benchmark": "rollout", "rows": [{"name": "rollout", "p50": 1.0}]}})) == [
        compare.OURS
    ]
    with pytest.raises(FileNotFoundError, match="--trl: expected an environment"):
        compare.make_commands(rollout, steps=5, environments={"trl": tmp_path})


def test_a_document_without_the_row_is_refused(compare: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"bench scaling: expected one row 'update' with \{'group_size': 8\}, got 0"):
        compare.find_row({"benchmark": "scaling", "rows": [{"name": "update", "group_size": 4}]}, "update", group_size=8)


@pytest.mark.parametrize("work", ["step", "rollout", "rank", "update"])
def test_our_command_is_one_that_mllmrec_takes(compare: ModuleType, work: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Parsed, not run: one repeat too few ends it before anything is timed."""
    command = compare.make_commands(compare.WORKS[work], steps=0, environments={})[compare.OURS]
    with pytest.raises(SystemExit, match="2"):
        main(command[command.index("bench") :])
    assert "--repeats: expected at least 1, got 0" in capsys.readouterr().err
