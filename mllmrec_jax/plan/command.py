"""`mllmrec plan MODEL --devices N --memory 80GB [options] [overrides of the run]`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import tyro

from mllmrec_jax.config import ConfigError, RunConfig, check_config, to_dict
from mllmrec_jax.plan.devices import Device, find_device, list_devices, read_measured
from mllmrec_jax.plan.models import read_shapes, resolve_model

DESCRIPTION = """Which mesh, micro-batch and rematerialisation fit, with memory by owner and the predicted time of a GRPO step.
MODEL: a run's TOML file or shipped config, a folder with a config.json, or a public shape (%s).
Every option of a run can follow (--grpo.group-size 16 --prompt.max-prompt-tokens 2048): the prompts of a step are
grpo.batch_size x grpo.accumulation. Nothing is run and no weights are read."""
NOTHING_FITS = 1
_UNITS = {"": 1e9, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> float:
    """Bytes of `80GB`, `16GiB`, or `80` (GB).

    Raises:
      ConfigError: anything else.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else ""
    if match is None or unit not in _UNITS or not float(match[1]) > 0:
        raise ConfigError(f"--memory: expected a size such as 80GB or 16GiB, got {text!r}")
    return float(match[1]) * _UNITS[unit]


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mllmrec plan",
        description=DESCRIPTION % ", ".join(read_shapes()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="configuration, folder or shape")
    parser.add_argument("--devices", type=int, required=True, help="number of chips")
    parser.add_argument("--memory", help="of one chip: 80GB, 16GiB; not given: the device's")
    parser.add_argument("--device", default="h100", help=f"whose ceilings and links: {', '.join(list_devices())} (default h100)")
    parser.add_argument("--measured", type=Path, help="ceilings from `mllmrec bench roofline --json FILE` in place of the data sheet's")
    parser.add_argument("--interconnect", type=float, help="GB/s a chip receives, within and between hosts; not given: the device's")
    parser.add_argument("--headroom", type=float, default=0.08, help="share of memory left free for the runtime (default 0.08)")
    parser.add_argument("--top", type=int, default=8, help="layouts shown, one a mesh (default 8)")
    parser.add_argument("--compile", action="store_true", help="compile the best layout for virtual CPU devices and show XLA's memory")
    parser.add_argument("--json", type=Path, help="file for the whole result")
    return parser


def read_options(argv: Sequence[str]) -> tuple[argparse.Namespace, RunConfig, Device]:
    """Options, the run with its overrides, and the device.

    Raises:
      ConfigError: one of them is wrong.
    """
    options, rest = _make_parser().parse_known_args(list(argv))
    if options.devices < 1:
        raise ConfigError(f"--devices: expected at least 1, got {options.devices}")
    if not 0 <= options.headroom < 1:
        raise ConfigError(f"--headroom: expected a share from 0 to 1, got {options.headroom}")
    if options.interconnect is not None and not options.interconnect > 0:
        raise ConfigError(f"--interconnect: expected GB/s above 0, got {options.interconnect}")
    if options.top < 1:
        raise ConfigError(f"--top: expected at least 1, got {options.top}")
    device = find_device(options.device)
    if options.measured is not None:
        device = read_measured(options.measured, device)
    if options.interconnect is not None:
        device = dataclasses.replace(device, link=options.interconnect * 1e9, network=options.interconnect * 1e9)
    if options.memory is not None:
        device = dataclasses.replace(device, memory=parse_bytes(options.memory))
    base = resolve_model(options.model)
    if base.model.weights is None and base.sft.mode == "lora":
        # Random weights are all a plan has: SFT, which it does not look at, must not object to them.
        base = dataclasses.replace(base, sft=dataclasses.replace(base.sft, mode="full"))
    config = tyro.cli(RunConfig, default=base, args=rest, prog="mllmrec plan MODEL --devices N", description=DESCRIPTION % "")
    config = check_config(config, options.model)
    needed = config.prompt.max_prompt_tokens + config.grpo.max_new_tokens
    if needed > config.model.max_position:
        raise ConfigError(
            f"prompt.max_prompt_tokens: expected prompt and completion within {config.model.max_position}, got {needed} tokens"
        )
    return options, config, device


def plan(argv: Sequence[str]) -> int:
    """Does what the words after `mllmrec plan` say; returns the exit status: 1 where nothing fits.

    Raises:
      ConfigError: options, model or overrides are wrong.
    """
    options, config, device = read_options(argv)
    if options.compile:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={options.devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"  # shapes alone: an accelerator is not touched
    from mllmrec_jax.data.atomic import write_file
    from mllmrec_jax.plan.report import describe_result, format_result
    from mllmrec_jax.plan.search import keep_best, list_changes, search_layouts

    candidates = search_layouts(config, options.devices, device)
    if not candidates:
        total = config.grpo.batch_size * config.grpo.accumulation
        raise ConfigError(
            f"--devices {options.devices}: no mesh divides {total} prompts a step (grpo.batch_size x grpo.accumulation), "
            f"{config.model.num_kv_heads} key/value heads, hidden size {config.model.hidden_size}, intermediate size "
            f"{config.model.intermediate_size} and {config.tokenizer.vocab_size} tokens; "
            f"give a multiple of {options.devices} prompts with --grpo.batch-size"
        )
    usable = math.floor(device.memory * (1 - options.headroom))
    fitting = keep_best(candidates, lambda candidate: candidate.memory.peak <= usable)
    changes = [] if fitting else list_changes(config, options.devices)
    compiled = None
    if options.compile and fitting:
        from mllmrec_jax.plan.programs import compile_step
        from mllmrec_jax.sharding import make_mesh

        compiled = compile_step(fitting[0].config, make_mesh(fitting[0].mesh))
    result = describe_result(config, device, options.devices, usable, candidates, fitting, changes, compiled)
    print(format_result(result, top=options.top))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_file(options.json, (json.dumps(result | {"config": to_dict(config)}, indent=2) + "\n").encode())
    return 0 if fitting else NOTHING_FITS
