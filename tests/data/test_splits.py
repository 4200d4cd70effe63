"""Splits: nothing held out is in training, windows are what the sequences say, and the paper's numbers of users."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmrec_jax.config import DataConfig
from mllmrec_jax.data.records import DataError, Dataset, History, Item, Part, make_dataset
from mllmrec_jax.data.splits import cut_windows, full_pasts, split_windows


def make_users(lengths: list[int], *, timed: bool = False, part: Part | None = None) -> Dataset:
    """Users with the items 1, 2, ... in an order of their own; user u's interaction i is at time 10 i + u."""
    width = max(lengths)
    histories = []
    for user, length in enumerate(lengths):
        items = tuple((user + step) % width + 1 for step in range(length))
        times = tuple(10 * step + user for step in range(length)) if timed else None
        histories.append(History(user, items, times, part=part))
    return make_dataset("toy", [Item(item, f"Title {item}") for item in range(1, width + 1)], histories)


@given(st.lists(st.integers(2, 12), min_size=10, max_size=40), st.integers(0, 5))
def test_by_user_parts_are_disjoint_and_complete(lengths: list[int], seed: int):
    dataset = make_users(lengths)
    splits = split_windows(dataset, DataConfig(split_seed=seed))
    train, valid, test = ({entry.user for entry in part} for part in (splits.train_histories, splits.valid, splits.test))
    assert len(train) + len(valid) + len(test) == len(lengths) == len(train | valid | test)
    assert abs(len(train) - 0.7 * len(lengths)) <= 0.5
    for window in (*splits.valid, *splits.test):
        items = dataset.histories[window.user].items
        assert (*window.history, window.target) == items[-9:]
        assert window.position == len(items) - 1


def test_leave_one_out_trains_on_what_comes_before_both_targets():
    dataset = make_users([2, 3, 6])
    splits = split_windows(dataset, DataConfig(split="leave_one_out"))
    assert [(w.user, w.target) for w in splits.test] == [(h.user, h.items[-1]) for h in dataset.histories]
    assert [(w.user, w.target) for w in splits.valid] == [(h.user, h.items[-2]) for h in dataset.histories[1:]]
    assert [(h.user, h.items) for h in splits.train_histories] == [(h.user, h.items[:-2]) for h in dataset.histories[1:]]


def test_global_time_trains_on_nothing_as_late_as_a_held_out_target():
    dataset = make_users([4, 9, 12, 15, 3], timed=True)
    splits = split_windows(dataset, DataConfig(split="global_time"))
    times = {history.user: history.times for history in dataset.histories}
    latest_train = max(history.times[-1] for history in splits.train_histories if history.times)
    moments = [[times[w.user][w.position] for w in part] for part in (splits.valid, splits.test)]  # type: ignore[index]
    assert latest_train < min(moments[0]) <= max(moments[0]) < min(moments[1])
    total = sum(len(history.items) for history in dataset.histories)
    assert sum(len(history.items) for history in splits.train_histories) == pytest.approx(0.7 * total, abs=2)


def test_global_time_needs_times():
    with pytest.raises(DataError, match="'global_time' expects times, got user 0 without any"):
        split_windows(make_users([5, 5]), DataConfig(split="global_time"))


def test_short_users_are_left_out_and_counted():
    lengths = [1, 5, 5, 5, 5, 5, 3, 1, 5, 5]
    assert split_windows(make_users(lengths), DataConfig()).left_out_users == 2
    assert split_windows(make_users(lengths), DataConfig(min_interactions=1)).left_out_users == 2  # a window needs two
    assert split_windows(make_users(lengths), DataConfig(min_interactions=5)).left_out_users == 3


def test_nothing_left_is_an_error_that_says_why():
    with pytest.raises(DataError, match="expected users with at least 2 interactions, got at most 1 in 2 users"):
        split_windows(make_users([1, 1]), DataConfig())
    with pytest.raises(DataError, match="split 'given' leaves no test windows of 3 users"):
        split_windows(make_users([5, 5, 5], part="train"), DataConfig(split="given"))
    with pytest.raises(DataError, match="split 'leave_one_out' leaves no train windows"):
        split_windows(make_users([3, 3]), DataConfig(split="leave_one_out"))


@given(st.integers(2, 40), st.integers(1, 9), st.integers(0, 9))
def test_windows_are_slices_of_the_sequence(length: int, history_len: int, seed: int):
    history = make_users([length]).histories[0]
    for kind in ("last", "all", "cover"):
        windows = cut_windows([history], kind=kind, history_len=history_len, seed=[seed])
        for window in windows:
            start = max(0, window.position - history_len)
            assert window.history == history.items[start : window.position] != ()
            assert window.target == history.items[window.position]
        assert windows[-1].position == length - 1
        positions = [window.position for window in windows]
        assert positions == sorted(set(positions))
        if kind == "all":
            assert positions == list(range(1, length))
        if kind == "cover":
            assert {item for window in windows for item in (*window.history, window.target)} == set(history.items)
            assert len(windows) <= length // history_len + 2


def test_cover_moves_with_the_seed_only():
    histories = make_users([30] * 20).histories
    first, again, other = (cut_windows(histories, kind="cover", history_len=8, seed=[seed]) for seed in (0, 0, 1))
    assert first == again != other


def test_full_pasts_reach_beyond_the_window():
    dataset = make_users([20] * 10)
    test = split_windows(dataset, DataConfig()).test
    for window, past in zip(test, full_pasts(test, dataset), strict=True):
        assert len(past) == 19
        assert past[-8:] == window.history


def test_single_item_histories_give_no_training_window():
    history = make_users([3]).histories[0]
    assert cut_windows([dataclasses.replace(history, items=history.items[:1])], kind="all", history_len=8) == ()
