"""Metrics of a stage, to JSONL and TensorBoard, without waiting for the device."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]
from tensorboardX.record_writer import RecordWriter

from mllmrec_jax.data.atomic import naming_path, write_file

BOARD_EVERY_S = 10.0
"""Seconds between flushes of the TensorBoard file."""


class MetricsLog:
    """Appends one row a step to `<folder>/<stage>.jsonl` and to TensorBoard under `<folder>/tensorboard/<stage>`.

    On resume, rows at or past `start_step` (written after the checkpoint that is resumed from) are dropped, so that each step stands once.
    Both files are written by the caller's thread: tensorboardX's own writer has a thread that dies when the disk is full, and a queue that
    then blocks for ever.

    Raises:
      OSError: a file cannot be written; rows kept from before are whole.
    """

    def __init__(self, folder: Path, stage: str, *, start_step: int = 0):
        self.path, board = folder / f"{stage}.jsonl", folder / "tensorboard" / stage
        kept = [row for row in read_metrics(self.path) if row["step"] < start_step] if start_step else []
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        board.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = RecordWriter(str(board / f"events.out.tfevents.{time.time_ns()}"))
        self._flushed = time.monotonic()
        # TensorBoard drops what an earlier process logged at or past this step.
        self._add_event(start_step, file_version="brain.Event:2")
        self._add_event(start_step, session_log=SessionLog(status=SessionLog.START))

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What stopped the stage says more than that the log of it could not be flushed.
        with naming_path(self.path.parent) if kind is None else contextlib.suppress(OSError):
            try:
                self._board.close()
            finally:
                self._file.close()

    def _add_event(self, step: int, **content: Any) -> None:
        self._board.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())

    def write(self, step: int, values: dict[str, Any]) -> dict[str, float]:
        """Writes one row of scalars (device scalars are read here); returns them as floats. Values that are not finite become null."""
        row = {name: float(np.asarray(value)) for name, value in values.items()}
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        with naming_path(self.path):
            self._file.write(json.dumps({"step": step, **dict.fromkeys(row), **finite}) + "\n")
            self._file.flush()
        with naming_path(Path(self._board.path)):
            self._add_event(step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in finite.items()]))
            if time.monotonic() - self._flushed > BOARD_EVERY_S:
                self._board.flush()
                self._flushed = time.monotonic()
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
