"""Posterworld: deterministic to the byte, an oracle that equals brute force, and floors where the docs say they are."""

from __future__ import annotations

import dataclasses
import io
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllmrec_jax.baselines.covisitation import score_covisitation
from mllmrec_jax.baselines.popularity import score_popularity
from mllmrec_jax.config import ConfigError, DataConfig, PosterworldConfig
from mllmrec_jax.data.candidates import draw_candidates, locate_targets
from mllmrec_jax.data.load import load_dataset
from mllmrec_jax.data.posters import HEIGHT, PALETTES, SHAPES, WIDTH, render_poster
from mllmrec_jax.data.posterworld import (
    GENRE_WORDS,
    GENRES,
    TITLE_NOISE,
    build_world,
    generate_posterworld,
    oracle_scores,
    sample_users,
)
from mllmrec_jax.data.records import DataError, History, Item, make_dataset
from mllmrec_jax.data.splits import full_pasts, split_windows
from mllmrec_jax.evaluate.metrics import rank_targets, score_users

SMALL = PosterworldConfig(items=30, users=40, min_length=3, max_length=8)


def test_same_seed_same_bytes_other_seed_other_world(tmp_path: Path):
    first, again = (generate_posterworld(SMALL, tmp_path / name) for name in ("a", "b"))
    other = generate_posterworld(dataclasses.replace(SMALL, seed=-1), tmp_path / "c")
    assert first.content_hash == again.content_hash != other.content_hash
    for item in first.items.values():
        assert item.image is not None
        assert item.image.read_bytes() == (tmp_path / "b" / "images" / item.image.name).read_bytes()
    assert {len(history.items) for history in first.histories} <= set(range(3, 9))
    assert len(first.histories) == 40


def test_a_finished_folder_is_checked_and_reused(tmp_path: Path):
    config = DataConfig(posterworld=SMALL)
    dataset = load_dataset(config, tmp_path)
    (folder,) = tmp_path.iterdir()
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert load_dataset(config, tmp_path) == dataset
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    picture = folder / "images" / "3.jpg"
    picture.write_bytes(picture.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match=r"3.jpg: expected the picture that was generated, got another one; delete"):
        load_dataset(config, tmp_path)
    picture.unlink()
    with pytest.raises(DataError, match="expected a whole posterworld"):
        load_dataset(config, tmp_path)
    shutil.rmtree(folder)
    assert load_dataset(config, tmp_path) == dataset
    with pytest.raises(DataError, match="expected a posterworld of"):
        generate_posterworld(dataclasses.replace(SMALL, seed=9), folder)


@pytest.mark.parametrize("sizes", [{"min_length": 9}, {"items": 8}])
def test_contradicting_sizes_are_refused(sizes: dict[str, int]):
    with pytest.raises(ConfigError, match="expected min_length <= max_length < items"):
        build_world(dataclasses.replace(SMALL, **sizes))


def test_titles_are_short_plain_unique_and_tell_the_genre_most_of_the_time():
    world = build_world(PosterworldConfig(items=2000))
    assert len(set(world.titles)) == 2000
    genre_of = {word: row for row, genre in enumerate(GENRES) for word in GENRE_WORDS[genre]}
    told = []
    for title, genre in zip(world.titles, world.genre, strict=True):
        words = title.split()
        assert 2 <= len(words) <= 3
        assert all(word.isascii() and word.isalpha() for word in words)
        (clue,) = [genre_of[word] for word in words if word in genre_of]
        told.append(clue == genre)
    assert np.mean(told) == pytest.approx(1 - TITLE_NOISE, abs=0.03)


def test_genre_and_palette_are_balanced_and_transitions_are_probabilities():
    world = build_world(PosterworldConfig())
    cells = np.bincount(world.genre * len(PALETTES) + world.palette, minlength=len(GENRES) * len(PALETTES))
    assert cells.min() == cells.max() == 12
    np.testing.assert_allclose(world.transition.sum(axis=1), 1)
    np.testing.assert_allclose(world.start.sum(), 1)
    assert (world.emission > 0).all()


def test_no_user_chooses_an_item_twice():
    assert all(len(set(items)) == len(items) for items in sample_users(build_world(SMALL)))


