from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mllmrec_jax.preprocess.hashes import Hashes
from mllmrec_jax.preprocess.key_table import KeyTable
from mllmrec_jax.preprocess.store import Store, hash_content, hash_rows

KEYS = [hash_content(number) for number in range(300)]


def test_table_is_a_dict_of_places() -> None:
    table, expected = KeyTable(), {}
    for place, key in enumerate([*KEYS[:100], *KEYS[50:150]]):
        assert table.add(key, 3, place) == (key not in expected)
        expected.setdefault(key, (3, place))
    assert table.fill((key, 4, 0) for key in KEYS[140:200]) == 50
    assert len(table) == 200 and [table.find(key) for key in KEYS[:150]] == list(expected.values())
    assert table.find(KEYS[199]) == (4, 0) and table.find(KEYS[200]) is None


def test_full_disk_says_where() -> None:
    table = KeyTable()
    table._rows.execute("PRAGMA max_page_count = 8")
    with pytest.raises(OSError, match=r"disk is full; expected room in SQLite's temporary folder \(SQLITE_TMPDIR"):
        table.fill((hash_content(number), 0, 0) for number in range(5000))


def test_killed_process_leaves_no_file(tmp_path: Path) -> None:
    code = (
        "import sys, time; from mllmrec_jax.preprocess.key_table import KeyTable; from mllmrec_jax.preprocess.store import hash_content\n"
        "table = KeyTable(); table.fill((hash_content(n), 0, n) for n in range(100_000)); print('full', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "SQLITE_TMPDIR": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None and child.stdout.readline() == "full\n"
    written = [file for file in psutil.Process(child.pid).open_files() if file.path.startswith(str(tmp_path))]
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert list(tmp_path.iterdir()) == [] and len(written) <= 1


def test_memory_of_a_store_does_not_grow_with_what_is_in_it(tmp_path: Path) -> None:
    process = psutil.Process()
    with Store(tmp_path) as store:
        for number in range(20_000):
            store.put(hash_content(number), number)
        before = process.memory_info().rss
        for number in range(20_000, 80_000):
            store.put(hash_content(number), number)
        assert process.memory_info().rss - before < 8e6  # a dictionary of as many keys took 15 MB
        assert len(store) == 80_000 and store.get(hash_content(70_000)) == 70_000


def test_hashes_are_a_list_of_hashes() -> None:
    hashes = Hashes(2)
    hashes[1] = KEYS[0]
    hashes.append(KEYS[1])
    hashes.append("")
    assert list(hashes) == ["", KEYS[0], KEYS[1], ""] and hashes[1:3] == KEYS[:2]
    with pytest.raises(IndexError, match="expected 0 to 3, got 4"):
        hashes[4]


def test_hash_of_rows_depends_on_each_and_on_their_order() -> None:
    assert len({hash_rows(rows, "start") for rows in ([1, 2], [2, 1], [[1, 2]], [1], [])} | {hash_rows([1, 2], "other")}) == 6
    assert hash_rows(iter([1, 2]), "start") == hash_rows([1, 2], "start")
