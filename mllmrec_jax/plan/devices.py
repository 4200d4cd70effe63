"""What a chip can do: from its data sheet, or measured by `mllmrec bench roofline`."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import json
from pathlib import Path
from typing import Any

from mllmrec_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Device:
    """One chip's ceilings."""

    name: str
    flops: float
    """Of matrix products in the working dtype (FLOP/s)."""
    bandwidth: float
    """Of its memory (bytes/s)."""
    memory: float
    """Bytes."""
    link: float
    """What it receives from the other chips of its domain (bytes/s)."""
    domain: int
    """Chips that the fast links join."""
    network: float
    """What it receives from chips of other domains (bytes/s)."""
    latency: float
    """Of one collective (seconds)."""
    source: str
    shares: tuple[tuple[str, float], ...] = ()
    """Share of its ceiling that each phase was measured to reach, where it was measured."""


def _read_table() -> dict[str, Any]:
    return json.loads((importlib.resources.files("mllmrec_jax.plan") / "devices.json").read_text(encoding="utf-8"))["devices"]


def list_devices() -> list[str]:
    """Names of the devices in the table."""
    return list(_read_table())


def find_device(name: str) -> Device:
    """The device called `name` in devices.json.

    Raises:
      ConfigError: there is none.
    """
    table = _read_table()
    if name not in table:
        nearest = difflib.get_close_matches(name, table, n=1)
        hint = f"; nearest: {nearest[0]}" if nearest else ""
        raise ConfigError(f"--device: expected one of {', '.join(table)}, got {name!r}{hint}; for any other give --measured ROOFLINE.json")
    return Device(**table[name])


def read_measured(path: Path, base: Device) -> Device:
    """`base` with the ceilings and the phases' shares of them that `mllmrec bench roofline --json` wrote.

    Raises:
      ConfigError: the file is missing or is not such a result.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        ceilings = result["ceilings"]
        flops, bandwidth = float(ceilings["flops_per_s"]), float(ceilings["bytes_per_s"])
        shares = tuple((phase["name"], float(phase["share"])) for phase in result["phases"])
        name = f"{result['provenance']['device']['kind']}, measured"
    except OSError as error:
        raise ConfigError(f"--measured {path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--measured {path}: expected what `mllmrec bench roofline --json` writes, got none ({error!r})") from None
    if not (flops > 0 and bandwidth > 0 and all(share > 0 for _, share in shares)):
        raise ConfigError(f"--measured {path}: expected positive ceilings and shares, got {ceilings} and {dict(shares)}")
    return dataclasses.replace(base, name=name, flops=flops, bandwidth=bandwidth, source=str(path), shares=shares)
