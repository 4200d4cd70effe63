"""`mllmrec profile`: real steps of a configuration, recorded, broken down and written to the run folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax

from mllmrec_jax.config import ConfigError, RunConfig
from mllmrec_jax.data.atomic import new_folder
from mllmrec_jax.pipeline import find_run_folder, open_mesh
from mllmrec_jax.profiler.breakdown import build_breakdown, find_windows, label_operations, match_modules
from mllmrec_jax.profiler.memory import split_memory
from mllmrec_jax.profiler.page import render_page
from mllmrec_jax.profiler.programs import Program, summarise_program
from mllmrec_jax.profiler.record import LEAST_FIRST, record_steps
from mllmrec_jax.profiler.text import render_text
from mllmrec_jax.profiler.timeline import draw_step, write_timeline
from mllmrec_jax.profiler.trace import Trace, find_trace_file, read_trace
from mllmrec_jax.profiler.work import DataSource, Stage, make_work
from mllmrec_jax.provenance import collect_provenance
from mllmrec_jax.sharding import use_mesh


def run_profile(config: RunConfig, *, stage: Stage, source: DataSource, first: int, count: int) -> Path:
    """Profiles `count` steps from step `first` on; writes and returns `output`/`name`/profile/`stage`, replacing what is there.

    Raises:
      ConfigError: a number is out of range, or model, batch and mesh do not go together.
      TraceError: the backend recorded no operations.
    """
    if first < LEAST_FIRST or count < 1:
        raise ConfigError(f"profile: expected --first of at least {LEAST_FIRST} and --steps of at least 1, got {first} and {count}")
    target = find_run_folder(config) / "profile" / stage
    made = target.with_name(f".{stage}.new")
    shutil.rmtree(made, ignore_errors=True)  # of a run that was killed
    with new_folder(made) as folder:
        _write_profile(config, stage, source, first=first, count=count, folder=folder)
    shutil.rmtree(target, ignore_errors=True)
    made.rename(target)
    return target


def _write_profile(config: RunConfig, stage: Stage, source: DataSource, *, first: int, count: int, folder: Path) -> None:
    mesh = open_mesh(config.mesh)
    with tempfile.TemporaryDirectory() as scratch, use_mesh(mesh):
        work = make_work(config, stage, source, folder=Path(scratch))
        recording = record_steps(config, stage, work, first=first, count=count, folder=folder)
        shutil.rmtree(folder / "loop")
        trace = read_trace(find_trace_file(folder / "trace"), stage=stage)
        ran = _find_used(trace, recording.programs)
        main = _find_main(trace, ran, stage)
        width = int(work.shards.prompt_length.max())
        memory = split_memory(config, work.policy, main, stage=stage, prompt_tokens=width)
    modules = [program.module for program in ran]
    labelled = label_operations(trace, modules)
    profile = {
        "name": config.name,
        "stage": stage,
        "data": source,
        "device": f"{mesh.size} {jax.devices()[0].device_kind}",
        "untraced_s": recording.untraced_s,
        "compilations": [one._asdict() for one in recording.compilations],
        "breakdown": build_breakdown(trace, modules, first=first, count=count),
        "memory": memory,
        "programs": _write_programs(folder / "programs", ran),
        "provenance": collect_provenance(config),
    }
    window = find_windows(trace.steps, first, count)[-1]
    (folder / "trace" / "phases.json.gz").write_bytes(write_timeline(trace, labelled))
    (folder / "memory.json").write_text(json.dumps(memory, indent=2) + "\n", encoding="utf-8")
    (folder / "breakdown.txt").write_text(render_text(profile), encoding="utf-8")
    (folder / "breakdown.html").write_text(render_page(profile, draw_step(trace, labelled, window)), encoding="utf-8")
    (folder / "profile.json").write_text(json.dumps(profile, indent=2) + "\n", encoding="utf-8")


def _find_used(trace: Trace, programs: list[Program]) -> list[Program]:
    """The programs that ran in the trace."""
    used = {id(module) for module in match_modules(trace.operations, [program.module for program in programs]).values()}
    return [program for program in programs if id(program.module) in used]


def _find_main(trace: Trace, programs: list[Program], stage: Stage) -> dict[str, Program]:
    """The rollout and the update: of the programs with these names, the one with the largest temporaries."""
    names = {"rollout": "jit_rollout", "update": "jit_step"} if stage == "grpo" else {"update": "jit_step"}
    found = {}
    for role, name in names.items():
        own = [program for program in programs if program.module.name == name]
        if own:
            found[role] = max(own, key=lambda program: program.memory["temp"])
    return found


def _write_programs(folder: Path, programs: list[Program]) -> list[dict[str, Any]]:
    """Writes each program's text; returns their summaries, the largest first."""
    folder.mkdir()
    summaries = []
    ordered = sorted(programs, key=lambda program: -len(program.text))
    for number, program in enumerate(ordered):
        file = f"{number:02d}-{program.module.name}.txt"
        (folder / file).write_text(program.text, encoding="utf-8")
        summaries.append({"file": f"programs/{file}", **summarise_program(program)})
    return summaries
