"""The same work here and on the peers, in turn, so that a machine that drifts favours none: a table a work, one JSON.

    python profiling/peers/compare.py --trl ENV_TRL --tunix ENV_TUNIX --work step rollout rank update --json peers.json

Each round starts every program once, in a process of its own; a number is the median over rounds of the median in a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parents[1] / "configs" / "bench" / "peer_tiny.toml"
OURS = "mllmrec-jax"


class Line(NamedTuple):
    """A line of a work's table."""

    program: str
    """Whose result of a round it is read from."""
    read: Callable[[dict[str, Any]], dict[str, float]]
    """From that result to median seconds by phase."""


class Work(NamedTuple):
    """What is timed on every contestant. The first line of the table is ours, and the others are multiples of it."""

    phases: dict[str, str]
    """Name in the JSON to the head of the column."""
    ours: list[str]
    """Arguments of `mllmrec bench`, without repeats."""
    repeats: int
    """Measured repeats of ours for each measured step of a peer: ours are quicker."""
    peers: dict[str, tuple[str, list[str]]]
    """Program to its environment (`trl`, `tunix`) and the script with its arguments."""
    lines: dict[str, Line]


def read_phases(*phases: str) -> Callable[[dict[str, Any]], dict[str, float]]:
    """Of a peer's row, and of the document of `bench step`, which has them in the same place."""
    return lambda result: {phase: result[phase]["p50"] for phase in phases}


def find_row(document: dict[str, Any], name: str, **fields: Any) -> dict[str, Any]:
    """The row of a document of `mllmrec bench` that has this name and these fields.

    Raises:
        ValueError: there is not exactly one.
    """
    rows = [row for row in document["rows"] if row["name"] == name and all(row.get(key) == value for key, value in fields.items())]
    if len(rows) != 1:
        raise ValueError(f"bench {document['benchmark']}: expected one row {name!r} with {fields}, got {len(rows)}")
    return rows[0]


def read_row(phase: str, name: str, **fields: Any) -> Callable[[dict[str, Any]], dict[str, float]]:
    """Of a document of `mllmrec bench`: the seconds of one row are the phase's."""
    return lambda document: {phase: find_row(document, name, **fields)["p50"]}


def read_user(name: str) -> Callable[[dict[str, Any]], dict[str, float]]:
    """Of the document of `bench rank`: seconds a user, since its rows are of a batch of users, or of one."""
    return lambda document: {"user_s": 1 / find_row(document, name)["users_per_s"]}


STEP = ("generate_s", "update_s", "step_s")
WORKS = {
    "step": Work(
        phases=dict(zip(STEP, ("generation", "update", "step"), strict=True)),
        ours=["step"],
        repeats=4,
        peers={"tunix": ("tunix", ["tunix_step.py"]), "trl": ("trl", ["trl_step.py"])},
        lines={name: Line(name, read_phases(*STEP)) for name in (OURS, "tunix", "trl")},
    ),
    "rollout": Work(
        phases={"rollout_s": "rollout"},
        ours=["rollout"],
        repeats=4,
        peers={
            "hf generate": ("trl", ["hf_generate.py"]),
            "hf generate, prompt once": ("trl", ["hf_generate.py", "--prompt", "shared", "--cache", "dynamic"]),
        },
        lines={
            OURS: Line(OURS, read_row("rollout_s", "rollout")),
            "hf generate": Line("hf generate", read_phases("rollout_s")),
            "hf generate, prompt once": Line("hf generate, prompt once", read_phases("rollout_s")),
        },
    ),
    "rank": Work(
        phases={"user_s": "a user"},
        ours=["rank"],
        repeats=2,
        peers={"hf, a generation a K": ("trl", ["hf_rank.py"])},
        lines={
            OURS: Line(OURS, read_user("rank")),
            f"{OURS}, a generation a K": Line(OURS, read_user("generate_per_k")),
            "hf, a generation a K": Line("hf, a generation a K", read_phases("user_s")),
        },
    ),
    # Ours against itself with each prompt repeated G times. A curve has two points at least; the configuration's is read. The policy's
    # forward pass is made here: taken from a rollout, a part of the update would hide in a generation that is not shown.
    "update": Work(
        phases={"update_s": "update"},
        ours=["scaling", "--over", "group_size", "--values", "4,8", "--grpo.no-reuse-rollout"],
        repeats=1,
        peers={},
        lines={
            OURS: Line(OURS, read_row("update_s", "update", group_size=8, layout="shared")),
            "prompts repeated": Line(OURS, read_row("update_s", "update", group_size=8, layout="repeated")),
        },
    ),
}


def check_same_work(work: str, rows: dict[str, dict[str, Any]]) -> None:
    """Refuses to compare what is not the same work.

    Args:
        work: key of WORKS.
        rows: a round's results by program.

    Raises:
        ValueError: a size of ours differs from a peer's.
    """
    if "shapes" not in rows[OURS]:  # a curve has many; no peer has one
        return
    ours = {key: rows[OURS]["shapes"][key] for key in ("prompt_tokens", "group_size", "new_tokens", "vocabulary")}
    if work == "rank":
        ours["cutoffs"] = find_row(rows[OURS], "generate_per_k")["shape"]["cutoffs"]
    else:
        ours["prompts"] = rows[OURS]["shapes"]["prompts"]
    for name in rows.keys() - {OURS}:
        theirs = rows[name]["work"] | {"new_tokens": rows[name]["work"]["max_new_tokens"], "vocabulary": rows[name]["work"]["vocab_size"]}
        if work == "rank":
            theirs["group_size"] = theirs["negatives"] + 1
        for size, value in ours.items():
            if theirs[size] != value:
                raise ValueError(f"{work}: {size}: expected {name}'s to be ours, {value}, got {theirs[size]}")


