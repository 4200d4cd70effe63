"""The work the peer trainers are timed on: profiling/peers/peer_work.py (a folder of scripts, not a package)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "profiling" / "peers" / "peer_work.py"


@pytest.fixture(scope="module")
def peer_work() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peer_work", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peer_work"] = module
    spec.loader.exec_module(module)
    return module


def test_config_of_the_same_sizes_passes_and_another_size_is_refused(peer_work: ModuleType, tmp_path: Path) -> None:
    config = tmp_path / "peer.toml"
    config.write_text("[model]\nnum_layers = 4\n[grpo]\ngroup_size = 8\n[grpo.lora]\nrank = 16\n")
    peer_work.check_config(peer_work.PeerWork(), config)
    config.write_text("[grpo.lora]\nrank = 8\n")
    with pytest.raises(ValueError, match=r"peer\.toml: grpo\.lora\.rank: expected 16.*got 8"):
        peer_work.check_config(peer_work.PeerWork(), config)


@pytest.mark.skipif(not (SCRIPT.parents[2] / "configs" / "bench" / "peer_tiny.toml").exists(), reason="no configs/bench/peer_tiny.toml")
def test_the_repository_config_is_the_peers_work(peer_work: ModuleType) -> None:
    peer_work.check_config(peer_work.PeerWork())


def test_prompts_are_full_width_and_free_of_special_tokens(peer_work: ModuleType) -> None:
    work = peer_work.PeerWork()
    prompts = peer_work.make_prompts(work, 3, first_id=2)
    assert prompts.shape == (3, work.prompts, work.prompt_tokens)
    assert prompts.min() >= 2 and prompts.max() < work.vocab_size
    assert len(np.unique(prompts.reshape(-1, work.prompt_tokens), axis=0)) == 3 * work.prompts


def test_row_leaves_out_the_warm_up_and_splits_each_step(peer_work: ModuleType) -> None:
    row = peer_work.make_row(
        "peer",
        peer_work.PeerWork(),
        {},
        ["numpy"],
        step_s=[90.0, 2.0, 4.0, 3.0],
        generate_s=[50.0, 1.5, 1.0, 2.0],
        cpu_s=[100.0, 4.0, 8.0, 6.0],
        warmup=1,
    )
    assert row["step_s"]["p50"] == 3.0 and row["generate_s"]["p50"] == 1.5 and row["update_s"]["p50"] == 1.0
    assert row["cpu_s"]["p50"] == 6.0 and row["first_step_s"] == 90.0 and row["steps"] == 3


def test_row_refuses_steps_without_their_generation(peer_work: ModuleType) -> None:
    with pytest.raises(ValueError, match="got 1 generations in 2 steps"):
        peer_work.make_row("peer", peer_work.PeerWork(), {}, [], step_s=[1.0, 1.0], generate_s=[1.0], cpu_s=[1.0, 1.0], warmup=0)


def test_table_is_of_medians_within_rounds() -> None:
    """A machine that is twice as slow in one round changes no ratio."""
    path = SCRIPT.with_name("compare.py")
    spec = importlib.util.spec_from_file_location("compare_peers", path)
    assert spec is not None and spec.loader is not None
    compare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compare)

    def make_round(slow: float) -> dict[str, dict[str, dict[str, float]]]:
        ours, theirs = ({phase: {"p50": slow * seconds} for phase in compare.PHASES} for seconds in (0.5, 4.0))
        return {"mllmrec-jax": ours, "trl": theirs}

    table = compare.summarise_rounds([make_round(1.0), make_round(2.0), make_round(1.0)])
    assert table["trl"]["step_s x"] == 8 and table["trl"]["step_s"] == 4 and table["mllmrec-jax"]["update_s x"] == 1
