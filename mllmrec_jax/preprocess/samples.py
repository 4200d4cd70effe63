"""What preprocessing works on: the catalogue with its pictures, and the training windows that get traces."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from mllmrec_jax.config import ConfigError, RunConfig, to_dict
from mllmrec_jax.data.load import load_dataset
from mllmrec_jax.data.records import Dataset, Item
from mllmrec_jax.data.splits import Splits, Window, cut_windows, split_windows
from mllmrec_jax.preprocess.backends.protocol import Picture
from mllmrec_jax.preprocess.images import READABLE, decode_image, read_image
from mllmrec_jax.preprocess.store import Store, hash_content
from mllmrec_jax.preprocess_config import ImageConfig

_VERSION = 1  # counts changes of how pictures are decoded


@dataclasses.dataclass(frozen=True)
class Samples:
    """The inputs of all stages.

    `digests` has the content hash of every item whose picture can be decoded; `outcomes` counts all items' pictures (see `images`).
    `sft` and `grpo` are the windows of the two trainings; where they share users, they share windows.
    """

    dataset: Dataset
    splits: Splits
    sft: tuple[Window, ...]
    grpo: tuple[Window, ...]
    images: ImageConfig
    digests: dict[int, str]
    outcomes: dict[str, int]

    def list_windows(self) -> list[Window]:
        """Every training window once, in the order of the split."""
        return list(dict.fromkeys((*self.sft, *self.grpo)))

    def list_items(self) -> list[Item]:
        """The catalogue by ascending id: the rows of every array."""
        return [self.dataset.items[item] for item in sorted(self.dataset.items)]

    def find_picture(self, item: int) -> Picture | None:
        """The item's picture, decoded when it is asked for; None where it has none that can be."""
        digest, path = self.digests.get(item), self.dataset.items[item].image
        return None if digest is None or path is None else Picture(digest, lambda: _open_picture(path, digest, self.images))

    def list_distinct(self) -> Iterator[tuple[Item, Picture]]:
        """Each distinct picture content once, with the item of lowest id that has it."""
        seen: set[str] = set()
        for item in self.list_items():
            picture = self.find_picture(item.id)
            if picture is not None and picture.digest not in seen:
                seen.add(picture.digest)
                yield item, picture


def _open_picture(path: Path, digest: str, limits: ImageConfig) -> Image.Image:
    file = read_image(path.parent, path.name, limits)
    image = decode_image(file.content, limits).image if file.digest == digest else None
    if image is None:
        raise ConfigError(f"{path}: expected the picture that was there when the run began, got another one; start again")
    return image


def survey_pictures(items: Iterable[Item], limits: ImageConfig, store: Store) -> tuple[dict[int, str], dict[str, int]]:
    """Reads and hashes every item's picture, and decodes each content that was not decoded before.

    An item's picture is looked for in the folder its reader named, and in no other.

    Returns:
      Content hashes of the items whose picture can be decoded, and how many items had each outcome.
    """
    digests: dict[int, str] = {}
    outcomes: Counter[str] = Counter()
    for item in items:
        if item.image is None:
            outcomes["missing"] += 1
            continue
        file = read_image(item.image.parent, item.image.name, limits)
        outcome: str = file.outcome
        if file.digest:
            key = hash_content("decode", _VERSION, file.digest, to_dict(limits))
            if key not in store:
                store.put(key, decode_image(file.content, limits).outcome)
            outcome = store.get(key)
        outcomes[outcome] += 1
        if outcome in READABLE:
            digests[item.id] = file.digest
    return digests, dict(sorted(outcomes.items()))


def load_samples(config: RunConfig, store: Store) -> Samples:
    """Loads and splits the data as training does, and surveys the pictures (outcomes are kept in `store`).

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
    ordered = [dataset.items[item] for item in sorted(dataset.items)]
    digests, outcomes = survey_pictures(ordered, config.preprocess.images, store)
    return Samples(dataset, splits, sft, grpo, config.preprocess.images, digests, outcomes)
