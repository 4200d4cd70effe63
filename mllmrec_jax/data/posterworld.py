"""Posterworld: a generated catalogue with rendered posters, and users whose tastes drift. Model and numbers: docs/posterworld.md.

A user is in one of genres x palettes taste states at a time, mostly stays, and chooses among the items not yet chosen with weights that
depend on the state and on each item's popularity. Titles show the genre, partly; only posters show palette and shape. The chosen items
are all that is observed, so a Bayes filter over the states gives the best possible ranking exactly.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mllmrec_jax.config import ConfigError, PosterworldConfig, to_dict
from mllmrec_jax.data.atomic import new_folder
from mllmrec_jax.data.posters import PALETTES, SHAPES, render_poster
from mllmrec_jax.data.records import DataError, Dataset, History, Item, make_dataset

WORLD_VERSION = 1  # raise it when the same configuration generates something else
STAY = 0.8  # probability that the state does not change between two choices
BOTH, GENRE_ONLY, PALETTE_ONLY, NEITHER = 1.0, 0.012, 0.012, 0.002  # emission weights by what an item shares with the state
SHAPE_FACTOR = 3.0  # times this where the item has the shape the state likes
POPULARITY_SIGMA = 0.9  # standard deviation of log popularity
TITLE_NOISE = 0.2  # probability that the genre word of a title is another genre's

GENRE_WORDS: dict[str, tuple[str, ...]] = {
    "Starfaring": ("Orbivane", "Nebulon", "Astrelle", "Quasaren", "Voidkeel", "Luminar", "Helionaut", "Cometra"),
    "Whodunit": ("Cluewick", "Alibrand", "Sleuthen", "Inkwarden", "Gaslorn", "Lockmere", "Cipheral", "Motivane"),
    "Romance": ("Amorelle", "Heartwyn", "Rosalind", "Velveto", "Kissamere", "Tendrille", "Swoonley", "Adoris"),
    "Creepshow": ("Ghoulden", "Cryptane", "Shivermoor", "Wraithly", "Hauntric", "Nightgrue", "Dreadwin", "Moldavar"),
    "Caper": ("Vaultine", "Heistrid", "Swindelle", "Slypocket", "Lootaire", "Grabbion", "Bluffort", "Tricksam"),
}
GENRES = tuple(GENRE_WORDS)
_STARTS = ("Al", "Bel", "Cor", "Dru", "El", "Fa", "Gil", "Hes", "Im", "Jor", "Kel", "Lum", "Mar", "Nor", "Os", "Pel", "Quil", "Ras")
_MIDDLES = ("a", "e", "i", "o", "u", "ar", "en", "il", "or", "un")
_ENDS = ("dan", "fex", "ga", "lith", "mor", "nis", "phe", "quay", "ros", "sin", "tova", "vek", "wyn", "zo")


@dataclasses.dataclass(frozen=True)
class World:
    """Everything the data is generated from; items are rows 0..I-1 with ids 1..I, states are rows genre * palettes + palette.

    `genre`, `palette`, `shape` [I] int64 index `GENRES`, `PALETTES`, `SHAPES`. `start` [S], `transition` [S, S] (from, to) are
    probabilities; `emission` [S, I] holds the unnormalised weights of choosing an item in a state.
    """

    config: PosterworldConfig
    titles: tuple[str, ...]
    genre: np.ndarray
    palette: np.ndarray
    shape: np.ndarray
    start: np.ndarray
    transition: np.ndarray
    emission: np.ndarray


def _balanced(rng: np.random.Generator, count: int, kinds: int) -> np.ndarray:
    """`count` labels below `kinds`, each as often as the others, in random order."""
    return rng.permutation(np.arange(count) % kinds)


def _invent_titles(rng: np.random.Generator, genre: np.ndarray) -> tuple[str, ...]:
    """Two or three invented words, one of them from the list of the item's genre (or, as noise, of another's); no two alike."""
    titles: dict[str, None] = {}
    for own in genre:
        while True:
            told = (own + rng.integers(1, len(GENRES))) % len(GENRES) if rng.random() < TITLE_NOISE else own
            words = [str(rng.choice(GENRE_WORDS[GENRES[told]]))]
            for _ in range(int(rng.integers(1, 3))):
                words.append(str(rng.choice(_STARTS)) + str(rng.choice(_MIDDLES)) + str(rng.choice(_ENDS)))
            title = " ".join(str(word) for word in rng.permutation(words))
            if title not in titles:
                titles[title] = None
                break
    return tuple(titles)


def _make_transition() -> np.ndarray:
    """Stay, or else drift: to the next genre with the palette kept, or to the next palette with the genre kept, equally likely."""
    genre, palette = np.divmod(np.arange(len(GENRES) * len(PALETTES)), len(PALETTES))
    transition = STAY * np.eye(len(genre))
    for next_genre, next_palette in ((genre + 1, palette), (genre, palette + 1)):
        drifted = (next_genre % len(GENRES)) * len(PALETTES) + next_palette % len(PALETTES)
        transition[np.arange(len(genre)), drifted] += (1 - STAY) / 2
    return transition


def build_world(config: PosterworldConfig) -> World:
    """The catalogue and the taste model of a configuration, without posters; the same for the same configuration.

    Raises:
      ConfigError: lengths or the number of items contradict each other.
    """
    if not config.min_length <= config.max_length < config.items:
        raise ConfigError(
            "data.posterworld: expected min_length <= max_length < items (users choose each item once), got "
            f"min_length = {config.min_length}, max_length = {config.max_length}, items = {config.items}"
        )
    rng = np.random.default_rng([config.seed & 0xFFFFFFFF, WORLD_VERSION, 0])
    states = len(GENRES) * len(PALETTES)
    genre, palette = np.divmod(_balanced(rng, config.items, states), len(PALETTES))
    shape = rng.integers(len(SHAPES), size=config.items)
    popularity = np.exp(POPULARITY_SIGMA * rng.standard_normal(config.items))
    liked_genre, liked_palette = np.divmod(np.arange(states)[:, None], len(PALETTES))
    same_genre, same_palette = liked_genre == genre, liked_palette == palette
    weight = np.where(same_genre, np.where(same_palette, BOTH, GENRE_ONLY), np.where(same_palette, PALETTE_ONLY, NEITHER))
    liked_shape = (liked_genre + liked_palette) % len(SHAPES)
    emission = weight * np.where(liked_shape == shape, SHAPE_FACTOR, 1.0) * popularity
    start = np.full(states, 1 / states)
    return World(config, _invent_titles(rng, genre), genre, palette, shape, start, _make_transition(), emission)


def _draw_rows(rng: np.random.Generator, weights: np.ndarray) -> np.ndarray:
    """One column a row, with probability proportional to the non-negative weights [N, M]."""
    cumulative = np.cumsum(weights, axis=1)
    threshold = rng.random(len(weights)) * cumulative[:, -1]
    return np.minimum((cumulative <= threshold[:, None]).sum(axis=1), weights.shape[1] - 1)


def sample_users(world: World) -> list[tuple[int, ...]]:
    """Item ids of every user, oldest first; lengths are uniform from `min_length` to `max_length`."""
    config = world.config
    rng = np.random.default_rng([config.seed & 0xFFFFFFFF, WORLD_VERSION, 1])
    lengths = rng.integers(config.min_length, config.max_length + 1, size=config.users)
    state = _draw_rows(rng, np.broadcast_to(world.start, (config.users, len(world.start))))
    unseen = np.ones((config.users, config.items), bool)
    chosen = np.empty((config.users, config.max_length), np.int64)
    for step in range(config.max_length):
        if step:
            state = _draw_rows(rng, world.transition[state])
        chosen[:, step] = _draw_rows(rng, world.emission[state] * unseen)
        unseen[np.arange(config.users), chosen[:, step]] = False
    return [tuple((row[:length] + 1).tolist()) for row, length in zip(chosen, lengths, strict=True)]


def oracle_scores(world: World, pasts: Sequence[tuple[int, ...]], candidates: np.ndarray) -> np.ndarray:
    """Probability that each candidate is the user's next choice, given all earlier choices: no model can rank better on average.

    The forward algorithm over taste states. Emissions are renormalised over the items not yet chosen, which the past determines, so
    the filter is exact. It is the best ranking of candidate lists whose negatives are uniform over what the user never chose; popularity-
    matched negatives tell something about the target themselves, which this does not use.

    Args:
      world: from `build_world`.
      pasts: item ids of each of N users, oldest first, everything before the target (see `splits.full_pasts`).
      candidates: item ids [N, K], none of them in the past.

    Returns:
      float64 [N, K], at most 1 in sum over all unseen items; 0 for items already chosen.

    Raises:
      ValueError: an item id is not in the world, or the numbers of pasts and candidate rows differ.
    """
    count = world.emission.shape[1]
    candidates = np.asarray(candidates)
    outside = [item for past in pasts for item in past if not 1 <= item <= count]
    if outside or (candidates.size and not (candidates.min() >= 1 and candidates.max() <= count)):
        raise ValueError(f"pasts, candidates: expected item ids from 1 to {count}, got others ({outside[:3] or 'in candidates'})")
    if len(pasts) != len(candidates):
        raise ValueError(f"candidates: expected one row a past ({len(pasts)}), got {len(candidates)} rows")
    scores = np.empty(candidates.shape)
    for row, past in enumerate(pasts):
        belief, left = world.start, world.emission.sum(axis=1)
        for item in past:
            likelihood = world.emission[:, item - 1] / left
            belief = belief * likelihood
            belief = (belief / belief.sum()) @ world.transition
            left = left - world.emission[:, item - 1]
        scores[row] = (belief / left) @ world.emission[:, candidates[row] - 1]
        scores[row, np.isin(candidates[row], past)] = 0.0
    return scores


def _check_folder(folder: Path, names: list[str], wanted: dict[str, object]) -> None:
    """Raises DataError unless `folder` holds exactly the pictures its manifest lists, made from `wanted`."""
    advice = "delete the folder to generate it again"
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        found = {name: hashlib.sha256((folder / "images" / name).read_bytes()).hexdigest() for name in names}
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: expected a whole posterworld, got {error}; {advice}") from None
    if manifest.get("world") != wanted:
        raise DataError(f"{folder}: expected a posterworld of {wanted}, got one of {manifest.get('world')}; {advice}")
    broken = [name for name, digest in found.items() if manifest["pictures"].get(name) != digest]
    if broken:
        raise DataError(f"{folder}/images/{broken[0]}: expected the picture that was generated, got another one; {advice}")


def generate_posterworld(config: PosterworldConfig, folder: Path) -> Dataset:
    """Generates items, posters and users; posters are written to `folder`/images/<id>.jpg, or checked where they already are.

    The folder appears whole or not at all. The same configuration gives the same records, and the same picture bytes under the same
    Pillow.

    Raises:
      ConfigError: see `build_world`.
      DataError: `folder` exists and is not this world's.
      OSError: the disk is full or the folder is not writable.
    """
    world = build_world(config)
    names = [f"{item}.jpg" for item in range(1, config.items + 1)]
    wanted: dict[str, object] = {"version": WORLD_VERSION, **to_dict(config)}
    if not folder.exists():
        with new_folder(folder) as scratch:
            (scratch / "images").mkdir()
            digests = {}
            for row, name in enumerate(names):
                place = (config.seed & 0xFFFFFFFF, row)
                picture = render_poster(world.titles[row], int(world.palette[row]), int(world.shape[row]), seed=place)
                (scratch / "images" / name).write_bytes(picture)
                digests[name] = hashlib.sha256(picture).hexdigest()
            (scratch / "manifest.json").write_text(json.dumps({"world": wanted, "pictures": digests}, indent=1), encoding="utf-8")
    _check_folder(folder, names, wanted)
    items = [
        Item(row + 1, world.titles[row], (GENRES[world.genre[row]],), image=folder / "images" / name) for row, name in enumerate(names)
    ]
    histories = [History(user + 1, sequence) for user, sequence in enumerate(sample_users(world))]
    return make_dataset("posterworld", items, histories, origin={"reader": "posterworld", "world": json.dumps(wanted, sort_keys=True)})
