"""Rules of the layout, read off the syntax trees: nothing is imported here, so a broken module cannot hide another's fault."""

from __future__ import annotations

import ast
import importlib.metadata
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module imports only from its own room and from rooms before it.
ROOMS = (
    "schema",
    "preprocess_config",
    "config",
    "resources",
    "progress",
    "pages",
    "distributed",
    "prompts",
    "data",
    "preprocess",
    "prepare",
    "sharding",
    "model",
    "rewards",
    "objectives",
    "generate",
    "checkpoint",
    "train",
    "evaluate",
    "baselines",
    "provenance",
    "pipeline",
    "compiled",
    "communication",
    "bench",
    "profiler",
    "plan",
    "cli",
)
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}


def list_sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def read_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def find_imports(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything a module of `package` imports, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def find_room(path: Path) -> str:
    """`data` for mllmrec_jax/data/records.py, `cli` for mllmrec_jax/cli.py."""
    return path.relative_to(ROOT / "mllmrec_jax").parts[0].removesuffix(".py")


def find_layout_faults(path: Path, tree: ast.Module) -> list[str]:
    faults = []
    room = find_room(path)
    package = path.relative_to(ROOT).parts[:-1]
    for line, name in find_imports(tree, package):
        parts = name.split(".")
        where = f"{path.relative_to(ROOT)}:{line}"
        torch_allowed = room == "preprocess" or path == ROOT / "mllmrec_jax" / "model" / "hf_weights.py"
        if parts[0] in {"torch", "torchvision"} and not torch_allowed:
            faults.append(f"{where}: torch belongs in preprocess/ and model/hf_weights.py only")
        if parts[0] == "tests" or parts[0] == "conftest":
            faults.append(f"{where}: imports from the tests")
        if parts[0] != "mllmrec_jax" or len(parts) < 2 or parts[1].startswith("__"):
            continue
        if parts[1] not in ROOMS:
            faults.append(f"{where}: '{name}' is in no known room; put it in ROOMS, in its place")
        elif room in ROOMS and ROOMS.index(parts[1]) > ROOMS.index(room):
            faults.append(f"{where}: '{room}' imports from '{parts[1]}', which comes after it")
    return faults


@pytest.mark.parametrize("path", list_sources("mllmrec_jax"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    room = find_room(path)
    assert room in (*ROOMS, "__init__", "__main__"), f"{path}: unknown room '{room}'; put it in ROOMS, in its place"
    assert not find_layout_faults(path, read_tree(path))


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("data/records.py", "from mllmrec_jax.model import qwen3", "which comes after it"),
        ("data/records.py", "from mllmrec_jax import train", "which comes after it"),
        ("data/records.py", "def f():\n    import mllmrec_jax.cli", "which comes after it"),
        ("data/records.py", "from ..train import loop", "which comes after it"),
        ("data/records.py", "from mllmrec_jax.helpers import x", "no known room"),
        ("model/lora.py", "import torch.nn", "torch belongs"),
        ("train/loop.py", "from mllmrec_jax.data.records import Item\nfrom . import state\nfrom mllmrec_jax import __version__", None),
        ("model/hf_weights.py", "import torch", None),
    ],
)
def test_import_rule_sees(file: str, source: str, fault: str | None) -> None:
    faults = find_layout_faults(ROOT / "mllmrec_jax" / file, ast.parse(source))
    assert (fault is None and not faults) or (fault is not None and len(faults) == 1 and fault in faults[0]), faults


@pytest.mark.parametrize("path", list_sources("kernels"), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_stand_alone(path: Path) -> None:
    package = path.relative_to(ROOT / "kernels").parts[:-1]
    names = [name.split(".")[0] for _, name in find_imports(read_tree(path), package)]
    assert not {"mllmrec_jax", "torch"} & set(names)


def test_folders_that_share_a_published_name_are_no_packages() -> None:
    # transformers imports the published package `kernels`, and Python 3.15 has a standard `profiling`: ours must not be found instead.
    for folder in ("kernels", "profiling", "launch", "configs", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_tests_hold_no_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))  # --import-mode=importlib: basenames may repeat


def test_every_package_folder_has_an_init() -> None:
    for path in list_sources("mllmrec_jax", "kernels/mllmrec_kernels", "launch/mllmrec_launch"):
        assert (path.parent / "__init__.py").is_file(), (
            f"{path.parent.relative_to(ROOT)} lacks __init__.py: the wheel would hold a namespace"
        )


def find_forbidden(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for line, name in find_imports(tree, ("mllmrec_jax",)):
        if name.split(".")[0] in PICKLES:
            yield line, f"import of {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "NotImplementedError":
            yield node.lineno, "NotImplementedError"
        if not isinstance(node, ast.Call):
            continue
        constants = {keyword.arg: keyword.value.value for keyword in node.keywords if isinstance(keyword.value, ast.Constant)}
        for argument in ("trust_remote_code", "allow_pickle"):
            if any(keyword.arg == argument for keyword in node.keywords) and constants.get(argument) is not False:
                yield node.lineno, f"{argument} is not the constant False"
        if ast.unparse(node.func) == "torch.load" and constants.get("weights_only") is not True:
            yield node.lineno, "torch.load without weights_only=True"


@pytest.mark.parametrize("path", list_sources("mllmrec_jax", "kernels", "launch"), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_stub_and_no_code_from_data(path: Path) -> None:
    assert not list(find_forbidden(read_tree(path)))
    with io.BytesIO(path.read_bytes()) as source:
        comments = [token for token in tokenize.tokenize(source.readline) if token.type == tokenize.COMMENT]
    assert not [token.string for token in comments if any(word in token.string for word in ("TODO", "FIXME", "XXX"))]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "torch.load(path)",
        "def f():\n    raise NotImplementedError('later')",
    ],
)
def test_forbidden_things_are_seen(source: str) -> None:
    assert len(list(find_forbidden(ast.parse(source)))) == 1


def test_safe_spellings_pass() -> None:
    source = "np.load(p, allow_pickle=False)\nfrom_pretrained(p, trust_remote_code=False)\ntorch.load(p, weights_only=True)"
    assert not list(find_forbidden(ast.parse(source)))


def test_everything_imported_is_a_declared_dependency() -> None:
    # `import spellchecker` is the distribution pyspellchecker, which only an environment that has the extra `preprocess` can tell.
    pytest.importorskip("torch", reason="an environment without the extras does not know their distributions' names")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    used = ("gpu", "preprocess", "openai", "sentence-transformers", "minilm", "ray")
    requirements = [*project["dependencies"], *(requirement for extra in used for requirement in extras[extra])]
    declared = {_normalise(re.split(r"[\[<>=!~; ]", requirement)[0]) for requirement in requirements}
    distributions = importlib.metadata.packages_distributions()
    for path in list_sources("mllmrec_jax", "kernels", "launch"):
        for line, name in find_imports(read_tree(path), ()):
            top = name.split(".")[0]
            if not top or top in sys.stdlib_module_names or top in ("mllmrec_jax", "mllmrec_kernels", "mllmrec_launch"):
                continue
            found = {_normalise(distribution) for distribution in distributions.get(top, [top])}
            assert found & declared, f"{path.relative_to(ROOT)}:{line}: '{top}' is in no dependency of pyproject.toml"


def _normalise(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
