from __future__ import annotations

from pathlib import Path

import pytest

from mllmrec_jax.preprocess.store import Store, hash_content

KEYS = [hash_content("some work", number) for number in range(40)]


def fill(folder: Path, count: int) -> None:
    with Store(folder) as store:
        for number in range(count):
            store.put(KEYS[number], {"text": f"täxt {number}\n", "usage": {"tokens": number}})


def test_values_come_back_in_another_process_of_reading(tmp_path: Path) -> None:
    fill(tmp_path, 10)
    with Store(tmp_path) as store:
        assert len(store) == 10 and store.damaged == 0
        assert store.get(KEYS[7]) == {"text": "täxt 7\n", "usage": {"tokens": 7}}
        assert KEYS[10] not in store
        with pytest.raises(KeyError):
            store.get(KEYS[10])


def test_value_is_there_before_the_store_is_closed(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.put(KEYS[0], "kept")
        with Store(tmp_path) as other:
            assert other.get(KEYS[0]) == "kept"


def test_second_value_of_a_key_is_not_written(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.put(KEYS[0], "first")
        store.put(KEYS[0], "second")
        assert store.get(KEYS[0]) == "first"
    assert len((tmp_path / "part-00000.jsonl").read_bytes().splitlines()) == 1


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_torn_last_line_is_dropped_and_its_work_done_again(tmp_path: Path, cut: int) -> None:
    fill(tmp_path, 5)
    part = tmp_path / "part-00000.jsonl"
    part.write_bytes(part.read_bytes()[:-cut])
    with Store(tmp_path) as store:
        assert len(store) == 4 and store.damaged == 1 and KEYS[4] not in store
        store.put(KEYS[4], "again")
    with Store(tmp_path) as store:
        assert len(store) == 5 and store.get(KEYS[4]) == "again" and store.get(KEYS[3])["usage"] == {"tokens": 3}


def test_damaged_line_is_dropped_and_the_others_are_read(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    part = tmp_path / "part-00000.jsonl"
    part.write_bytes(part.read_bytes().replace(b'"tokens": 2', b'"tokens": 9'))
    with Store(tmp_path) as store:
        assert len(store) == 4 and store.damaged == 1 and KEYS[2] not in store and KEYS[3] in store


def test_line_cut_at_its_end_does_not_swallow_the_next_writer(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    part = tmp_path / "part-00000.jsonl"
    part.write_bytes(part.read_bytes()[:-1])  # all but the line break
    fill(tmp_path, 4)
    with Store(tmp_path) as store:
        assert all(key in store for key in KEYS[:4])


def test_two_writers_have_a_part_each(tmp_path: Path) -> None:
    with Store(tmp_path) as one, Store(tmp_path) as other:
        one.put(KEYS[0], "one")
        other.put(KEYS[1], "other")
        one.put(KEYS[2], "one")
    with Store(tmp_path) as store:
        assert [store.get(key) for key in KEYS[:3]] == ["one", "other", "one"]


def test_key_depends_on_every_part_and_on_nothing_else() -> None:
    assert hash_content({"b": 1, "a": [2]}) == hash_content({"a": [2], "b": 1})
    assert len({hash_content("a", "b"), hash_content("ab"), hash_content("b", "a"), hash_content(["a", "b"])}) == 4
