"""The same GRPO step here and on the peers, in turn, so that a machine that drifts favours none: one table, one JSON.

    python profiling/peers/compare.py --tunix ENV_TUNIX --trl ENV_TRL --rounds 3 --json profiling/results/peer_tiny_cpu.json

Each round starts every trainer once, in a process of its own; a trainer's number is the median over rounds of its median in a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parents[1] / "configs" / "bench" / "peer_tiny.toml"
PHASES = ("generate_s", "update_s", "step_s")


def run_round(commands: dict[str, list[str]], folder: Path) -> dict[str, dict[str, Any]]:
    """Each trainer's row, one after the other."""
    rows = {}
    for name, command in commands.items():
        path = folder / f"{name}.json"
        print(f"{name} ...", file=sys.stderr, flush=True)
        subprocess.run([*command, "--json", str(path)], check=True, stdout=subprocess.DEVNULL, cwd=folder)
        rows[name] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def summarise_rounds(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Seconds by trainer and phase (median over rounds of p50), and the peers' as multiples of ours (`x`, median over rounds)."""
    table: dict[str, dict[str, float]] = {}
    for name in rounds[0]:
        table[name] = {phase: statistics.median(rows[name][phase]["p50"] for rows in rounds) for phase in PHASES}
        for phase in PHASES:
            ratios = [rows[name][phase]["p50"] / rows["mllmrec-jax"][phase]["p50"] for rows in rounds]
            table[name][f"{phase} x"] = statistics.median(ratios)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tunix", type=Path, help="environment of make_env.sh; not given: left out")
    parser.add_argument("--trl", type=Path, help="environment of make_env.sh; not given: left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a peer in a round; ours are four times as many")
    parser.add_argument("--json", type=Path, required=True, help="file of all rows and the table")
    options = parser.parse_args()
    commands = {"mllmrec-jax": [sys.executable, "-m", "mllmrec_jax.cli", "bench", "step", "--config", str(CONFIG)]}
    commands["mllmrec-jax"] += ["--repeats", str(4 * options.steps)]
    for name in ("tunix", "trl"):
        environment = getattr(options, name)
        if environment is not None:
            python = (environment / "bin" / "python").absolute()
            if not python.exists():
                sys.exit(f"error: --{name}: expected an environment of profiling/peers/make_env.sh, found no {python}")
            commands[name] = [str(python), str(HERE / f"{name}_step.py"), "--steps", str(options.steps)]
    with tempfile.TemporaryDirectory() as folder:
        rounds = [run_round(commands, Path(folder)) for _ in range(options.rounds)]
    table = summarise_rounds(rounds)
    print(f"{'':12} {'generation':>18} {'update':>18} {'step':>18}")
    for name, row in table.items():
        print(f"{name:12} " + " ".join(f"{row[phase]:9.3f} s {row[f'{phase} x']:5.1f} x" for phase in PHASES))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"benchmark": "peers", "table": table, "rounds": rounds}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
