"""The `mllmrec` command: thin, no logic. Heavy imports wait until the arguments are known to be right."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

from mllmrec_jax import __version__
from mllmrec_jax.config import ConfigError, RunConfig, check_config, load_config
from mllmrec_jax.resources import find_config

INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class _Options:
    """Options of a command that are not part of a run's configuration."""

    resume: bool
    overwrite: bool
    json: Path | None
    repeats: int
    stage: str
    folder: Path | None


def _prepare(config: RunConfig, options: _Options) -> None:
    from mllmrec_jax.prepare import prepare_data

    for note in prepare_data(config).notes:
        print(note)


def _sft(config: RunConfig, options: _Options) -> None:
    from mllmrec_jax.pipeline import open_run

    open_run(config, resume=options.resume, overwrite=options.overwrite).sft(resume=options.resume)


def _grpo(config: RunConfig, options: _Options) -> None:
    from mllmrec_jax.pipeline import open_run

    run = open_run(config, resume=True)
    run.grpo(*run.load_sft(), resume=options.resume)


def _evaluate(config: RunConfig, options: _Options) -> None:
    from mllmrec_jax.pipeline import open_run

    run = open_run(config, training=False)
    _announce(run.report(run.load_policies()), run.folder)


def _run(config: RunConfig, options: _Options) -> None:
    from mllmrec_jax.pipeline import run_all

    _announce(run_all(config, resume=options.resume, overwrite=options.overwrite), config.output / config.name)


def _export(config: RunConfig, options: _Options) -> None:
    from mllmrec_jax.pipeline import export_stage, open_run

    folder = options.folder or config.output / config.name / f"{options.stage}-huggingface"
    export_stage(open_run(config, training=False), options.stage, folder)
    print(f"wrote {folder}")


def _bench(config: RunConfig, options: _Options) -> None:
    from mllmrec_jax.bench import bench_step

    result = bench_step(config, repeats=options.repeats)
    text = json.dumps(result, indent=2)
    print(text)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", encoding="utf-8")


COMMANDS: dict[str, tuple[Callable[[RunConfig, _Options], None], str]] = {
    "prepare": (_prepare, "read or generate the data, freeze candidates, write verified shards"),
    "sft": (_sft, "supervised fine-tuning"),
    "grpo": (_grpo, "GRPO on the SFT result of the same run folder"),
    "evaluate": (_evaluate, "rank with what the run folder holds; write report.json and report.html"),
    "run": (_run, "all of these: prepare, sft, grpo, evaluation before and after, report"),
    "export": (_export, "write a stage's weights as a Hugging Face folder"),
    "bench": (_bench, "measure one GRPO step on random weights: `mllmrec bench step --config FILE`"),
}


def _announce(report: dict, folder: Path) -> None:
    from mllmrec_jax.evaluate.console import print_table

    print_table(report)
    print(f"report: {folder / 'report.html'} and {folder / 'report.json'}")


def _parse(argv: Sequence[str]) -> tuple[str, _Options, RunConfig]:
    epilog = "commands:\n" + "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    epilog += "\n\n`mllmrec COMMAND CONFIG --help` lists every option with its type, default and unit."
    parser = argparse.ArgumentParser(
        prog="mllmrec",
        description="Train language models to recommend.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mllmrec-jax {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND")
    if not argv or argv[0] not in COMMANDS:
        parser.parse_args(list(argv) or ["--help"])
    command = argv[0]
    own = argparse.ArgumentParser(prog=f"mllmrec {command}", add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    if command == "bench":
        own.add_argument("what", choices=["step"])
        own.add_argument("--config", default="bench/peer_tiny", dest="config")
    else:
        own.add_argument("config", nargs="?", default=None)
    own.add_argument("--resume", action="store_true")
    own.add_argument("--overwrite", action="store_true")
    own.add_argument("--json", type=Path)
    own.add_argument("--repeats", type=int, default=20)
    own.add_argument("--stage", choices=["sft", "grpo"], default="grpo")
    own.add_argument("--folder", type=Path)
    # The configuration, where given, is the first word: what follows belongs to fields and may look like one.
    known, rest = own.parse_known_args(list(argv[1:]))
    asks_help = "--help" in rest or "-h" in rest
    if known.config is None and not asks_help:
        raise ConfigError(f"mllmrec {command}: expected a configuration (a TOML file, or the name of a shipped one such as quickstart)")
    default = RunConfig() if known.config is None else load_config(find_config(known.config))
    description = COMMANDS[command][1]
    flags = "Also: --resume goes on with the run folder, --overwrite starts it over; bench: --json FILE, --repeats N; "
    flags += "export: --stage, --folder."
    config = tyro.cli(RunConfig, default=default, args=rest, prog=f"mllmrec {command} CONFIG", description=f"{description}\n\n{flags}")
    options = _Options(known.resume, known.overwrite, known.json, known.repeats, known.stage, known.folder)
    return command, options, check_config(config, str(known.config))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 on anything the user can mend, with the cause in one message."""
    try:
        command, options, config = _parse(sys.argv[1:] if argv is None else argv)
        # Compiled programs are kept beside the prepared data: the second run of a configuration starts at once.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((config.cache / "xla").absolute()))
        COMMANDS[command][0](config, options)
    except KeyboardInterrupt:
        print("interrupted; go on with --resume", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (ValueError, RuntimeError, OSError) as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith("mllmrec_"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
