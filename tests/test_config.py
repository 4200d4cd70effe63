from __future__ import annotations

import dataclasses
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import tyro

from mllmrec_jax.config import (
    ConfigError,
    DataConfig,
    LoraConfig,
    RunConfig,
    check_config,
    fingerprint,
    load_config,
    to_dict,
)
from mllmrec_jax.resources import find_config

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted((ROOT / "configs").rglob("*.toml"))


def runnable(**changes: Any) -> RunConfig:
    """The defaults, made to pass `check_config` (adapters on random weights are refused)."""
    base = RunConfig()
    return dataclasses.replace(base, **{"sft": dataclasses.replace(base.sft, mode="full"), **changes})


def load_text(folder: Path, text: str) -> RunConfig:
    path = folder / "some.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_text(tmp_path, "") == RunConfig()


def test_values_reach_nested_fields_with_their_types(tmp_path: Path) -> None:
    text = """
    seed = 3
    output = "elsewhere"
    [data]
    split_ratios = [0.8, 0.1, 0.1]
    [data.posterworld]
    items = 40
    [prompt]
    history_fields = []
    [sft.lora]
    targets = ["q_proj"]
    """
    config = load_text(tmp_path, text)
    assert (config.seed, config.output) == (3, Path("elsewhere"))
    assert config.data.split_ratios == (0.8, 0.1, 0.1)
    assert config.data.posterworld.items == 40
    assert config.prompt.history_fields == ()
    assert config.sft.lora == LoraConfig(targets=("q_proj",))
    assert config.grpo == RunConfig().grpo


def test_whole_number_is_taken_for_a_float(tmp_path: Path) -> None:
    assert load_text(tmp_path, "[grpo]\nbeta = 1").grpo.beta == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sed = 1", ["unknown key 'sed'", "nearest known key: 'seed'"]),
        (
            '[[preprocess.quality.raters]]\nmodell = "x"',
            ["unknown key 'preprocess.quality.raters.0.modell'", "nearest known key: 'preprocess.quality.raters.0.model'"],
        ),
        ("[data]\nhistory_length = 8", ["unknown key 'data.history_length'", "nearest known key: 'data.history_len'"]),
        ("[sft.optimizer]\nlearning_rat = 1.0", ["unknown key 'sft.optimizer.learning_rat'", "'sft.optimizer.learning_rate'"]),
        ("[grpo.reward]\nqqqqqqqq = 1", ["unknown key 'grpo.reward.qqqqqqqq'", "known here: preset, require_membership, require_title"]),
        ("seed = '1'", ["key 'seed'", "integer", "got '1'"]),
        ("seed = true", ["key 'seed'", "integer", "got True"]),
        ("[sft]\nbatch_size = 2.5", ["key 'sft.batch_size'", "integer", "got 2.5"]),
        ("[data]\nhistory_len = 0", ["key 'data.history_len'", "greater than 0", "got 0"]),
        ("[grpo]\ntop_p = 1.5", ["key 'grpo.top_p'", "less than or equal to 1", "got 1.5"]),
        ("[grpo]\ngroup_size = 1", ["key 'grpo.group_size'", "greater than or equal to 2", "got 1"]),
        ("[grpo]\ntemperature = nan", ["key 'grpo.temperature'"]),
        ("[optimizer]\nb1 = 1", ["unknown key 'optimizer'"]),
        ("[sft.optimizer]\nb1 = 1.0", ["key 'sft.optimizer.b1'", "less than 1"]),
        ("[model]\nfamily = 'gpt2'", ["key 'model.family'", "'qwen3', 'qwen2' or 'llama'", "got 'gpt2'"]),
        ("[data]\nsplit_ratios = [0.5, 0.5]", ["key 'data.split_ratios", "got "]),
        ("data = 3", ["key 'data'", "got 3"]),
        ("[sft.lora]\ntargets = ['lm_head']", ["key 'sft.lora.targets.0'", "got 'lm_head'"]),
    ],
)
def test_bad_value_is_an_error_that_names_file_key_expected_and_got(tmp_path: Path, text: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_text(tmp_path, text)
    for part in [str(tmp_path / "some.toml"), *expected]:
        assert part in str(error.value)


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_text(tmp_path, "sed = 1\n[data]\nhistory_len = 0")
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("content", [b"seed = ", b"seed = 1\nseed = 2", b"name = '\xff'"])
def test_file_that_is_not_toml_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML"):
        load_config(path)


def test_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read: No such file"):
        load_config(tmp_path / "absent.toml")


def test_runnable_defaults_pass_unchanged() -> None:
    assert check_config(runnable()) == runnable()


@pytest.mark.parametrize(
    ("section", "changes", "expected"),
    [
        ("data", {"split_ratios": (0.7, 0.1, 0.1)}, "data.split_ratios: expected shares that sum to 1"),
        ("data", {"source": "movielens"}, "data.path: expected the folder with the movielens files"),
        ("data", {"negatives": -1}, "key 'data.negatives': expected"),
        ("tokenizer", {"kind": "huggingface"}, "tokenizer.path: expected a huggingface tokenizer"),
        ("model", {"num_heads": 4, "num_kv_heads": 3}, "model.num_heads: expected a multiple of model.num_kv_heads = 3, got 4"),
        ("model", {"head_dim": 33}, "model.head_dim: expected an even number"),
        ("loader", {"buckets": (128, 64)}, "loader.buckets: expected ascending lengths"),
        ("loader", {"buckets": (64, 64)}, "loader.buckets: expected ascending lengths"),
        ("sft", {"mode": "lora"}, "sft.mode: expected 'full' for random weights"),
    ],
)
def test_values_that_contradict_each_other_are_refused(section: str, changes: dict[str, Any], expected: str) -> None:
    config = runnable()
    config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})
    with pytest.raises(ConfigError) as error:
        check_config(config, where="here")
    assert expected in str(error.value)
    assert str(error.value).startswith("here: ")


