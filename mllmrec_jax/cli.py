"""The `mllmrec` command: thin, no logic. Heavy imports wait until the arguments are known to be right."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from mllmrec_jax import __version__
from mllmrec_jax.config import ConfigError, RunConfig, check_config, load_config
from mllmrec_jax.distributed import EXIT_PREEMPTED, PreemptedError, abort_distributed, is_main_process, start_distributed, stop_distributed
from mllmrec_jax.preprocess_config import STAGES
from mllmrec_jax.resources import find_config

INTERRUPTED = 130
SLOWER = 1

# Named here: their modules import JAX, which waits until the arguments are known to be right.
BENCHMARKS = ("kernels", "rollout", "update", "step", "sft", "loader", "preprocess", "rank", "scaling", "roofline")
SCALED = ("group_size", "prompt_tokens", "new_tokens", "batch_size", "layers", "vocabulary")

_RESUME = ("--resume", {"action": "store_true", "help": "go on with the run folder"})
_OVERWRITE = ("--overwrite", {"action": "store_true", "help": "delete the run folder and start over"})


def _prepare(config: RunConfig, options: argparse.Namespace) -> None:
    from mllmrec_jax.prepare import prepare_data

    for note in prepare_data(config).notes:
        print(note)


def _preprocess(config: RunConfig, options: argparse.Namespace) -> None:
    from mllmrec_jax.preprocess.run import run_preprocess
    from mllmrec_jax.preprocess.runner import open_runner
    from mllmrec_jax.preprocess.summary import list_summary

    with open_runner(options.runner, config.preprocess, options.address) as runner:
        report = run_preprocess(config, until=options.stage, runner=runner)
    print("\n".join(list_summary(report)))


def _sft(config: RunConfig, options: argparse.Namespace) -> None:
    from mllmrec_jax.pipeline import open_run

    open_run(config, resume=options.resume, overwrite=options.overwrite).sft(resume=options.resume)


def _grpo(config: RunConfig, options: argparse.Namespace) -> None:
    from mllmrec_jax.pipeline import open_run

    run = open_run(config, resume=True)
    run.grpo(*run.load_sft(), resume=options.resume)


def _evaluate(config: RunConfig, options: argparse.Namespace) -> None:
    from mllmrec_jax.pipeline import open_run

    run = open_run(config, training=False)
    _announce(run.report(run.load_policies()), run.folder)


def _run(config: RunConfig, options: argparse.Namespace) -> None:
    from mllmrec_jax.pipeline import run_all

    _announce(run_all(config, resume=options.resume, overwrite=options.overwrite), config.output / config.name)


def _export(config: RunConfig, options: argparse.Namespace) -> None:
    from mllmrec_jax.pipeline import export_stage, open_run

    folder = options.folder or config.output / config.name / f"{options.stage}-huggingface"
    export_stage(open_run(config, training=False), options.stage, folder)
    if is_main_process():
        print(f"wrote {folder}")


def _bench(config: RunConfig, options: argparse.Namespace) -> None:
    from mllmrec_jax.bench.run import run_benchmark

    own = {name: getattr(options, name) for name in ("repeats", "compare", "threshold", "over", "values", "plot")}
    if not run_benchmark(options.what, config, json_path=options.json, **own):
        sys.exit(SLOWER)


def _list_sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _profile(config: RunConfig, options: argparse.Namespace) -> None:
    from mllmrec_jax.profiler.run import run_profile

    folder = run_profile(config, stage=options.stage, source=options.work, first=options.first, count=options.steps)
    print((folder / "breakdown.txt").read_text(encoding="utf-8"))
    print(f"profile: {folder / 'breakdown.html'}; open {folder / 'trace' / 'phases.json.gz'} in ui.perfetto.dev")


@dataclasses.dataclass(frozen=True)
class _Command:
    call: Callable[[RunConfig, argparse.Namespace], None]
    description: str
    options: tuple[tuple[str, dict[str, Any]], ...] = ()
    """Options that are not part of a run's configuration: name, arguments of `add_argument`."""
    distributed: bool = False
    """Whether it runs on all processes of [distributed]; the others are of one process."""


