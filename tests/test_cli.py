"""The command line: each command takes its own options and no others."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mllmrec_jax import cli

OPTIONS = {"--resume": [], "--overwrite": [], "--json": ["x.json"], "--repeats": ["3"], "--stage": ["sft"], "--folder": ["x"]}
TAKEN = {
    "prepare": set(),
    "sft": {"--resume", "--overwrite"},
    "grpo": {"--resume"},
    "evaluate": set(),
    "run": {"--resume", "--overwrite"},
    "export": {"--stage", "--folder"},
    "bench": {"--json", "--repeats", "--compare", "--threshold", "--over", "--values", "--plot"},
}


@pytest.mark.parametrize("command", TAKEN)
def test_a_command_refuses_the_options_it_does_not_use(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    called: list[Any] = []
    spied = dataclasses.replace(cli.COMMANDS[command], call=lambda _, options: called.append(options))
    monkeypatch.setitem(cli.COMMANDS, command, spied)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")
    start = [command, "step"] if command == "bench" else [command, "quickstart"]
    for option, values in OPTIONS.items():
        if option in TAKEN[command]:
            cli.main([*start, option, *values])
            assert getattr(called.pop(), option.removeprefix("--")) not in (None, False, "grpo", 20)
        else:
            with pytest.raises(SystemExit) as stopped:
                cli.main([*start, option, *values])
            assert stopped.value.code == 2
            assert option in capsys.readouterr().err
            assert not called


def test_help_names_the_options_of_the_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["grpo", "quickstart", "--help"])
    said = capsys.readouterr().out
    assert "Also: --resume go on with the run folder." in said
    assert "--overwrite" not in said


@pytest.mark.parametrize(
    ("command", "advice"), [("preprocess", "run the same command again"), ("prepare", "run the same command again"), ("run", "--resume")]
)
def test_ctrl_c_says_how_to_go_on(command: str, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, command, dataclasses.replace(cli.COMMANDS[command], call=interrupt, distributed=False))
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "quickstart"])
    said = capsys.readouterr().err
    assert stopped.value.code == cli.INTERRUPTED and advice in said and ("--resume" in said) == (command == "run")


@pytest.mark.parametrize("words", [["preprocess", "preprocess/posterworld_local"], ["bench", "preprocess"]])
def test_preprocessing_without_its_packages_says_what_to_install(words: list[str], tmp_path: Path) -> None:
    program = f"import sys; sys.modules['spellchecker'] = None; from mllmrec_jax.cli import main; main({words})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1]
        == "error: preprocess needs spellchecker, which is not installed: pip install 'mllmrec-jax[preprocess]'"
    )
