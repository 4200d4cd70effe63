"""The stages on a cluster of two Ray nodes on this machine; workers die and a node goes while they run."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from mllmrec_jax.config import ConfigError, RunConfig
from mllmrec_jax.data.records import DataError
from mllmrec_jax.preprocess.run import run_preprocess
from mllmrec_jax.preprocess.runner import open_runner
from mllmrec_jax.preprocess.samples import PictureFile
from mllmrec_jax.preprocess.store import Store
from mllmrec_jax.preprocess_config import ImageConfig, PreprocessConfig, RayConfig

from .kill_preprocess import read_outputs

# Nothing is asked of the network, and workers start as few threads as they can.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_DISABLE_IMPORT_WARNING="1", RAY_DEDUP_LOGS="0", RAY_enable_metrics_collection="0")
ray = pytest.importorskip("ray", reason="needs Ray (extra `ray`)")
cluster_utils = pytest.importorskip("ray.cluster_utils")
# Ray starts its daemons by fork and exec, which warns where an earlier test of this process has used JAX's threads.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")]

from mllmrec_jax.preprocess.ray_runner import RayRunner  # noqa: E402


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    node = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
    made = cluster_utils.Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    made.add_node(**node)
    yield made
    made.shutdown()


def open_changed(path: Path) -> np.ndarray:
    return np.asarray(PictureFile(path, "0" * 64, ImageConfig())())


class Deadly:
    """A backend that its process does not always survive."""

    def write(self, numbers: list[int]) -> Iterator[int]:
        if 7 in numbers:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from numbers


def test_order_errors_and_a_batch_that_kills_every_worker(cluster: Any, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "1.jpg")
    with RayRunner(RayConfig(workers=2, restarts=1, batch=3), cluster.address) as runner:
        assert list(runner.spread(abs, range(-9, 1))) == list(range(9, -1, -1))
        with pytest.raises(ConfigError, match="expected the picture that was there when the run began"):
            list(runner.spread(open_changed, [tmp_path / "1.jpg"]))
        calls = runner._pool.call("deadly", ray.put(Deadly), "write", (([number],) for number in range(10)))
        found: list[int] = []
        with pytest.raises(DataError, match="started again up to 1 times, got ActorDied"):
            found.extend(number for _, answers in calls for number in answers)
        assert 7 not in found and set(range(5)) <= set(found)


def test_what_cannot_be_is_refused(cluster: Any) -> None:
    with (
        pytest.raises(ConfigError, match="expected a cluster with room for a worker"),
        open_runner("ray", PreprocessConfig(ray=RayConfig(gpus_per_worker=1)), cluster.address),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="--address: expected a Ray cluster at 'localhost:1', got"),
        open_runner("ray", PreprocessConfig(), "localhost:1"),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="--address: expected it with --runner ray"),
        open_runner("local", PreprocessConfig(), cluster.address),
    ):
        pass


def find_workers() -> list[psutil.Process]:
    """Ray's processes below this one that hold our workers."""
    return [child for child in psutil.Process().children(recursive=True) if child.name().startswith("ray::_Worker")]


def test_killed_workers_and_a_lost_node_leave_the_same_bytes(
    config: RunConfig, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = run_preprocess(dataclasses.replace(config, output=tmp_path / "here/runs", cache=tmp_path / "here/cache"))
    killed: set[int] = set()

    def kill_worker() -> None:
        worker = find_workers()[0]
        worker.send_signal(signal.SIGKILL)
        killed.add(worker.pid)

    (other,) = cluster.worker_nodes
    accidents: dict[tuple[str, int], Callable[[], None]] = {
        ("caption", 10): kill_worker,
        ("pseudo_cot", 10): partial(cluster.remove_node, other, allow_graceful=False),
        ("refine_cot", 10): kill_worker,
        ("vectors", 20): kill_worker,
    }
    happened: list[tuple[str, int]] = []
    put = Store.put

    def put_and_see(store: Store, key: str, value: Any) -> None:
        put(store, key, value)
        event = (store.folder.name, len(store))
        if event in accidents and event not in happened:
            happened.append(event)
            accidents[event]()

    monkeypatch.setattr(Store, "put", put_and_see)
    preprocess = dataclasses.replace(config.preprocess, ray=RayConfig(workers=3, batch=4))
    there = dataclasses.replace(config, output=tmp_path / "there/runs", cache=tmp_path / "there/cache", preprocess=preprocess)
    with open_runner("ray", preprocess, cluster.address) as runner:
        report = run_preprocess(there, runner=runner)
        again = run_preprocess(there, runner=runner, until="refine_cot")
    assert happened == list(accidents) and len(killed) == 3
    assert report["chain"] == here["chain"]
    wanted = read_outputs(tmp_path / "here")
    assert wanted and read_outputs(tmp_path / "there") == wanted
    for stage in ("caption", "pseudo_cot", "refine_cot"):  # nothing lost, nothing stored twice
        assert report["stages"][stage]["done"] == report["stages"][stage]["wanted"] == here["stages"][stage]["done"]
        assert again["stages"][stage]["done"] == 0
        (part,) = (there.cache / "preprocess" / stage).iterdir()
        keys = [json.loads(line)["entry"][0] for line in part.read_text().splitlines()]
        assert len(keys) == len(set(keys)) == report["stages"][stage]["done"]