COMMANDS = {
    "prepare": _Command(_prepare, "read or generate the data, freeze candidates, write verified shards"),
    "preprocess": _Command(
        _preprocess,
        "pictures and histories to captions, traces, scores and shards",
        (
            ("--stage", {"choices": list(STAGES), "default": STAGES[-1], "help": "last stage to run; not given: all"}),
            ("--runner", {"choices": ["local", "ray"], "default": "local", "help": "ray: work on a Ray cluster (extra `ray`)"}),
            ("--address", {"help": "of the cluster, host:port, auto or local; not given: as Ray finds it"}),
        ),
    ),
    "sft": _Command(_sft, "supervised fine-tuning", (_RESUME, _OVERWRITE), distributed=True),
    "grpo": _Command(_grpo, "GRPO on the SFT result of the same run folder", (_RESUME,), distributed=True),
    "evaluate": _Command(_evaluate, "rank with what the run folder holds; write report.json and report.html", distributed=True),
    "run": _Command(_run, "all of these: prepare, sft, grpo, evaluation before and after, report", (_RESUME, _OVERWRITE), distributed=True),
    "export": _Command(
        _export,
        "write a stage's weights as a Hugging Face folder",
        (
            ("--stage", {"choices": ["sft", "grpo"], "default": "grpo", "help": "whose weights"}),
            ("--folder", {"type": Path, "help": "where to; not given: in the run folder"}),
        ),
        distributed=True,
    ),
    "bench": _Command(
        _bench,
        "measure one part on random weights: `mllmrec bench PART --config FILE`; PART: " + ", ".join(BENCHMARKS),
        (
            ("--json", {"type": Path, "help": "file for the result"}),
            ("--repeats", {"type": int, "help": "repeats timed; not given: as the part has it"}),
            ("--compare", {"type": Path, "help": "an earlier --json file: print ratios, exit with 1 where a row is slower"}),
            ("--threshold", {"type": float, "default": 0.1, "help": "slowdown that counts (0.1: a tenth)"}),
            ("--over", {"choices": SCALED, "help": f"size that `scaling` varies: {', '.join(SCALED)}"}),
            ("--values", {"type": _list_sizes, "default": [], "help": "its values, as 2,4,8; not given: around the configuration's"}),
            ("--plot", {"type": Path, "help": "SVG file for the picture of `scaling` or `roofline`"}),
        ),
    ),
    "profile": _Command(
        _profile,
        "where the time and memory of training steps go: trace, breakdown, compiled programs",
        (
            ("--stage", {"choices": ["sft", "grpo"], "default": "grpo", "help": "whose steps"}),
            ("--work", {"choices": ["random", "prepared"], "default": "random", "help": "random prompts of full length or the run's data"}),
            ("--first", {"type": int, "default": 6, "help": "first step that counts"}),
            ("--steps", {"type": int, "default": 3, "help": "steps that count"}),
        ),
    ),
}


def _announce(report: dict, folder: Path) -> None:
    from mllmrec_jax.evaluate.console import print_table

    if not is_main_process():
        return
    print_table(report)
    print(f"report: {folder / 'report.html'} and {folder / 'report.json'}")


def _parse(argv: Sequence[str]) -> tuple[_Command, argparse.Namespace, RunConfig]:
    epilog = "commands:\n" + "\n".join(f"  {name:<10} {command.description}" for name, command in COMMANDS.items())
    epilog += "\n  launch     start a run's processes on this machine, or by SLURM, Kubernetes, TPU VMs, MPI"
    epilog += "\n  plan       which mesh and micro-batch fit a number of devices, and how long a step should take"
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
    name, command = argv[0], COMMANDS[argv[0]]
    own = argparse.ArgumentParser(prog=f"mllmrec {name}", add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    if name == "bench":
        own.add_argument("what", choices=list(BENCHMARKS))
        own.add_argument("--config", default="bench/peer_tiny", dest="config")
    else:
        own.add_argument("config", nargs="?", default=None)
    for option, arguments in command.options:
        own.add_argument(option, **arguments)
    # The configuration, where given, is the first word: what follows belongs to fields and may look like one.
    known, rest = own.parse_known_args(list(argv[1:]))
    asks_help = "--help" in rest or "-h" in rest
    if known.config is None and not asks_help:
        raise ConfigError(f"mllmrec {name}: expected a configuration (a TOML file, or the name of a shipped one such as quickstart)")
    default = RunConfig() if known.config is None else load_config(find_config(known.config))
    also = "; ".join(f"{option} {arguments['help']}" for option, arguments in command.options)
    description = f"{command.description}\n\nAlso: {also}." if also else command.description
    config = tyro.cli(RunConfig, default=default, args=rest, prog=f"mllmrec {name} CONFIG", description=description)
    return command, known, check_config(config, str(known.config))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 on anything the user can mend, with the cause in one message, and with 75 after SIGTERM."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["launch"]:
            from mllmrec_launch.command import launch

            sys.exit(launch(words[1:]))
        if words[:1] == ["plan"]:
            from mllmrec_jax.plan.command import plan

            sys.exit(plan(words[1:]))
        command, options, config = _parse(words)
        # Compiled programs are kept beside the prepared data: the second run of a configuration starts at once.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((config.cache / "xla").absolute()))
        if command.distributed:
            start_distributed(config.distributed)
        command.call(config, options)
        stop_distributed()
    except PreemptedError as reason:
        stop_distributed()
        print(reason, file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)
    except KeyboardInterrupt:
        abort_distributed("interrupted", INTERRUPTED)
        resumes = any(_RESUME in COMMANDS[word].options for word in words[:1] if word in COMMANDS)
        print(f"interrupted; {'go on with --resume' if resumes else 'run the same command again to go on'}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except ModuleNotFoundError as error:
        if "preprocess" not in words[:2] or (error.name or "mllmrec_jax").startswith("mllmrec_"):
            raise
        print(f"error: preprocess needs {error.name}, which is not installed: pip install 'mllmrec-jax[preprocess]'", file=sys.stderr)
        sys.exit(2)
    except (ValueError, RuntimeError, OSError) as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith("mllmrec_"):
            raise
        abort_distributed(str(error), 2)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
