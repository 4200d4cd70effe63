"""Candidate lists: never anything the user chose, the right distribution, frozen on disk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmrec_jax.data.candidates import CandidateSet, draw_candidates, load_candidates, locate_targets, save_candidates
from mllmrec_jax.data.records import DataError, Dataset, History, Item, make_dataset
from mllmrec_jax.data.splits import Window, cut_windows


def make_random(items: int, users: int, longest: int, seed: int = 0) -> Dataset:
    """Users with random histories over items with ids 3, 6, 9, ...; low ids are chosen more often."""
    rng = np.random.default_rng(seed)
    ids = 3 * np.arange(1, items + 1)
    weights = 1 / np.arange(1, items + 1)
    histories = []
    for user in range(users):
        chosen = rng.choice(ids, size=int(rng.integers(2, longest + 1)), replace=False, p=weights / weights.sum())
        histories.append(History(100 + user, tuple(chosen.tolist())))
    return make_dataset("toy", [Item(int(item), f"T{item}") for item in ids], histories)


def windows_of(dataset: Dataset) -> tuple[Window, ...]:
    return cut_windows(dataset.histories, kind="all", history_len=8)


@settings(max_examples=25, deadline=None)
@given(st.integers(16, 60), st.integers(1, 9), st.sampled_from(["uniform", "popularity"]), st.integers(0, 3))
def test_rows_hold_the_target_once_and_nothing_else_the_user_chose(items: int, negatives: int, sampling, seed: int):
    dataset = make_random(items, users=20, longest=4, seed=seed)
    windows = windows_of(dataset)
    if sampling == "popularity":  # only items somebody chose can be drawn
        negatives = min(negatives, len({item for history in dataset.histories for item in history.items}) - 4)
    candidates = draw_candidates(windows, dataset, negatives=negatives, sampling=sampling, seed=seed).candidates
    assert candidates.shape == (len(windows), negatives + 1)
    chosen = {history.user: set(history.items) for history in dataset.histories}
    for window, row in zip(windows, candidates.tolist(), strict=True):
        assert len(set(row)) == len(row)
        assert set(row) & chosen[window.user] == {window.target}
        assert set(row) <= set(dataset.items)


def test_a_user_with_just_enough_items_left_gets_them_all_and_one_fewer_is_an_error():
    dataset = make_dataset("toy", [Item(i, f"T{i}") for i in range(1, 13)], [History(7, tuple(range(1, 10)))])
    windows = cut_windows(dataset.histories, kind="last", history_len=8)
    row = draw_candidates(windows, dataset, negatives=3, sampling="uniform", seed=0).candidates[0]
    assert sorted(row.tolist()) == [9, 10, 11, 12]
    with pytest.raises(DataError, match=r"at least 4 items that user 7 never interacted with \(uniform negatives\), got 3; ask for fewer"):
        draw_candidates(windows, dataset, negatives=4, sampling="uniform", seed=0)
    with pytest.raises(DataError, match=r"at least 1 items that user 7 .* \(popularity negatives\), got 0"):
        draw_candidates(windows, dataset, negatives=1, sampling="popularity", seed=0)


@pytest.mark.parametrize("longest", [5, 35])  # 35 of 40 items chosen: most draws are rejected, rows are completed one by one
def test_uniform_draws_are_uniform_over_what_the_user_never_chose(longest: int):
    ids = list(range(1, 41))
    dataset = make_dataset("toy", [Item(i, f"T{i}") for i in ids], [History(1, tuple(ids[:longest]))])
    window = cut_windows(dataset.histories, kind="last", history_len=8)[0]
    draws = draw_candidates([window] * 4000, dataset, negatives=3, sampling="uniform", seed=1)
    counts = np.bincount(draws.candidates.ravel(), minlength=41)[longest + 1 :]
    expected = 4000 * 3 / (40 - longest)
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


@pytest.mark.parametrize("negatives", [1, 2, 3])
def test_popularity_draws_follow_successive_sampling(negatives: int):
    """User 0 may be shown items 1..4, chosen by 8, 4, 2, 1 others; the law of k draws without replacement is enumerated."""
    weights = {1: 8, 2: 4, 3: 2, 4: 1}
    others = [History(10 * item + n, (item,)) for item, count in weights.items() for n in range(count)]
    dataset = make_dataset("toy", [Item(i, f"T{i}") for i in range(1, 7)], [History(0, (5, 6)), *others])
    window = cut_windows(dataset.histories[:1], kind="last", history_len=8)[0]
    draws = draw_candidates([window] * 20_000, dataset, negatives=negatives, sampling="popularity", seed=3).candidates

    def inclusion(taken: tuple[int, ...], probability: float, totals: dict[int, float]) -> dict[int, float]:
        left = {item: weight for item, weight in weights.items() if item not in taken}
        for item, weight in left.items():
            share = probability * weight / sum(left.values())
            totals[item] += share
            if len(taken) + 1 < negatives:
                inclusion((*taken, item), share, totals)
        return totals

    expected = inclusion((), 1.0, dict.fromkeys(weights, 0.0))
    for item, share in expected.items():
        assert (draws == item).any(axis=1).mean() == pytest.approx(share, abs=0.015)


def test_targets_stand_anywhere():
    dataset = make_random(60, users=400, longest=8)
    windows = windows_of(dataset)
    columns = locate_targets(windows, draw_candidates(windows, dataset, negatives=9, sampling="uniform", seed=0).candidates)
    counts = np.bincount(columns, minlength=10)
    assert np.abs(counts - len(windows) / 10).max() < 5 * np.sqrt(len(windows) / 10)


def test_lists_depend_on_seed_and_resample_alone():
    dataset = make_random(60, users=30, longest=8)
    windows = windows_of(dataset)
    draws = [
        draw_candidates(windows, dataset, negatives=9, sampling="uniform", seed=seed, resample=copy).content_hash
        for seed, copy in [(0, 0), (0, 0), (1, 0), (0, 1), (-1, 0)]
    ]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 4


def test_strange_windows_are_refused():
    dataset = make_random(30, users=3, longest=4)
    with pytest.raises(DataError, match="expected windows of its users, got user 5"):
        draw_candidates([Window(5, (3,), 6, 1)], dataset, negatives=2, sampling="uniform", seed=0)
    with pytest.raises(DataError, match="got the unknown item 4"):
        draw_candidates([Window(100, (3,), 4, 1)], dataset, negatives=2, sampling="uniform", seed=0)
    with pytest.raises(DataError, match="row 0: expected the target 6 once, got 0 times"):
        locate_targets([Window(100, (3,), 6, 1)], np.array([[3, 9]]))


@pytest.fixture
def frozen(tmp_path: Path) -> tuple[Path, tuple[Window, ...], CandidateSet]:
    dataset = make_random(60, users=30, longest=8)
    windows = windows_of(dataset)
    candidate_set = draw_candidates(windows, dataset, negatives=9, sampling="uniform", seed=0)
    save_candidates(tmp_path / "lists.npz", candidate_set, windows, provenance={"data": dataset.content_hash, "seed": 0})
    return tmp_path / "lists.npz", windows, candidate_set


def test_lists_come_back_as_they_were(frozen):
    path, windows, candidate_set = frozen
    provenance = {"data": make_random(60, users=30, longest=8).content_hash, "seed": 0}
    back = load_candidates(path, windows, provenance=provenance)
    np.testing.assert_array_equal(back.candidates, candidate_set.candidates)
    assert back.content_hash == candidate_set.content_hash
    assert os.listdir(path.parent) == [path.name]
    with pytest.raises(DataError, match=r"drawn for other data: .* \(differs in seed\)"):
        load_candidates(path, windows, provenance={**provenance, "seed": 1})
    with pytest.raises(DataError, match="drawn for other windows"):
        load_candidates(path, windows[:-1], provenance=provenance)
    with pytest.raises(DataError, match="cannot be read"):
        load_candidates(path.with_name("absent"), windows, provenance=provenance)


def test_damage_is_noticed(frozen):
    path, windows, candidate_set = frozen
    provenance = {"data": make_random(60, users=30, longest=8).content_hash, "seed": 0}
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:300] + bytes([whole[300] ^ 1]) + whole[301:], b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"damaged|content hash"):
            load_candidates(path, windows, provenance=provenance)
    other = CandidateSet(candidate_set.candidates[::-1], candidate_set.content_hash)
    save_candidates(path, other, windows, provenance=provenance)
    with pytest.raises(DataError, match="got other content"):
        load_candidates(path, windows, provenance=provenance)
