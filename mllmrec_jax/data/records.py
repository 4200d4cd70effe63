"""What a reader returns: items, users' histories, and the data set that holds them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

Part = Literal["train", "valid", "test"]


class DataError(ValueError):
    """Data that cannot be used; the message says where, what was expected and what was there."""


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One thing that can be recommended. Texts are as the files have them: hostile until a prompt renderer has cleaned them."""

    id: int
    title: str
    genres: tuple[str, ...] = ()
    caption: str = ""
    image: Path | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class History:
    """One user's interactions, oldest first, no item twice.

    `times` (seconds, non-decreasing) is as long as `items`, or None where the files have an order but no times. `part` is the split
    the files themselves put the user in, or None. `sft_reasoning` and `grpo_reasoning` are the traces that this user's training prompts
    show, in SFT and in GRPO.
    """

    user: int
    items: tuple[int, ...]
    times: tuple[int, ...] | None = None
    sft_reasoning: str | None = None
    grpo_reasoning: str | None = None
    part: Part | None = None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Made by `make_dataset`, which checks it.

    `histories` are in file order, one a user. `bad_rows` is how many malformed rows were skipped. `content_hash` (64 hex digits)
    covers every item's text and every history; pictures are not in it. `origin` says where the data came from and what the reader did.
    """

    name: str
    items: Mapping[int, Item]
    histories: tuple[History, ...]
    bad_rows: int
    content_hash: str
    origin: dict[str, str]


class BadRows:
    """Counts malformed rows and gives up at the first one over the limit."""

    def __init__(self, limit: int):
        self.limit = limit
        self.count = 0

    def reject(self, file: Path, line: int, *, expected: str, got: str) -> None:
        """Counts one malformed row (`line` counts from 1).

        Raises:
          DataError: `file:line: expected ..., got ...`, when more than `limit` rows are malformed.
        """
        self.count += 1
        if self.count > self.limit:
            so_far = f" ({self.count} malformed rows so far, max_bad_rows = {self.limit})" if self.limit else ""
            raise DataError(f"{file}:{line}: expected {expected}, got {got}{so_far}")


def read_text(path: Path, *, encoding: str) -> str:
    """The whole file as text, line ends as they are.

    Raises:
      DataError: the file is missing, unreadable, or not in `encoding` (the message names the line).
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: expected {encoding} text, got the byte 0x{raw[error.start]:02x}") from None


def read_rows(path: Path, *, encoding: str) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line without its end) of every line that is not blank.

    Lines end at `\\n` or `\\r\\n` only: titles may hold the other characters that `str.splitlines` would break at.
    """
    for number, line in enumerate(read_text(path, encoding=encoding).split("\n"), start=1):
        line = line.removesuffix("\r")
        if line.strip():
            yield number, line


def show_value(value: object, limit: int = 80) -> str:
    """A value for an error message: quoted, on one line, cut when long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def parse_id(text: str) -> int | None:
    """A non-negative decimal id that fits in int64, or None."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def parse_sequence(words: list[str], known: Mapping[int, Item]) -> tuple[int, ...] | tuple[str, str]:
    """Item ids of one user's row, checked against the catalogue; or what was (expected, got) where the row is malformed."""
    if not words:
        return "at least one item id after the user", "none (an empty history)"
    ids: dict[int, None] = {}
    for word in words:
        item = parse_id(word)
        if item is None:
            return "item ids that are whole numbers", show_value(word)
        if item not in known:
            return f"item ids of the catalogue ({len(known)} items)", f"the unknown item {item}"
        if item in ids:
            return "each item once in a user's history", f"item {item} twice"
        ids[item] = None
    return tuple(ids)


def hash_records(items: Iterable[Item], histories: Iterable[History]) -> str:
    """`Dataset.content_hash` of these records, in their order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.id, item.title, item.genres, item.caption]).encode() + b"\n")
    for history in histories:
        content = [history.user, history.items, history.times, history.sft_reasoning, history.part]
        if history.grpo_reasoning != history.sft_reasoning:
            content.append(history.grpo_reasoning)
        digest.update(json.dumps(content).encode() + b"\n")
    return digest.hexdigest()


def make_dataset(
    name: str, items: Iterable[Item], histories: Iterable[History], *, bad_rows: int = 0, origin: Mapping[str, str] | None = None
) -> Dataset:
    """Checks the relations between items and histories and hashes them.

    Raises:
      DataError: an item id or a user occurs twice, a history is empty, names an unknown item or one item twice, or has times that
        are not in order or not one an item; or there is no history at all.
    """
    histories = tuple(histories)
    catalogue: dict[int, Item] = {}
    for item in items:
        if item.id in catalogue:
            raise DataError(f"{name}: expected each item id once, got item {item.id} twice ({item.title!r})")
        catalogue[item.id] = item
    if not histories:
        raise DataError(f"{name}: expected users with interactions, got none")
    users: set[int] = set()
    for history in histories:
        where = f"{name}: user {history.user}"
        if history.user in users:
            raise DataError(f"{where}: expected each user once, got the user twice")
        users.add(history.user)
        if not history.items:
            raise DataError(f"{where}: expected at least one item, got an empty history")
        if len(set(history.items)) < len(history.items):
            raise DataError(f"{where}: expected each item once in a history, got a repeated item")
        unknown = next((item for item in history.items if item not in catalogue), None)
        if unknown is not None:
            raise DataError(f"{where}: expected item ids of the catalogue ({len(catalogue)} items), got the unknown item {unknown}")
        if history.times is not None:
            if len(history.times) != len(history.items):
                raise DataError(f"{where}: expected one time an item ({len(history.items)}), got {len(history.times)} times")
            if any(later < earlier for earlier, later in zip(history.times, history.times[1:], strict=False)):
                raise DataError(f"{where}: expected interactions oldest first, got times that go back")
    return Dataset(
        name=name,
        items=catalogue,
        histories=histories,
        bad_rows=bad_rows,
        content_hash=hash_records(catalogue.values(), histories),
        origin=dict(origin or {}),
    )


def find_rows(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Place of each of `wanted` (any shape) in the ascending `ids` [I >= 1], -1 where it is not there; int64."""
    rows = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    return np.where(ids[rows] == wanted, rows, -1)


def keep_chosen(items: Mapping[int, Item], histories: Iterable[History]) -> list[Item]:
    """The items that some user interacted with, in catalogue order.

    The others can never be a target, so as negatives they would only make a candidate list easier.
    """
    chosen = {item for history in histories for item in history.items}
    return [item for item in items.values() if item.id in chosen]
