"""Finds the configurations that ship with the project: in the clone, in an editable install and in a wheel."""

from __future__ import annotations

import difflib
from pathlib import Path

from mllmrec_jax.config import ConfigError

_PACKAGE = Path(__file__).resolve().parent


def find_configs_folder() -> Path | None:
    """The folder of shipped configs: inside an installed wheel, else beside the package in the clone; None where neither is."""
    clone = _PACKAGE.parent
    if (_PACKAGE / "_configs").is_dir():
        return _PACKAGE / "_configs"
    # A bare `configs` folder beside an installed package (in site-packages) would be somebody else's.
    return clone / "configs" if (clone / "pyproject.toml").is_file() and (clone / "configs").is_dir() else None


def list_configs() -> dict[str, Path]:
    """Shipped configs by name (`quickstart`, `ml1m/cpu_small`), sorted."""
    folder = find_configs_folder()
    paths = sorted(folder.rglob("*.toml")) if folder else []
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths if folder}


def find_config(name_or_path: str | Path) -> Path:
    """The file behind a `mllmrec` command's CONFIG argument.

    Args:
      name_or_path: a file (which wins), or the name of a shipped config, with or without `configs/` before and `.toml` after
        it, so that the command in a config's first line works from any folder.

    Raises:
      ConfigError: neither a file nor a shipped config; the message lists the shipped ones.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = list_configs()
    name = path.as_posix().removeprefix("configs/").removesuffix(".toml")
    if name in shipped:
        return shipped[name]
    nearest = difflib.get_close_matches(name, shipped, n=1)
    hint = f"; nearest: '{nearest[0]}'" if nearest else ""
    raise ConfigError(
        f"{name_or_path}: expected a TOML file or a shipped config, got neither{hint}; shipped: {', '.join(shipped) or 'none'}"
    )
