from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path

import pytest

from mllmrec_jax.config import DataConfig, PosterworldConfig, PromptConfig, RunConfig, SftConfig
from mllmrec_jax.preprocess_config import EmbedConfig, MixConfig, PreprocessConfig

# The room's packages are an extra of their own.
collect_ignore_glob = [] if find_spec("torch") and find_spec("rapidfuzz") else ["*"]


def tiny_config(folder: Path, *, items: int = 40, users: int = 50) -> RunConfig:
    """A small posterworld with all stages on, everything below `folder`."""
    config = RunConfig(name="tiny", output=folder / "runs", cache=folder / "cache", sft=SftConfig(mode="full"))
    world = PosterworldConfig(items=items, users=users, min_length=6, max_length=10)
    return dataclasses.replace(
        config,
        data=DataConfig(posterworld=world, history_len=5, negatives=4),
        prompt=PromptConfig(reasoning=True, history_fields=("title", "caption"), max_prompt_tokens=2048),
        preprocess=PreprocessConfig(
            embed=EmbedConfig(steps=30, dimension=16, batch_size=16, held_out=0.25), mix=MixConfig(sft_fraction=0.4, grpo_fraction=0.2)
        ),
    )


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return tiny_config(tmp_path)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The configuration of a run that is done; only to be read."""
    from mllmrec_jax.preprocess.run import run_preprocess

    config = tiny_config(tmp_path_factory.mktemp("whole"))
    run_preprocess(config)
    return config
