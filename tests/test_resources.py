from __future__ import annotations

from pathlib import Path

import pytest

from mllmrec_jax import resources
from mllmrec_jax.config import ConfigError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty `mllmrec_jax` folder that `resources` takes for its own, in an empty working directory."""
    package = tmp_path / "root" / "mllmrec_jax"
    package.mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(resources, "_PACKAGE", package)
    return package


def write_configs(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / f"{name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")


@pytest.mark.parametrize("name", ["quickstart", "quickstart.toml", "configs/quickstart.toml", "configs/quickstart"])
def test_shipped_config_is_found_by_name_in_a_clone(package: Path, name: str) -> None:
    write_configs(package.parent / "configs", "quickstart")
    (package.parent / "pyproject.toml").write_text("")
    assert resources.find_config(name) == package.parent / "configs" / "quickstart.toml"


def test_shipped_config_is_found_by_name_in_a_wheel(package: Path) -> None:
    write_configs(package / "_configs", "quickstart", "ml1m/cpu_small")
    assert resources.find_config("ml1m/cpu_small") == package / "_configs" / "ml1m" / "cpu_small.toml"
    assert list(resources.list_configs()) == ["ml1m/cpu_small", "quickstart"]


def test_existing_file_wins_over_a_shipped_name(package: Path) -> None:
    write_configs(package / "_configs", "quickstart")
    Path("quickstart").write_text("# mine\n")
    assert resources.find_config("quickstart") == Path("quickstart")


def test_folder_of_a_shipped_name_does_not_hide_it(package: Path) -> None:
    write_configs(package / "_configs", "quickstart")
    Path("quickstart").mkdir()
    assert resources.find_config("quickstart") == package / "_configs" / "quickstart.toml"


def test_configs_folder_beside_an_installed_package_is_not_ours(package: Path) -> None:
    write_configs(package.parent / "configs", "quickstart")
    assert resources.find_configs_folder() is None
    with pytest.raises(ConfigError, match="shipped: none"):
        resources.find_config("quickstart")


def test_unknown_name_lists_what_is_shipped_and_the_nearest(package: Path) -> None:
    write_configs(package / "_configs", "quickstart", "ml1m/cpu_small")
    with pytest.raises(ConfigError, match=r"quickstrat: expected .* nearest: 'quickstart'; shipped: ml1m/cpu_small, quickstart"):
        resources.find_config("quickstrat")


def test_name_cannot_leave_the_folder(package: Path) -> None:
    write_configs(package / "_configs", "quickstart")
    write_configs(package.parent, "secret")
    with pytest.raises(ConfigError):
        resources.find_config("../secret")


def test_this_clone_ships_its_configs() -> None:
    configs = Path(__file__).resolve().parents[1] / "configs"
    assert list(resources.list_configs().values()) == sorted(configs.rglob("*.toml"))