def test_the_oracle_equals_the_sum_over_all_paths_of_tastes():
    """Brute force over every sequence of 4 states, with a world cut to 4 states."""
    full = build_world(SMALL)
    keep = [0, 1, len(PALETTES), len(PALETTES) + 1]
    transition = full.transition[np.ix_(keep, keep)]
    transition /= transition.sum(axis=1, keepdims=True)
    emission = full.emission[keep]
    world = dataclasses.replace(full, start=np.array([0.4, 0.3, 0.2, 0.1]), transition=transition, emission=emission)
    past, candidates = (5, 12, 7), np.array([1, 2, 9, 30])
    joint = np.zeros(len(candidates))
    total = 0.0
    for path in itertools.product(range(4), repeat=4):
        probability, unseen = world.start[path[0]], np.ones(30)
        for step, state in enumerate(path):
            if step:
                probability *= world.transition[path[step - 1], state]
            choice = emission[state] * unseen / (emission[state] * unseen).sum()
            if step < 3:
                probability *= choice[past[step] - 1]
                unseen[past[step] - 1] = 0
            else:
                joint += probability * choice[candidates - 1]
                total += probability
    np.testing.assert_allclose(oracle_scores(world, [past], candidates[None])[0], joint / total, rtol=1e-10)


def test_oracle_probabilities_sum_to_one_over_unseen_items_and_are_calibrated():
    world = build_world(SMALL)
    users = sample_users(dataclasses.replace(world, config=dataclasses.replace(SMALL, users=3000)))
    pasts, targets = [items[:-1] for items in users], np.array([items[-1] for items in users])
    scores = oracle_scores(world, pasts, np.tile(np.arange(1, 31), (len(users), 1)))
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-9)
    assert all((scores[row, np.array(past) - 1] == 0).all() for row, past in enumerate(pasts))
    target_scores = scores[np.arange(len(users)), targets - 1]
    # If the probabilities are right, the target's own is E[sum p^2] on average.
    assert target_scores.mean() == pytest.approx((scores**2).sum(axis=1).mean(), abs=0.02)


def test_the_oracle_refuses_strangers():
    world = build_world(SMALL)
    with pytest.raises(ValueError, match="expected item ids from 1 to 30"):
        oracle_scores(world, [(1, 31)], np.array([[2, 3]]))
    with pytest.raises(ValueError, match=r"expected one row a past \(2\), got 1 rows"):
        oracle_scores(world, [(1,), (2,)], np.array([[2, 3]]))


def test_floors_and_oracle_are_where_the_docs_say():
    world = build_world(PosterworldConfig())
    items = [Item(row + 1, title) for row, title in enumerate(world.titles)]
    dataset = make_dataset("posterworld", items, [History(user + 1, items) for user, items in enumerate(sample_users(world))])
    splits = split_windows(dataset, DataConfig())
    candidates = draw_candidates(splits.test, dataset, negatives=9, sampling="uniform", seed=0).candidates
    targets = locate_targets(splits.test, candidates)
    scores = {
        "popularity": score_popularity(splits.train_histories, candidates),
        "covisitation": score_covisitation(splits.train_histories, [window.history for window in splits.test], candidates),
        "oracle": oracle_scores(world, full_pasts(splits.test, dataset), candidates),
    }
    hits = {name: score_users(rank_targets(values, targets))["HR@1"].mean() for name, values in scores.items()}
    for name, expected in {"popularity": 0.23, "covisitation": 0.59, "oracle": 0.70}.items():
        assert hits[name] == pytest.approx(expected, abs=0.05), name


def mean_colour(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"), float).mean(axis=(0, 1))


def test_palette_and_shape_can_be_seen_in_the_picture():
    """Nearest mean colour names the palette of every new poster; nearest mean picture names most shapes."""
    shots = {
        (palette, shape, seed): render_poster("Title Words", palette, shape, seed=(seed,))
        for palette in range(len(PALETTES))
        for shape in range(len(SHAPES))
        for seed in range(6)
    }
    assert Image.open(io.BytesIO(shots[0, 0, 0])).size == (WIDTH, HEIGHT)
    known = {p: np.mean([mean_colour(shot) for (q, _, s), shot in shots.items() if q == p and s < 3], axis=0) for p in range(len(PALETTES))}
    for (palette, _, seed), shot in shots.items():
        if seed >= 3:
            colour = mean_colour(shot)
            assert min(known, key=lambda p: np.linalg.norm(known[p] - colour)) == palette
    grey = {key: np.asarray(Image.open(io.BytesIO(shot)).convert("L").resize((16, 24)), float)[:16] for key, shot in shots.items()}
    right = []
    for (palette, shape, seed), shot in grey.items():
        if seed >= 3:
            means = [np.mean([grey[palette, s, n] for n in range(3)], axis=0) for s in range(len(SHAPES))]
            right.append(int(np.argmin([np.linalg.norm(mean - shot) for mean in means])) == shape)
    assert np.mean(right) > 0.6  # chance is 0.25
