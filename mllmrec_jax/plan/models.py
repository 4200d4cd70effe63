"""What `mllmrec plan MODEL` means by MODEL: a run's configuration, a Hugging Face folder, or the name of a public shape."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import json
import tempfile
from pathlib import Path
from typing import Any

from mllmrec_jax.config import ConfigError, RunConfig, load_config
from mllmrec_jax.model.hf_config import read_model_config
from mllmrec_jax.resources import find_config, list_configs


def read_shapes() -> dict[str, dict[str, Any]]:
    """The public shapes by name, each as the content of its config.json (and `card`, its parameters in billions)."""
    table = json.loads((importlib.resources.files("mllmrec_jax.plan") / "shapes.json").read_text(encoding="utf-8"))
    return {name: table["shared"] | shape for name, shape in table["shapes"].items()}


def _fill_sizes(config: RunConfig, folder: Path) -> RunConfig:
    """`config` with the sizes of `folder`/config.json; weights themselves are never read."""
    model, vocabulary = read_model_config(folder, config.model)
    tokenizer = dataclasses.replace(config.tokenizer, vocab_size=vocabulary, item_tokens=False)
    return dataclasses.replace(config, model=dataclasses.replace(model, weights=None), tokenizer=tokenizer)


def resolve_model(name: str) -> RunConfig:
    """The run to plan; `tokenizer.vocab_size` is the model's vocabulary. Shapes and folders come with the defaults of every other option.

    Raises:
      ConfigError: `name` is none of the three, or describes a model that cannot be run.
    """
    shapes = read_shapes()
    if name in shapes:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(shapes[name]), encoding="utf-8")
            return _fill_sizes(dataclasses.replace(RunConfig(), name=name), Path(folder))
    if Path(name).is_dir():
        return _fill_sizes(dataclasses.replace(RunConfig(), name=Path(name).name), Path(name))
    try:
        config = load_config(find_config(name))
    except ConfigError as error:
        if Path(name).suffix == ".toml" or Path(name).is_file() or name in list_configs():
            raise
        known = [*shapes, *list_configs()]
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"; nearest: '{nearest[0]}'" if nearest else ""
        raise ConfigError(
            f"{name}: expected a TOML file, a folder with a config.json, a shipped config or a shape of {', '.join(shapes)}, got none{hint}"
        ) from error
    return config if config.model.weights is None else _fill_sizes(config, config.model.weights)
