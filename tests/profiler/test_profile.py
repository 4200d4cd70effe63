"""`mllmrec profile` from the command line on the CPU, and that the training loop compiles nothing once its widths have been seen."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllmrec_jax.cli import main
from mllmrec_jax.config import GrpoConfig, ModelConfig, PromptConfig, RunConfig, TokenizerConfig
from mllmrec_jax.data.shards import open_shards, write_shards
from mllmrec_jax.pipeline import RunFolderError, open_run_folder
from mllmrec_jax.profiler.breakdown import label_operations
from mllmrec_jax.profiler.compilations import Compilation, watch_compilations
from mllmrec_jax.profiler.hlo import parse_module
from mllmrec_jax.profiler.phases import PHASES, find_phase
from mllmrec_jax.profiler.trace import find_trace_file, read_trace
from mllmrec_jax.profiler.work import RandomTokenizer, draw_examples, make_work
from mllmrec_jax.train.grpo_loop import run_grpo

TOML = """
name = "tiny"
[prompt]
max_prompt_tokens = 16
[tokenizer]
vocab_size = 128
[model]
num_layers = 2
hidden_size = 32
intermediate_size = 64
num_heads = 2
num_kv_heads = 2
head_dim = 16
dtype = "float32"
param_dtype = "float32"
[sft]
mode = "full"
accumulation = 2
[grpo]
batch_size = 2
accumulation = 1
group_size = 4
max_new_tokens = 6
lora = { rank = 4 }
"""


def profile(folder: Path, *arguments: str) -> Path:
    config = folder / "tiny.toml"
    config.write_text(TOML)
    main(["profile", str(config), "--output", str(folder / "runs"), "--first", "4", "--steps", "2", *arguments])
    return folder / "runs" / "tiny" / "profile"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return profile(tmp_path_factory.mktemp("profile"), "--mesh.data", "1") / "grpo"


@pytest.fixture(scope="module")
def content(made: Path) -> dict[str, Any]:
    return json.loads((made / "profile.json").read_text())


def test_everything_is_written(made: Path, content: dict[str, Any]) -> None:
    for name in ("breakdown.txt", "breakdown.html", "memory.json", "memory.prof", "profile.json", "trace/phases.json.gz"):
        assert (made / name).stat().st_size > 0, name
    assert find_trace_file(made / "trace").is_file()
    assert list((made / "trace").rglob("*.trace.json.gz"))
    assert [path.name for path in made.parent.iterdir()] == ["grpo"], "nothing unfinished is left behind"
    assert not (made / "loop").exists()
    page = (made / "breakdown.html").read_text()
    assert "<script" not in page
    assert "tiny: where a step of GRPO goes" in page
    assert [step["step"] for step in content["breakdown"]["steps"]] == [4, 5]


def test_shares_sum_to_one(content: dict[str, Any]) -> None:
    breakdown = content["breakdown"]
    for shares in (breakdown["phases"].values(), breakdown["kinds"].values(), [row["share"] for row in breakdown["rows"]]):
        assert sum(shares) == pytest.approx(1)
    assert breakdown["step_s"] == pytest.approx(np.mean([step["seconds"] for step in breakdown["steps"]]))
    assert breakdown["other_share"] < 0.05


def test_every_phase_of_a_grpo_step_is_seen(content: dict[str, Any]) -> None:
    phases = set(content["breakdown"]["phases"])
    assert set(PHASES) - {"other", "forward"} <= phases  # the rollout's states are replayed: no forward pass of the policy
    assert {"matmul", "attention", "log-prob", "sampling", "elementwise"} <= set(content["breakdown"]["kinds"])
    assert all(len(times) == 2 and min(times) > 0 for times in content["breakdown"]["layers"].values())


def test_every_matmul_is_in_a_phase(made: Path, content: dict[str, Any]) -> None:
    modules = [parse_module(path.read_text()) for path in sorted((made / "programs").glob("*.txt"))]
    products = [(module.resolve_paths()[name], name) for module in modules for name in module.find_matmuls()]
    assert len(products) > 60
    assert [name for path, name in products if find_phase(path) == "other"] == []
    labelled = label_operations(read_trace(find_trace_file(made / "trace"), stage="grpo"), modules)
    assert [one for one in labelled if one.label.kind in ("matmul", "attention") and one.label.phase == "other"] == []


def test_nothing_is_compiled_in_steady_steps(content: dict[str, Any]) -> None:
    assert content["compilations"] == []


def test_memory_is_owned(content: dict[str, Any]) -> None:
    owners, programs = content["memory"]["owners"], {one["name"]: one for one in content["programs"]}
    assert set(owners) == {"rollout", "update"}
    # 2 layers, keys and values of 2 heads of 16 float32: 2 prompts of 16 tokens and 4 completions of 6.
    assert owners["rollout"]["KV cache"] == 2 * 2 * 2 * 16 * 4 * 2 * (16 + 4 * 6)
    trained = owners["update"]["trained weights"]
    assert trained == 2 * 4 * 4 * (4 * (32 + 32) + 3 * (32 + 64))  # 2 layers, rank 4, float32
    assert owners["update"]["gradients"] == trained
    assert owners["update"]["optimizer"] == pytest.approx(2 * trained, rel=0.01)  # Adam's two moments
    temporaries = programs["jit_step"]["memory"]["temp"]
    assert owners["update"]["activations and other temporaries"] + trained == pytest.approx(temporaries)


def test_programs_are_saved_and_summarised(made: Path, content: dict[str, Any]) -> None:
    for program in content["programs"]:
        assert (made / program["file"]).is_file()
    update = next(one for one in content["programs"] if one["name"] == "jit_step")
    assert update["fusions"] > 0
    assert update["flops"] > 0
    assert update["collectives"] == []
    sizes = [buffer["bytes"] for buffer in update["largest_buffers"]]
    assert sizes == sorted(sizes, reverse=True)
    assert {"forward", "backward", "log-prob"} & set(update["matmuls"])


def test_timeline_has_phases_and_layers(made: Path) -> None:
    events = json.loads(gzip.decompress((made / "trace" / "phases.json.gz").read_bytes()))["traceEvents"]
    names = {event["name"] for event in events}
    assert {"step 4", "decode", "backward: layer 1 attention", "host: reward"} <= names


@pytest.mark.slow
def test_sft_on_two_devices(tmp_path: Path) -> None:
    made = profile(tmp_path, "--stage", "sft", "--mesh.data", "1", "--mesh.fsdp", "2") / "sft"
    content = json.loads((made / "profile.json").read_text())
    breakdown = content["breakdown"]
    assert breakdown["devices"] == 2
    assert sum(breakdown["kinds"].values()) == pytest.approx(1)
    assert breakdown["kinds"]["collectives"] > 0
    assert {"forward", "backward", "optimizer"} <= set(breakdown["phases"])
    assert next(one for one in content["programs"] if one["name"] == "jit_step")["collectives"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--first", "3"], "--first of at least 4"), (["--steps", "0"], "--steps of at least 1"), (["--name", "../up"], "name of one folder")],
)
def test_bad_numbers_are_refused(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        profile(tmp_path, *arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_with_profiles_is_free_for_a_run(tmp_path: Path) -> None:
    config = RunConfig(name="tiny", output=tmp_path)
    (tmp_path / "tiny" / "profile").mkdir(parents=True)
    assert open_run_folder(config, resume=False, overwrite=False) == tmp_path / "tiny"
    (tmp_path / "tiny" / "provenance.json").write_text("{}")
    with pytest.raises(RunFolderError):
        open_run_folder(config, resume=False, overwrite=False)


def test_grpo_loop_compiles_nothing_once_its_widths_are_seen(tmp_path: Path) -> None:
    config = RunConfig(
        prompt=PromptConfig(max_prompt_tokens=16),
        tokenizer=TokenizerConfig(vocab_size=128),
        model=ModelConfig(num_layers=1, hidden_size=32, intermediate_size=32, num_heads=2, num_kv_heads=2, head_dim=16, dtype="float32"),
        grpo=GrpoConfig(batch_size=2, accumulation=1, group_size=2, max_new_tokens=4, epochs=4),
    )
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, buckets=(8, 16)))
    work = make_work(config, "grpo", "random", folder=tmp_path)
    examples = draw_examples(config, "grpo", vocab_size=128)
    examples.prompt_length[:2] = 8  # one of an epoch's two batches is in each bucket
    write_shards(tmp_path / "two", examples, provenance={})
    shards, during = open_shards(tmp_path / "two"), dict[int, list[Compilation]]()
    with watch_compilations() as compiled:

        def watch(step: int) -> bool:
            during[step] = list(compiled)
            compiled.clear()
            return True

        run_grpo(config, work.policy, shards, RandomTokenizer(), {}, folder=tmp_path, identity={}, resume=False, watch=watch)
    assert len(during) == 8
    assert "jit(step)" in {one.name for one in during[1]}, "the first step compiles"
    # Both buckets come in each epoch of two steps; what the last step alone does (its checkpoint) is not before a step.
    assert [(step, one.name) for step, found in during.items() if step > 2 for one in found] == []