def run_round(commands: dict[str, list[str]], folder: Path) -> dict[str, dict[str, Any]]:
    """Each program's result, one after the other."""
    rows = {}
    for name, command in commands.items():
        path = folder / "result.json"
        path.unlink(missing_ok=True)
        print(f"{' '.join(command[1:])} ...", file=sys.stderr, flush=True)
        subprocess.run([*command, "--json", str(path)], check=True, stdout=subprocess.DEVNULL, cwd=folder)
        rows[name] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def read_round(work: Work, rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median seconds by line and phase; a line whose program was left out is left out."""
    return {name: line.read(rows[line.program]) for name, line in work.lines.items() if line.program in rows}


def summarise_rounds(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Seconds by line and phase (median over rounds), and the peers' as multiples of ours (`x`, median over rounds)."""
    table: dict[str, dict[str, float]] = {}
    for name, phases in rounds[0].items():
        table[name] = {phase: statistics.median(seconds[name][phase] for seconds in rounds) for phase in phases}
        for phase in phases:
            table[name][f"{phase} x"] = statistics.median(seconds[name][phase] / seconds[OURS][phase] for seconds in rounds)
    return table


def format_table(work: Work, table: dict[str, dict[str, float]]) -> str:
    """A line a contestant: seconds and multiples of ours by phase; of users also how many a second."""
    width = max(map(len, table))
    users = "user_s" in work.phases
    lines = [" ".join([f"{'':{width}}", *(f"{head:>20}" for head in work.phases.values())]) + ("  users a second" if users else "")]
    for name, row in table.items():
        cells = [f"{row[phase]:9.4f} s {row[f'{phase} x']:6.1f} x" for phase in work.phases]
        lines.append(" ".join([f"{name:{width}}", *cells]) + (f"{1 / row['user_s']:16.3g}" if users else ""))
    return "\n".join(lines)


def describe_cores(rounds: list[dict[str, dict[str, Any]]]) -> list[str]:
    """A line a peer: how many cores it had in each round, from its processor seconds. Far under all of them, the machine was busy."""
    lines = []
    for name in rounds[0].keys() - {OURS}:
        rows = [rows[name] for rows in rounds]
        whole = [next(row[phase] for phase in ("step_s", "rollout_s", "user_s") if phase in row) for row in rows]
        cores = ", ".join(f"{row['cpu_s']['p50'] / seconds['p50']:.1f}" for row, seconds in zip(rows, whole, strict=True))
        lines.append(f"{name}: {cores} of {rows[0]['machine']['cpus']} cores")
    return sorted(lines)


def make_commands(work: Work, *, steps: int, environments: dict[str, Path | None]) -> dict[str, list[str]]:
    """Command by program, ours first; a peer without an environment is left out.

    Raises:
        FileNotFoundError: an environment has no interpreter.
    """
    ours = [sys.executable, "-m", "mllmrec_jax.cli", "bench", *work.ours, "--config", str(CONFIG)]
    commands = {OURS: [*ours, "--repeats", str(work.repeats * steps)]}
    for name, (needed, (script, *arguments)) in work.peers.items():
        environment = environments.get(needed)
        if environment is None:
            continue
        python = (environment / "bin" / "python").absolute()
        if not python.exists():
            raise FileNotFoundError(f"--{needed}: expected an environment of profiling/peers/make_env.sh, found no {python}")
        commands[name] = [str(python), str(HERE / script), *arguments, "--steps", str(steps)]
    return commands


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tunix", type=Path, help="environment of make_env.sh; not given: left out")
    parser.add_argument("--trl", type=Path, help="environment of make_env.sh, which the hf_*.py use too; not given: left out")
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=["step"], help="what is timed, in turn in every round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a peer in a round; ours are up to four times as many")
    parser.add_argument("--json", type=Path, required=True, help="file of all rows and the tables")
    options = parser.parse_args()
    works = {name: WORKS[name] for name in dict.fromkeys(options.work)}
    environments = {"tunix": options.tunix, "trl": options.trl}
    try:
        commands = {name: make_commands(work, steps=options.steps, environments=environments) for name, work in works.items()}
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    rounds: dict[str, list[dict[str, dict[str, Any]]]] = {name: [] for name in works}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name in works:
                rows = run_round(commands[name], Path(folder))
                check_same_work(name, rows)
                rounds[name].append(rows)
    found = {}
    for name, work in works.items():
        table = summarise_rounds([read_round(work, rows) for rows in rounds[name]])
        found[name] = {"table": table, "rounds": rounds[name]}
        print("\n".join([name, format_table(work, table), *describe_cores(rounds[name]), ""]))
    # A step's table and rounds stand where they stood before there was other work.
    document = {"benchmark": "peers", **found.pop("step", {}), **found}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
