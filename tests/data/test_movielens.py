"""MovieLens readers: tiny files in both formats, every malformed row, and the real ML-1M."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mllmrec_jax.config import DataConfig
from mllmrec_jax.data.movielens import read_movielens
from mllmrec_jax.data.records import DataError

MOVIES = "1::Toy Story (1995)::Animation|Comedy\n2::Misérables, Les (1995)::Drama\n5::A::B (1999)::Drama\n9::Unseen (2000)::Drama\n"
RATINGS = "7::2::5::300\n7::1::3::100\n8::5::1::50\n7::5::4::300\n8::1::1::60\n"


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "movies.dat").write_text(MOVIES, encoding="latin-1")
    (tmp_path / "ratings.dat").write_text(RATINGS, encoding="latin-1")
    return DataConfig(source="movielens", path=tmp_path)


def rewrite(config: DataConfig, name: str, text: str) -> None:
    assert config.path is not None
    (config.path / name).write_text(text, encoding="latin-1")


def test_1m_orders_by_time_and_keeps_file_order_in_ties(config: DataConfig):
    dataset = read_movielens(config)
    assert {history.user: history.items for history in dataset.histories} == {7: (1, 2, 5), 8: (5, 1)}
    assert dataset.histories[0].times == (100, 300, 300)
    assert dataset.items[2].title == "Misérables, Les (1995)"
    assert dataset.items[1].genres == ("Animation", "Comedy")
    assert dataset.items[5].title == "A::B (1999)"
    assert 9 not in dataset.items  # nobody rated it
    assert dataset.origin["catalogue_items"] == "4"


def test_100k_reads_genre_flags(tmp_path: Path):
    (tmp_path / "u.genre").write_text("unknown|0\nAction|1\nComedy|2\n\n")
    (tmp_path / "u.item").write_text(
        "3|Café Nuit (1994)|01-Jan-1994||http://x|0|1|1\n4|Plain (1995)|||http://y|1|0|0\n", encoding="latin-1"
    )
    (tmp_path / "u.data").write_text("1\t4\t3\t20\n1\t3\t3\t10\n")
    dataset = read_movielens(DataConfig(source="movielens", path=tmp_path))
    assert dataset.items[3].genres == ("Action", "Comedy")
    assert dataset.items[3].title == "Café Nuit (1994)"
    assert dataset.histories[0].items == (3, 4)


def test_pictures_are_found_by_id(config: DataConfig, tmp_path: Path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "2.jpg").write_bytes(b"")
    items = read_movielens(dataclasses.replace(config, images=tmp_path / "pictures")).items
    assert items[2].image == tmp_path / "pictures" / "2.jpg"
    assert items[1].image is None
    with pytest.raises(DataError, match=r"expected a folder with <item id>.jpg pictures"):
        read_movielens(dataclasses.replace(config, images=tmp_path / "absent"))


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("movies.dat", "3;Broken;Drama", r"movies.dat:5: expected MovieID::Title::Genre\|Genre, got '3;Broken;Drama'"),
        ("movies.dat", "x::Title::Drama", "movies.dat:5: expected a whole number as movie id"),
        ("movies.dat", "1::Again::Drama", r"movies.dat:5: expected each movie id once, got movie 1 again \(before: 'Toy Story"),
        ("ratings.dat", "7::1::5", "ratings.dat:6: expected user::movie::rating::seconds, got '7::1::5'"),
        ("ratings.dat", "7::77::5::400", r"ratings.dat:6: expected a movie of the catalogue \(4 movies\), got the unknown movie 77"),
        ("ratings.dat", "7::1::5::400", "ratings.dat:6: expected one rating of a movie by a user, got movie 1 by user 7 again"),
        ("sequences.txt", "u 1 2", "sequences.txt:2: expected a whole number as user, got 'u'"),
        ("sequences.txt", "7 5", "sequences.txt:2: expected one line a user, got user 7 again"),
        ("sequences.txt", "8", r"sequences.txt:2: expected at least one item id after the user, got none \(an empty history\)"),
        ("sequences.txt", "8 1 2.5", "sequences.txt:2: expected item ids that are whole numbers, got '2.5'"),
        ("sequences.txt", "8 1 6", "sequences.txt:2: expected item ids of the catalogue .*, got the unknown item 6"),
        ("sequences.txt", "8 1 2 1", "sequences.txt:2: expected each item once in a user's history, got item 1 twice"),
    ],
)
def test_a_malformed_row_is_named_or_skipped_and_counted(config: DataConfig, name: str, row: str, message: str):
    text = {"movies.dat": MOVIES, "ratings.dat": RATINGS, "sequences.txt": "7 1 2 5\n"}[name]
    rewrite(config, name, text)
    if name == "sequences.txt":
        config = dataclasses.replace(config, sequences=name)
    clean = read_movielens(config)
    rewrite(config, name, text + row + "\n")
    with pytest.raises(DataError, match=message):
        read_movielens(config)
    skipped = read_movielens(dataclasses.replace(config, max_bad_rows=1))
    assert skipped.bad_rows == 1
    assert skipped.content_hash == clean.content_hash


def test_missing_files_are_named(tmp_path: Path):
    with pytest.raises(DataError, match="expected a folder with MovieLens files"):
        read_movielens(DataConfig(source="movielens", path=tmp_path / "absent"))
    with pytest.raises(DataError, match=r"expected movies.dat \(1M\) or u.item \(100K\), found neither"):
        read_movielens(DataConfig(source="movielens", path=tmp_path))


def test_real_ml1m(shared_data: Path):
    config = DataConfig(source="movielens", path=shared_data / "ml-1m", images=shared_data / "ml-1m-posters" / "images")
    dataset = read_movielens(dataclasses.replace(config, sequences="sequences_5core.txt"))
    assert (len(dataset.histories), len(dataset.items)) == (6040, 3416)
    assert sum(len(history.items) for history in dataset.histories) == 999_611
    assert dataset.items[1].genres == ("Animation", "Children's", "Comedy")
    assert any("é" in item.title for item in dataset.items.values())
    assert dataset.items[1].image is not None
