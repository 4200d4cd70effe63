"""Candidate lists: the target among negatives, drawn once, frozen on disk under a hash, shared by every model and floor."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mllmrec_jax.data.atomic import write_file
from mllmrec_jax.data.records import DataError, Dataset
from mllmrec_jax.data.splits import Window

_FORMAT = 1
_ROUNDS = 6  # vectorised rounds before the few unfinished rows are completed one by one
_BLOCK_ENTRIES = 1 << 19  # candidates drawn at a time: bounds the scratch memory


@dataclasses.dataclass(frozen=True)
class CandidateSet:
    """`candidates` [N, K] int64 item ids, one row a window, the target at a random place; `content_hash` covers windows and rows."""

    candidates: np.ndarray
    content_hash: str


class _Catalogue:
    """Items as indices 0..I-1 with their sampling weights, and who interacted with what."""

    def __init__(self, dataset: Dataset, sampling: Literal["uniform", "popularity"]):
        self.ids = np.fromiter(dataset.items, np.int64, len(dataset.items))
        self.ids.sort()
        lengths = [len(history.items) for history in dataset.histories]
        flat = np.fromiter((item for history in dataset.histories for item in history.items), np.int64, sum(lengths))
        chosen = np.searchsorted(self.ids, flat)
        owner = np.repeat(np.arange(len(lengths)), lengths)
        self.seen_keys = np.sort(owner * len(self.ids) + chosen)
        self.row_of_user = {history.user: row for row, history in enumerate(dataset.histories)}
        weights = np.ones(len(self.ids)) if sampling == "uniform" else np.bincount(chosen, minlength=len(self.ids)).astype(np.float64)
        self.weights = weights
        self.cumulative = np.cumsum(weights)
        positive = np.bincount(owner, weights=weights[chosen] > 0, minlength=len(lengths))
        self.available = int((weights > 0).sum()) - positive.astype(np.int64)  # items each user could be shown as negatives

    def has_seen(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        keys = users[:, None] * len(self.ids) + items
        place = np.searchsorted(self.seen_keys, keys)
        return (place < len(self.seen_keys)) & (self.seen_keys[np.minimum(place, len(self.seen_keys) - 1)] == keys)

    def draw(self, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        drawn = np.searchsorted(self.cumulative, rng.random(shape) * self.cumulative[-1], side="right")
        return np.minimum(drawn, len(self.ids) - 1)  # the product above may round up to the total


def _first_new(drawn: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """[N, M] bool: not rejected, and not equal to an earlier entry of the row."""
    order = np.argsort(drawn, axis=1, kind="stable")
    ordered = np.take_along_axis(drawn, order, axis=1)
    repeated = np.zeros_like(rejected)
    np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return ~rejected & ~repeated


def _draw_negatives(catalogue: _Catalogue, users: np.ndarray, negatives: int, rng: np.random.Generator) -> np.ndarray:
    """[N, negatives] item indices, drawn one after another without replacement among what each user never chose.

    Each row reads an endless stream of weighted draws and keeps the first new, allowed ones. Unfinished rows read on; those still
    unfinished after `_ROUNDS` are completed by drawing directly among what is left, which has the same distribution.
    """
    result = np.full((len(users), negatives), -1, np.int64)
    filled = np.zeros(len(users), np.int64)
    active = np.arange(len(users))
    for _ in range(_ROUNDS):
        fresh = catalogue.draw(rng, (len(active), negatives + 4))
        stream = np.concatenate([result[active], fresh], axis=1)
        rejected = np.concatenate([result[active] < 0, catalogue.has_seen(users[active], fresh)], axis=1)
        new = _first_new(stream, rejected)
        order = np.argsort(~new, axis=1, kind="stable")[:, :negatives]
        filled[active] = np.minimum(new.sum(axis=1), negatives)
        kept = np.take_along_axis(stream, order, axis=1)
        result[active] = np.where(np.arange(negatives) < filled[active][:, None], kept, -1)
        active = active[filled[active] < negatives]
        if not len(active):
            return result
    everything = np.arange(len(catalogue.ids))
    for row in active:
        left = ~catalogue.has_seen(users[row : row + 1], everything[None])[0] & (catalogue.weights > 0)
        left[result[row, : filled[row]]] = False
        pool = everything[left]
        weights = catalogue.weights[left]
        missing = negatives - filled[row]
        result[row, filled[row] :] = rng.choice(pool, size=missing, replace=False, p=weights / weights.sum())
    return result


def _hash_candidates(keys: np.ndarray, candidates: np.ndarray) -> str:
    digest = hashlib.sha256(f"candidates {_FORMAT} {candidates.shape}".encode())
    digest.update(np.ascontiguousarray(keys, "<i8").tobytes())
    digest.update(np.ascontiguousarray(candidates, "<i8").tobytes())
    return digest.hexdigest()


def _window_keys(windows: Sequence[Window]) -> np.ndarray:
    """[N, 3] user, position, target: what identifies a window within a data set."""
    flat = np.fromiter((value for w in windows for value in (w.user, w.position, w.target)), np.int64, 3 * len(windows))
    return flat.reshape(-1, 3)


def draw_candidates(
    windows: Sequence[Window],
    dataset: Dataset,
    *,
    negatives: int,
    sampling: Literal["uniform", "popularity"],
    seed: int,
    resample: int = 0,
) -> CandidateSet:
    """The target and `negatives` items its user never interacted with in any split, shuffled.

    Negatives are drawn among `dataset.items` one after another without replacement, uniformly or with weights equal to each item's
    number of interactions in the whole data set (so an item nobody chose is never drawn). The draw depends on `seed`, `resample`, and
    the windows themselves, and on nothing else.

    Args:
      windows: N windows of `dataset`.
      dataset: catalogue and full histories.
      negatives: candidates beside the target, K - 1.
      sampling: `uniform` or `popularity`.
      seed: seed of the lists.
      resample: number of the copy, for training windows that are written several times.

    Returns:
      A `CandidateSet` with candidates [N, K] int64.

    Raises:
      DataError: a user has fewer possible negatives than asked, or a window's user or target is not in the data set.
    """
    catalogue = _Catalogue(dataset, sampling)
    keys = _window_keys(windows)
    stranger = next((window.user for window in windows if window.user not in catalogue.row_of_user), None)
    if stranger is not None:
        raise DataError(f"{dataset.name}: expected windows of its users, got user {stranger}")
    users = np.fromiter((catalogue.row_of_user[window.user] for window in windows), np.int64, len(windows))
    known = np.isin(keys[:, 2], catalogue.ids)
    if not known.all():
        raise DataError(f"{dataset.name}: expected targets of its catalogue, got the unknown item {keys[~known][0, 2]}")
    short = catalogue.available[users] < negatives
    if short.any():
        user = windows[int(np.argmax(short))].user
        count = int(catalogue.available[users][short].min())
        raise DataError(
            f"{dataset.name}: expected at least {negatives} items that user {user} never interacted with ({sampling} negatives), "
            f"got {count}; ask for fewer negatives (data.negatives)"
        )
    rng = np.random.default_rng([seed & 0xFFFFFFFFFFFFFFFF, resample, zlib.crc32(np.ascontiguousarray(keys, "<i8").tobytes())])
    step = max(1, _BLOCK_ENTRIES // max(1, negatives))
    blocks = [users[start : start + step] for start in range(0, len(users), step)]
    drawn = [catalogue.ids[_draw_negatives(catalogue, block, negatives, rng)] for block in blocks]
    others = np.concatenate(drawn) if drawn else np.empty((0, negatives), np.int64)
    rows = np.concatenate([keys[:, 2:], others], axis=1)
    candidates = rng.permuted(rows, axis=1)
    return CandidateSet(candidates, _hash_candidates(keys, candidates))


def locate_targets(windows: Sequence[Window], candidates: np.ndarray) -> np.ndarray:
    """Column of each window's target among its candidates [N, K]; int64 [N].

    Raises:
      DataError: a row does not hold its target exactly once.
    """
    if len(windows) != len(candidates):
        raise DataError(f"expected one row of candidates a window ({len(windows)}), got {len(candidates)} rows")
    found = candidates == _window_keys(windows)[:, 2:]
    wrong = found.sum(axis=1) != 1
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(f"candidates row {row}: expected the target {windows[row].target} once, got {int(found[row].sum())} times")
    return np.argmax(found, axis=1)


def save_candidates(path: Path, candidate_set: CandidateSet, windows: Sequence[Window], *, provenance: dict[str, Any]) -> None:
    """Writes one `.npz`: `candidates` [N, K], `windows` [N, 3] (user, position, target), and `header`, JSON bytes with the content hash
    and `provenance` (whatever shaped the lists: data hash, split, seeds). Whole or absent.

    Raises:
      OSError: the file cannot be written.
    """
    header = {"format": _FORMAT, "content_hash": candidate_set.content_hash, "provenance": provenance}
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        candidates=candidate_set.candidates,
        windows=_window_keys(windows),
        header=np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8),
    )
    write_file(path, buffer.getvalue())


def load_candidates(path: Path, windows: Sequence[Window], *, provenance: dict[str, Any]) -> CandidateSet:
    """Reads what `save_candidates` wrote and checks that it is whole and belongs to `windows` and `provenance`.

    Raises:
      DataError: missing, damaged, of another format, or of other data; the message says which.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            candidates, keys, header_bytes = file["candidates"], file["windows"], file["header"]
        header = json.loads(header_bytes.tobytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: expected a whole candidate file, got a damaged one ({error}); delete it to draw it again") from None
    if header.get("format") != _FORMAT:
        raise DataError(f"{path}: expected candidate format {_FORMAT}, got {header.get('format')!r}")
    if _hash_candidates(keys, candidates) != header["content_hash"]:
        raise DataError(f"{path}: expected the content hash {header['content_hash']}, got other content; delete it to draw it again")
    wanted = json.loads(json.dumps(provenance))
    if header["provenance"] != wanted:
        differing = sorted(key for key in {*wanted, *header["provenance"]} if wanted.get(key) != header["provenance"].get(key))
        raise DataError(f"{path}: drawn for other data: expected {wanted}, got {header['provenance']} (differs in {', '.join(differing)})")
    if not np.array_equal(keys, _window_keys(windows)):
        raise DataError(f"{path}: drawn for other windows ({len(keys)}, expected these {len(windows)})")
    return CandidateSet(candidates, header["content_hash"])
