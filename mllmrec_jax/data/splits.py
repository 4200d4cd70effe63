"""Which interactions train, which are held out, and the windows (history, target) made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from mllmrec_jax.config import DataConfig
from mllmrec_jax.data.records import DataError, Dataset, History


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """One prediction task: `target` is item number `position` (from 0) of the user's sequence, `history` the items just before it."""

    user: int
    history: tuple[int, ...]
    target: int
    position: int


@dataclasses.dataclass(frozen=True)
class Splits:
    """What trains, as histories, and what is held out, as windows.

    `train_histories` holds all that training (see `cut_windows`) and floors may read: whole sequences of training users, or the part of
    every user's sequence before what is held out. `left_out_users` had too few interactions; they are in no part.
    """

    train_histories: tuple[History, ...]
    valid: tuple[Window, ...]
    test: tuple[Window, ...]
    left_out_users: int


def _window(history: History, position: int, history_len: int) -> Window:
    past = history.items[max(0, position - history_len) : position]
    return Window(history.user, past, history.items[position], position)


def _last_windows(histories: Iterable[History], config: DataConfig) -> tuple[Window, ...]:
    return tuple(_window(history, len(history.items) - 1, config.history_len) for history in histories)


def _cut(history: History, length: int) -> History:
    times = None if history.times is None else history.times[:length]
    return dataclasses.replace(history, items=history.items[:length], times=times)


def _split_by_user(histories: Sequence[History], config: DataConfig) -> tuple[list[History], list[History], list[History]]:
    order = np.random.default_rng(config.split_seed).permutation(len(histories))
    train_share, valid_share, _ = config.split_ratios
    train_end = round(train_share * len(histories))
    valid_end = round((train_share + valid_share) * len(histories))
    shuffled = [histories[index] for index in order]
    return shuffled[:train_end], shuffled[train_end:valid_end], shuffled[valid_end:]


def _split_given(histories: Sequence[History]) -> tuple[list[History], list[History], list[History]]:
    homeless = next((history for history in histories if history.part is None), None)
    if homeless is not None:
        raise DataError(f"split = 'given' expects files that name each user's part, got user {homeless.user} without one; use 'by_user'")
    train, valid, test = ([history for history in histories if history.part == part] for part in ("train", "valid", "test"))
    return train, valid, test


def _split_leave_one_out(histories: Sequence[History], config: DataConfig) -> tuple[list[History], list[Window], list[Window]]:
    """The last item tests, the one before it validates, the rest trains; short sequences give what they can."""
    train = [_cut(history, len(history.items) - 2) for history in histories if len(history.items) > 2]
    valid = [_window(history, len(history.items) - 2, config.history_len) for history in histories if len(history.items) > 2]
    return train, valid, list(_last_windows(histories, config))


def _split_global_time(histories: Sequence[History], config: DataConfig) -> tuple[list[History], list[Window], list[Window]]:
    """Two moments cut all interactions into shares `split_ratios`; each user's last interaction of a period is its target.

    Interactions at the very moment of a cut belong to the later period, so nothing in training is as late as anything held out.
    """
    untimed = next((history for history in histories if history.times is None), None)
    if untimed is not None:
        raise DataError(f"split = 'global_time' expects times, got user {untimed.user} without any; use 'by_user' or 'leave_one_out'")
    times = np.sort(np.concatenate([np.asarray(history.times, np.int64) for history in histories]))
    train_share, valid_share, _ = config.split_ratios
    cuts = [times[min(len(times) - 1, round(share * len(times)))] for share in (train_share, train_share + valid_share)]
    train, valid, test = [], [], []
    for history in histories:
        train_end, valid_end = (int(end) for end in np.searchsorted(np.asarray(history.times), cuts, side="left"))
        if train_end:
            train.append(_cut(history, train_end))
        for windows, start, end in ((valid, train_end, valid_end), (test, valid_end, len(history.items))):
            if end > start and end > 1:
                windows.append(_window(history, end - 1, config.history_len))
    return train, valid, test


def split_windows(dataset: Dataset, config: DataConfig) -> Splits:
    """Splits a data set; what is held out becomes windows of 1 to `history_len` history items and a target.

    Users with fewer than max(2, `min_interactions`) interactions are left out and counted: a window needs a past and a target.
    `by_user` (the paper's) permutes the remaining users, in file order, with `numpy.random.default_rng(split_seed)`; the first share
    trains and the last tests. `given` follows the files' own parts. In both, the target of a held-out user is the last item.

    Args:
      dataset: checked records.
      config: `split`, `split_ratios`, `split_seed`, `history_len`, `min_interactions`.

    Returns:
      The parts. `valid` may be empty (few users, or files without it); `test` may not, nor training of histories with two items.

    Raises:
      DataError: no user is long enough, a part that is needed came out empty, or the split needs times or parts that are not there.
    """
    shortest = max(2, config.min_interactions)
    histories = [history for history in dataset.histories if len(history.items) >= shortest]
    left_out = len(dataset.histories) - len(histories)
    if not histories:
        longest = max((len(history.items) for history in dataset.histories), default=0)
        raise DataError(f"{dataset.name}: expected users with at least {shortest} interactions, got at most {longest} in {left_out} users")
    if config.split in ("by_user", "given"):
        train, valid_users, test_users = _split_by_user(histories, config) if config.split == "by_user" else _split_given(histories)
        valid, test = _last_windows(valid_users, config), _last_windows(test_users, config)
    elif config.split == "leave_one_out":
        train, valid, test = _split_leave_one_out(histories, config)
    else:
        train, valid, test = _split_global_time(histories, config)
    for part, content in (("train", any(len(history.items) > 1 for history in train)), ("test", test)):
        if not content:
            raise DataError(f"{dataset.name}: split '{config.split}' leaves no {part} windows of {len(histories)} users; give more users")
    return Splits(tuple(train), tuple(valid), tuple(test), left_out)


def cut_windows(
    histories: Sequence[History], *, kind: Literal["last", "all", "cover"], history_len: int, seed: Sequence[int] = (0,)
) -> tuple[Window, ...]:
    """Training windows of users' whole training sequences.

    Args:
      histories: each of at least two items to give a window.
      kind: "last": a user's last item is the target (the paper's); "all": every item with one before it is; "cover": as few windows as
        put every item into one, for training with a loss on the history: targets stand `history_len` apart, from a random place on, and
        the last item is one.
      history_len: most items before the target.
      seed: of "cover"'s random places.
    """
    rng = np.random.default_rng(list(seed))
    windows = []
    for history in histories:
        last = len(history.items) - 1
        if last < 1:
            continue
        if kind == "last":
            positions: Iterable[int] = (last,)
        elif kind == "all":
            positions = range(1, last + 1)
        else:
            first = int(rng.integers(1, history_len + 1))
            positions = sorted({*range(first, last, history_len), last})
        windows.extend(_window(history, position, history_len) for position in positions)
    return tuple(windows)


def full_pasts(windows: Iterable[Window], dataset: Dataset) -> list[tuple[int, ...]]:
    """Everything each window's user did before the target, oldest first: what an unlimited memory would see."""
    sequences = {history.user: history.items for history in dataset.histories}
    return [sequences[window.user][: window.position] for window in windows]
