"""Metrics on disk: JSON lines and TensorBoard say the same, and a resumed stage's rows stand once."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import jax.numpy as jnp
from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]

from mllmrec_jax.train.metrics_log import MetricsLog, read_metrics


def read_board(folder: Path) -> list[Event]:
    """Events of every file, oldest first; a record is a length (8 bytes), its checksum (4), the event, its checksum (4)."""
    events = []
    for path in sorted(folder.iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            events.append(Event.FromString(content[place + 12 : place + 12 + length]))
            place += length + 16
    return events


def test_resumed_rows_stand_once(tmp_path: Path):
    with MetricsLog(tmp_path, "sft") as log:
        for step in range(4):
            log.write(step, {"loss": jnp.float32(step), "kl": math.nan})
    with MetricsLog(tmp_path, "sft", start_step=2) as log:
        assert log.write(2, {"loss": 9.0}) == {"loss": 9.0}
    rows = read_metrics(tmp_path / "sft.jsonl")
    assert rows == [{"step": 0, "loss": 0.0, "kl": None}, {"step": 1, "loss": 1.0, "kl": None}, {"step": 2, "loss": 9.0}]
    events = read_board(tmp_path / "tensorboard" / "sft")
    assert [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value] == [
        *((step, "loss", step) for step in range(4)),
        (2, "loss", 9),
    ]
    starts = [event.step for event in events if event.HasField("session_log")]
    assert starts == [0, 2]  # TensorBoard drops what came before at or past these


def test_a_row_cut_short_by_a_kill_is_left_out(tmp_path: Path):
    with MetricsLog(tmp_path, "grpo") as log:
        log.write(0, {"loss": 1.0})
    with (tmp_path / "grpo.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    with MetricsLog(tmp_path, "grpo", start_step=1) as log:
        log.write(1, {"loss": 2.0})
    assert [row["loss"] for row in read_metrics(tmp_path / "grpo.jsonl")] == [1.0, 2.0]