def test_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().seed = 1  # type: ignore[misc]


def test_plain_form_loads_to_the_same_config(tmp_path: Path) -> None:
    config = runnable(data=DataConfig(path=Path("raw"), split_seed=7), seed=5)
    assert check_config(config) == config
    assert load_text(tmp_path, tomli_w.dumps(to_dict(config))) == config


def test_command_line_overrides_one_field_and_keeps_the_file(tmp_path: Path) -> None:
    base = load_text(tmp_path, "seed = 3\n[data.posterworld]\nitems = 40\n[grpo]\nbeta = 0.2")
    arguments = "--data.posterworld.users 50 --grpo.top-p 0.5 --sft.mode full --prompt.history-fields title genres --data.path raw"
    config = tyro.cli(RunConfig, default=base, args=arguments.split())
    assert check_config(config) == config
    assert (config.seed, config.data.posterworld.items, config.grpo.beta) == (3, 40, 0.2)
    assert (config.data.posterworld.users, config.grpo.top_p, config.data.path) == (50, 0.5, Path("raw"))
    assert config.prompt.history_fields == ("title", "genres")


def test_no_arguments_change_nothing(tmp_path: Path) -> None:
    base = load_text(tmp_path, "name = 'x'\n[loader]\nbuckets = [64, 128]\n[data]\npath = 'raw'\n[prompt]\nhistory_fields = []")
    assert tyro.cli(RunConfig, default=base, args=[]) == base


def test_value_out_of_range_on_the_command_line_is_refused_by_the_check() -> None:
    config = tyro.cli(RunConfig, default=runnable(), args=["--data.history-len", "0"])
    with pytest.raises(ConfigError, match=r"command line: key 'data\.history_len': expected greater than 0, got 0"):
        check_config(config)


def test_help_shows_type_default_and_unit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # one column of options
    with pytest.raises(SystemExit) as done:
        tyro.cli(RunConfig, default=RunConfig(), args=["--help"])
    assert done.value.code == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    option = words.split("--data.history-len ")[1].split(" --data.")[0]
    assert option == "INT Interactions shown before the target (items). (default: 8)"


def test_fingerprint_depends_on_every_value_and_on_nothing_else() -> None:
    assert fingerprint(RunConfig()) == fingerprint(RunConfig())
    assert fingerprint(RunConfig(), 1) != fingerprint(RunConfig(), 2)
    assert fingerprint(RunConfig()) != fingerprint(dataclasses.replace(RunConfig(), seed=1))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT / "configs").as_posix())
def test_shipped_config_loads_and_its_first_line_runs_it(path: Path) -> None:
    name = path.relative_to(ROOT / "configs").with_suffix("").as_posix()
    words = shlex.split(path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#"))
    assert words[0] == "mllmrec", f"{path}: expected a first line '# mllmrec ...', got {words}"
    named = [word for word in words[1:] if word.removeprefix("configs/").removesuffix(".toml") == name]
    assert [find_config(word).resolve() for word in named] == [path], f"{path}: its first line runs another config: {words}"
    config = load_config(path)
    if words[1] == "run":
        if "--data.path" in words:  # data that is not embedded is named on the command line
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=Path("raw")))
        assert check_config(config) == config
        assert tomllib.loads(path.read_text(encoding="utf-8")), f"{path}: changes nothing"
