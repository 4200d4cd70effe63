"""Fitted exponents and the values they are fitted over."""

from __future__ import annotations

import pytest

from mllmrec_jax.bench.scaling import OVER, choose_values, fit_exponent, resize
from mllmrec_jax.bench.work import find_sizes
from mllmrec_jax.cli import SCALED
from mllmrec_jax.config import RunConfig, check_config, load_config
from mllmrec_jax.resources import find_config


def test_powers_are_found() -> None:
    xs = [2.0, 4.0, 8.0, 32.0]
    assert fit_exponent(xs, [3 * x**1.5 for x in xs]) == pytest.approx(1.5)
    assert fit_exponent(xs, [7.0] * 4) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("over", OVER)
def test_every_size_can_be_changed_alone(over: str) -> None:
    config = load_config(find_config("bench/peer_tiny"))
    values = choose_values(config, over)  # type: ignore[arg-type]
    assert len(values) >= 3
    for value in values:
        changed = check_config(resize(config, over, value))  # type: ignore[arg-type]
        sizes = find_sizes(changed)._asdict() | {"batch_size": changed.grpo.batch_size, "layers": changed.model.num_layers}
        before = find_sizes(config)._asdict() | {"batch_size": config.grpo.batch_size, "layers": config.model.num_layers}
        assert sizes[over] == value
        same = {"prompts"} if over == "batch_size" else set()
        assert {name for name in sizes if sizes[name] != before[name]} <= {over, *same}
        assert changed.model.max_position >= sizes["prompt_tokens"] + sizes["new_tokens"]


def test_the_command_line_names_what_can_be_changed() -> None:
    assert SCALED == OVER
    assert find_sizes(RunConfig()).group_size == RunConfig().grpo.group_size
