"""Metrics of a stage, to JSONL and TensorBoard, without waiting for the device."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter


class MetricsLog:
    """Appends one row a step to `<folder>/<stage>.jsonl` and to TensorBoard under `<folder>/tensorboard/<stage>`.

    On resume, rows at or past `start_step` (written after the checkpoint that is resumed from) are dropped, so that each step stands once.
    """

    def __init__(self, folder: Path, stage: str, *, start_step: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{stage}.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] < start_step] if start_step else []
        self._file = self.path.open("w", encoding="utf-8")
        for row in kept:
            self._file.write(json.dumps(row) + "\n")
        self._board = SummaryWriter(str(folder / "tensorboard" / stage), purge_step=start_step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()

    def write(self, step: int, values: dict[str, Any]) -> dict[str, float]:
        """Writes one row of scalars (device scalars are read here); returns them as floats. Values that are not finite become null."""
        row = {name: float(np.asarray(value)) for name, value in values.items()}
        plain = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._file.write(json.dumps({"step": step, **plain}) + "\n")
        self._file.flush()
        for name, value in row.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, step)
        return row


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line cut short by a kill is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows
