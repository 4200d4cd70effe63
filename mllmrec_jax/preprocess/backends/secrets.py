"""A key that got among the settings by mistake is refused before anything repeats the settings."""

from __future__ import annotations

import re

from mllmrec_jax.config import ConfigError
from mllmrec_jax.preprocess_config import OpenaiConfig


def check_secrets(config: OpenaiConfig) -> None:
    """Refuses what may be a secret, without repeating it.

    Raises:
      ConfigError: `base_url` holds a user or password, or `api_key_env` is not the name of a variable.
    """
    if "@" in config.base_url:
        raise ConfigError("preprocess.openai.base_url: expected a URL without user and password; name a key in api_key_env")
    if not re.fullmatch(r"([A-Z_][A-Z0-9_]*)?", config.api_key_env):
        raise ConfigError("preprocess.openai.api_key_env: expected the name of an environment variable in capitals, got something else")
