"""Reader of MovieLens 1M (`movies.dat`, `ratings.dat`) and 100K (`u.item`, `u.genre`, `u.data`), as GroupLens publishes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mllmrec_jax.config import DataConfig
from mllmrec_jax.data.records import (
    BadRows,
    DataError,
    Dataset,
    History,
    Item,
    keep_chosen,
    make_dataset,
    parse_id,
    parse_sequence,
    read_rows,
    show_value,
)

_ENCODING = "latin-1"
_GENRE_FLAGS_AT = 5  # u.item: id | title | release | video release | IMDb URL | one flag a genre


def _find_picture(folders: list[Path], item: int) -> Path | None:
    return next((path for folder in folders if (path := folder / f"{item}.jpg").is_file()), None)


def _picture_folders(config: DataConfig, root: Path) -> list[Path]:
    folder = config.images or root / "images"
    if config.images is not None and not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with <item id>.jpg pictures (data.images), found none")
    return [folder] if folder.is_dir() else []


def _read_genre_names(path: Path) -> list[str]:
    """`u.genre`: name|number, in the order of u.item's flags."""
    return [line.split("|")[0] for _, line in read_rows(path, encoding=_ENCODING)]


def _read_movies(path: Path, config: DataConfig, bad: BadRows) -> dict[int, Item]:
    """Movies by id, from `movies.dat` (id::title::genre|genre) or `u.item` (pipe-separated with genre flags)."""
    old_style = path.name == "u.item"
    genre_names = _read_genre_names(path.with_name("u.genre")) if old_style else []
    expected = f"{_GENRE_FLAGS_AT + len(genre_names)} fields separated by '|'" if old_style else "MovieID::Title::Genre|Genre"
    pictures = _picture_folders(config, path.parent)
    items: dict[int, Item] = {}
    for line, row in read_rows(path, encoding=_ENCODING):
        fields = row.split("|") if old_style else row.split("::")
        if not old_style and len(fields) > 3:  # a title may hold the separator
            fields = [fields[0], "::".join(fields[1:-1]), fields[-1]]
        if len(fields) != (_GENRE_FLAGS_AT + len(genre_names) if old_style else 3):
            bad.reject(path, line, expected=expected, got=show_value(row))
            continue
        item, title = parse_id(fields[0]), fields[1].strip()
        if item is None or not title:
            bad.reject(path, line, expected="a whole number as movie id and a title", got=show_value(row))
            continue
        if item in items:
            bad.reject(path, line, expected="each movie id once", got=f"movie {item} again (before: {items[item].title!r})")
            continue
        if old_style:
            flags = fields[_GENRE_FLAGS_AT:]
            genres = tuple(name for name, flag in zip(genre_names, flags, strict=True) if flag.strip() == "1")
        else:
            genres = tuple(name for name in fields[2].strip().split("|") if name)
        items[item] = Item(item, title, genres, image=_find_picture(pictures, item))
    return items


def _read_ratings(path: Path, items: Mapping[int, Item], bad: BadRows) -> list[History]:
    """Histories by the time of the ratings; ratings of the same second keep the file's order."""
    separator = "\t" if path.name == "u.data" else "::"
    expected = separator.join(("user", "movie", "rating", "seconds"))
    events: dict[int, list[tuple[int, int]]] = {}
    seen: set[tuple[int, int]] = set()
    for line, row in read_rows(path, encoding=_ENCODING):
        fields = row.split(separator)
        user, item, second = (parse_id(field) for field in (fields[0], fields[1], fields[3])) if len(fields) == 4 else (None, None, None)
        if user is None or item is None or second is None:
            bad.reject(path, line, expected=expected, got=show_value(row))
        elif item not in items:
            bad.reject(path, line, expected=f"a movie of the catalogue ({len(items)} movies)", got=f"the unknown movie {item}")
        elif (user, item) in seen:
            bad.reject(path, line, expected="one rating of a movie by a user", got=f"movie {item} by user {user} again")
        else:
            seen.add((user, item))
            events.setdefault(user, []).append((second, item))
    histories = []
    for user, pairs in events.items():
        pairs.sort(key=lambda pair: pair[0])
        histories.append(History(user, tuple(item for _, item in pairs), tuple(second for second, _ in pairs)))
    return histories


def read_sequences(path: Path, items: Mapping[int, Item], bad: BadRows) -> list[History]:
    """Histories from lines `user item item ...`, oldest first, any white space between."""
    histories: dict[int, History] = {}
    for line, row in read_rows(path, encoding="utf-8"):
        words = row.split()
        user = parse_id(words[0])
        if user is None or user in histories:
            expected = "a whole number as user" if user is None else "one line a user"
            bad.reject(path, line, expected=expected, got=show_value(words[0]) if user is None else f"user {user} again")
            continue
        match parse_sequence(words[1:], items):
            case (str(expected), str(got)):
                bad.reject(path, line, expected=expected, got=got)
            case sequence:
                histories[user] = History(user, tuple(int(item) for item in sequence))
    return list(histories.values())


def read_movielens(config: DataConfig) -> Dataset:
    """Reads MovieLens 1M or 100K from `config.path`, told apart by the names of the files.

    Histories come from the ratings, ordered by time, or from `config.sequences` (lines `user item item ...`) where that is given.
    Ratings are implicit feedback: every rated movie counts. Movies that nobody rated are left out of the catalogue.

    Raises:
      DataError: files are missing; or a row is malformed, names an unknown movie, or repeats an id or a rating, and there are more
        than `config.max_bad_rows` of these.
    """
    root = config.path
    if root is None or not root.is_dir():
        raise DataError(f"data.path: expected a folder with MovieLens files, got {root}")
    movies = next((root / name for name in ("movies.dat", "u.item") if (root / name).is_file()), None)
    if movies is None:
        raise DataError(f"{root}: expected movies.dat (1M) or u.item (100K), found neither")
    bad = BadRows(config.max_bad_rows)
    items = _read_movies(movies, config, bad)
    if config.sequences is not None:
        source = root / config.sequences
        histories = read_sequences(source, items, bad)
    else:
        source = movies.with_name("ratings.dat" if movies.name == "movies.dat" else "u.data")
        histories = _read_ratings(source, items, bad)
    origin = {"reader": "movielens", "catalogue": movies.name, "interactions": source.name, "catalogue_items": str(len(items))}
    return make_dataset("movielens", keep_chosen(items, histories), histories, bad_rows=bad.count, origin=origin)
