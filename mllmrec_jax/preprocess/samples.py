"""What preprocessing works on: the catalogue with its pictures, and the training windows that get traces."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mllmrec_jax.config import ConfigError, RunConfig, to_dict
from mllmrec_jax.data.load import load_dataset
from mllmrec_jax.data.records import Dataset, Item
from mllmrec_jax.data.splits import Splits, Window, cut_windows, split_windows
from mllmrec_jax.preprocess.backends.protocol import Picture
from mllmrec_jax.preprocess.hashes import Hashes
from mllmrec_jax.preprocess.images import READABLE, Outcome, decode_image, read_image
from mllmrec_jax.preprocess.key_table import KeyTable
from mllmrec_jax.preprocess.store import Store, hash_content
from mllmrec_jax.preprocess_config import ImageConfig
from mllmrec_jax.progress import track

_VERSION = 1  # counts changes of how pictures are decoded
_BLOCK = 4096  # pictures looked at together


@dataclasses.dataclass(frozen=True)
class Samples:
    """The inputs of all stages.

    `outcomes` counts all items' pictures (see `images`). `sft` and `grpo` are the windows of the two trainings; where they share users,
    they share windows.
    """

    dataset: Dataset
    splits: Splits
    sft: tuple[Window, ...]
    grpo: tuple[Window, ...]
    images: ImageConfig
    pictures: Pictures
    outcomes: dict[str, int]

    def list_windows(self) -> list[Window]:
        """Every training window once, in the order of the split."""
        return list(dict.fromkeys((*self.sft, *self.grpo)))

    def list_items(self) -> list[Item]:
        """The catalogue by ascending id: the rows of every array."""
        return [self.dataset.items[item] for item in self.pictures.item_id]

    def find_picture(self, item: int) -> Picture | None:
        """The item's picture, decoded when it is asked for; None where it has none that can be."""
        digest, path = self.pictures.find(item), self.dataset.items[item].image
        return Picture(digest, PictureFile(path, digest, self.images)) if digest and path else None

    def list_distinct(self) -> Iterator[tuple[Item, Picture]]:
        """Each distinct picture content once, with the item of lowest id that has it."""
        for row, item in enumerate(self.pictures.item_id):
            if self.pictures.first[row] == row:
                picture = self.find_picture(item)
                assert picture is not None
                yield self.dataset.items[item], picture


class PictureFile(NamedTuple):
    """Opens a picture: plain values, so that it can be sent to another process that sees the same folder."""

    path: Path
    digest: str
    limits: ImageConfig

    def __call__(self) -> Image.Image:
        file = read_image(self.path.parent, self.path.name, self.limits)
        image = decode_image(file.content, self.limits).image if file.digest == self.digest else None
        if image is None:
            raise ConfigError(f"{self.path}: expected the picture that was there when the run began, got {file.outcome}; start again")
        return image


class Pictures:
    """The readable pictures of a catalogue, by item; about 50 bytes an item."""

    def __init__(self, item_id: Sequence[int]):
        self.item_id = array("q", sorted(item_id))
        """[I] ascending."""
        self.digests = Hashes(len(self.item_id))
        """[I] content hashes; "" where the item's picture cannot be used."""
        self.first = array("q", [-1]) * len(self.item_id)
        """[I] the first row of the same content; -1 where there is none."""

    def find_row(self, item: int) -> int:
        """Row of an item of the catalogue."""
        return bisect.bisect_left(self.item_id, item)

    def find(self, item: int) -> str:
        """Content hash of an item's picture; "" where there is none."""
        return self.digests[self.find_row(item)]

    def count(self) -> int:
        """Items with a picture."""
        return len(self.first) - self.first.count(-1)


def hash_picture(path: Path | None, limits: ImageConfig) -> tuple[Outcome, str]:
    """The outcome of reading a picture, and its content hash ("" where it was not read)."""
    if path is None:
        return "missing", ""
    file = read_image(path.parent, path.name, limits)
    return file.outcome, file.digest


def try_picture(path: Path, limits: ImageConfig) -> Outcome:
    """The outcome of decoding a picture."""
    file = read_image(path.parent, path.name, limits)
    return decode_image(file.content, limits).outcome if file.digest else file.outcome


def survey_pictures(
    items: Mapping[int, Item], limits: ImageConfig, store: Store, *, spread: Callable[..., Iterator[Any]] = map
) -> tuple[Pictures, dict[str, int]]:
    """Reads and hashes every item's picture, and decodes each content that was not decoded before.

    An item's picture is looked for in the folder its reader named, and in no other.

    Args:
      items: the catalogue.
      limits: what is refused.
      store: outcomes of contents.
      spread: `map`, or what does the same on other machines.

    Returns:
      The pictures that can be decoded, and how many items had each outcome.
    """
    pictures, outcomes, seen = Pictures(list(items)), Counter[str](), KeyTable()
    described = to_dict(limits)
    for start in track(range(0, len(items), _BLOCK), description="pictures", unit="block"):
        paths = [items[item].image for item in pictures.item_id[start : start + _BLOCK]]
        read: list[tuple[Outcome, str]] = list(spread(functools.partial(hash_picture, limits=limits), paths))
        keys = [hash_content("decode", _VERSION, digest, described) if digest else "" for _, digest in read]
        new = {key: path for key, path in zip(keys, paths, strict=True) if key and key not in store}
        for key, outcome in zip(new, spread(functools.partial(try_picture, limits=limits), new.values()), strict=True):
            store.put(key, outcome)
        for row, ((outcome, digest), key) in enumerate(zip(read, keys, strict=True), start):
            decoded = store.get(key) if key else outcome
            outcomes[decoded] += 1
            if decoded in READABLE:
                seen.add(digest, place=row)
                pictures.digests[row] = digest
                pictures.first[row] = (seen.find(digest) or (0, row))[1]
    seen.close()
    return pictures, dict(sorted(outcomes.items()))


def load_samples(config: RunConfig, store: Store, *, spread: Callable[..., Iterator[Any]] = map) -> Samples:
    """Loads and splits the data as training does, and surveys the pictures (outcomes are kept in `store`; `spread` as there).

    Raises:
      ConfigError: training cuts a user's history into several windows: a trace belongs to one.
      DataError: the data cannot be read.
    """
    data = config.data
    for name, kind in (("sft_windows", data.sft_windows), ("grpo_windows", data.grpo_windows)):
        if kind != "last":
            raise ConfigError(f"data.{name}: expected 'last' for preprocessing (a trace is of one window of its user), got '{kind}'")
    dataset = load_dataset(data, config.cache)
    splits = split_windows(dataset, data)
    users = splits.train_histories
    count = round(data.sft_user_share * len(users))
    length = data.sft_history_len or data.history_len
    sft = cut_windows(users[:count], kind="last", history_len=length, seed=[data.split_seed, 0])
    grpo_users = users if count == len(users) else users[count:]
    grpo = cut_windows(grpo_users, kind="last", history_len=data.history_len, seed=[data.split_seed])
    pictures, outcomes = survey_pictures(dataset.items, config.preprocess.images, store, spread=spread)
    return Samples(dataset, splits, sft, grpo, config.preprocess.images, pictures, outcomes)
