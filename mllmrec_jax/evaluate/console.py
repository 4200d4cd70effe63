"""The results table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

FILE_WIDTH = 200
"""Characters a line where the output is not a terminal: more than any row takes."""
COLUMNS = ("HR@1", "HR@3", "HR@5", "NDCG@3", "NDCG@5", "MRR")


def print_table(report: Mapping[str, Any]) -> None:
    """Prints every row of `report["metrics"]` with half the width of its 95% interval, then the paired comparisons."""
    # Nothing here is markup (a name may hold brackets), and a file or pipe has no width that lines should break at.
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    table = Table("model", *(f"{name} (95%)" for name in COLUMNS))
    for name, metrics in report["metrics"].items():
        cells = []
        for column in COLUMNS:
            low, high = metrics[column]["ci95"]
            cells.append(f"{metrics[column]['mean']:.3f} ±{(high - low) / 2:.3f}")
        table.add_row(name, *cells)
    console.print(table)
    for row in report["comparisons"]:
        low, high = row["ci95"]
        console.print(
            f"{row['metric']}: {row['a']} - {row['b']} = {row['difference']:+.3f} [{low:+.3f}, {high:+.3f}], p = {row['p_holm']:.4f} (Holm)"
        )
