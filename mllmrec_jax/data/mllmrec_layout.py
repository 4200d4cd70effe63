"""Reader and writer of the folder layout that MLLMRec-R1 publishes its data sets in.

    <name>_titles.csv     header item,title, then one row an item (CSV quoting)
    train.tsv, test.tsv   one row a user, no header: user TAB item ids separated by spaces, oldest first; valid.tsv likewise, if any
    <name>_pairs.tsv      the same rows for a data set that is not split (read where there is no train.tsv)
    images/<id>.jpg       pictures, optional
    <name>_captions.json  optional: {id: {"caption": text}} or {id: text}; also looked for beside the folder
    <name>_*cot.json      optional reasoning traces: a list of {"user_id": user, "reasoning": text}; ours may say which training shows a
                          trace, {..., "stages": ["sft"]}, ["grpo"] or ["sft", "grpo"] (where it does not: both)
    <name>_genres.json    optional, ours: {id: [genre, ...]}

Traces are joined by user. The published code joins them by `line_idx`, which counts the lines of train.tsv when traces are written but
the users that pass a length filter when they are read, so that one short user shifts every later trace: rows without a user are refused.
`<name>_pseudo-cot.json` is not read: those traces were written by a model that had seen the target.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mllmrec_jax.config import DataConfig
from mllmrec_jax.data.atomic import new_folder
from mllmrec_jax.data.records import (
    BadRows,
    DataError,
    Dataset,
    History,
    Item,
    Part,
    keep_chosen,
    make_dataset,
    parse_id,
    parse_sequence,
    read_rows,
    read_text,
    show_value,
)

_PARTS: tuple[Part, ...] = ("train", "valid", "test")
_STAGES = ("sft", "grpo")


def _find_one(folder: Path, pattern: str, what: str) -> Path:
    found = sorted(path for path in folder.glob(pattern) if path.is_file())
    if len(found) != 1:
        got = ", ".join(path.name for path in found) or "none"
        raise DataError(f"{folder}: expected one {what} ({pattern}), got {got}")
    return found[0]


def _read_titles(path: Path, bad: BadRows) -> dict[int, Item]:
    """Items without pictures and captions. Row numbers in errors are the file's lines, also after titles with line breaks."""
    reader = csv.reader(io.StringIO(read_text(path, encoding="utf-8-sig"), newline=""), strict=True)
    items: dict[int, Item] = {}
    header: list[str] | None = None
    try:
        for row in reader:
            if header is None:
                header = [name.strip().lower() for name in row]
                if header[:2] != ["item", "title"]:
                    raise DataError(f"{path}:1: expected the header item,title, got {show_value(','.join(row))}")
            elif row:
                item = parse_id(row[0])
                if item is None or len(row) != len(header) or not row[1].strip():
                    bad.reject(path, reader.line_num, expected="a whole number and a title (CSV)", got=show_value(",".join(row)))
                elif item in items:
                    got = f"item {item} again (before: {show_value(items[item].title)})"
                    bad.reject(path, reader.line_num, expected="each item id once", got=got)
                else:
                    items[item] = Item(item, row[1].strip())
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: expected CSV with quoted titles, got {error}") from None
    if header is None:
        raise DataError(f"{path}:1: expected the header item,title, got an empty file")
    return items


def _read_users(path: Path, part: Part | None, items: dict[int, Item], taken: dict[int, str], bad: BadRows) -> list[History]:
    histories = []
    for line, row in read_rows(path, encoding="utf-8-sig"):
        user_text, tab, rest = row.partition("\t")
        user = parse_id(user_text)
        if user is None or not tab:
            bad.reject(path, line, expected="user TAB item item ...", got=show_value(row))
        elif user in taken:
            bad.reject(path, line, expected="one row a user over all files", got=f"user {user} again (before: {taken[user]})")
        else:
            match parse_sequence(rest.split(), items):
                case (str(expected), str(got)):
                    bad.reject(path, line, expected=expected, got=got)
                case sequence:
                    taken[user] = f"{path.name}:{line}"
                    histories.append(History(user, tuple(int(item) for item in sequence), part=part))
    return histories


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path, encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: expected JSON, got {error.msg}") from None


def _read_captions(path: Path, items: dict[int, Item]) -> dict[int, str]:
    """Captions by item; captions of items outside the catalogue are no use and no harm, and are passed over."""
    raw = _read_json(path)
    if not isinstance(raw, dict):
        raise DataError(f"{path}: expected an object {{item id: caption}}, got {type(raw).__name__}")
    captions = {}
    for key, value in raw.items():
        text = value.get("caption") if isinstance(value, dict) else value
        item = parse_id(key)
        if item is None or not isinstance(text, str):
            raise DataError(f'{path}: expected {{"item id": {{"caption": text}}}} or {{"item id": text}}, got {key!r}: {show_value(value)}')
        if item in items:
            captions[item] = text
    return captions


def _read_genres(path: Path) -> dict[int, tuple[str, ...]]:
    raw = _read_json(path)
    if not isinstance(raw, dict) or not all(parse_id(key) is not None and isinstance(names, list) for key, names in raw.items()):
        raise DataError(f'{path}: expected an object {{"item id": [genre, ...]}}, got {show_value(raw)}')
    return {int(key): tuple(str(name) for name in names) for key, names in raw.items()}


def _read_reasoning(path: Path, users: set[int]) -> dict[str, dict[int, str]]:
    """Traces by stage and user, of users we have; a user with two traces for one stage is an error."""
    raw = _read_json(path)
    if not isinstance(raw, list):
        raise DataError(f"{path}: expected a list of traces, got {type(raw).__name__}")
    traces: dict[str, dict[int, str]] = {stage: {} for stage in _STAGES}
    for index, row in enumerate(raw):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {index}: expected an object, got {show_value(row)}")
        key = next((row[name] for name in ("user_id", "user") if row.get(name) is not None), None)
        if key is None:
            also = (
                " (it has only line_idx, whose meaning depends on which users were filtered out before counting)"
                if "line_idx" in row
                else ""
            )
            raise DataError(f"{path}: row {index}: expected user_id, got none{also}; add user_id to each row, or remove the file")
        user, text = parse_id(str(key)), row.get("reasoning")
        if user is None or not isinstance(text, str):
            raise DataError(f"{path}: row {index}: expected a whole-number user_id and a reasoning text, got {show_value(row)}")
        stages = row.get("stages", list(_STAGES))
        if not isinstance(stages, list) or not stages or not all(stage in _STAGES for stage in stages):
            raise DataError(f"{path}: row {index}: expected stages that are a list of {' and '.join(_STAGES)}, got {show_value(stages)}")
        for stage in stages:
            if user in traces[stage]:
                raise DataError(f"{path}: row {index}: expected one trace a user and stage, got user {user} again for {stage}")
            if user in users:
                traces[stage][user] = text
    return traces


def _optional(root: Path, name: str, suffix: str) -> Path | None:
    return next((path for path in (root / f"{name}_{suffix}", root.parent / f"{name}_{suffix}") if path.is_file()), None)


def read_mllmrec(config: DataConfig) -> Dataset:
    """Reads a folder in the layout at the top of this page; `<name>` is taken from the titles file.

    Items that nobody interacted with are left out of the catalogue. Where train.tsv exists, each history knows its part
    (`split = "given"` follows it).

    Raises:
      DataError: files are missing; more than `config.max_bad_rows` rows of the titles or of the users' files are malformed; or a JSON
        file is not what it should be (these are written by programs, so nothing in them is skipped).
    """
    root = config.path
    if root is None or not root.is_dir():
        raise DataError(f"data.path: expected a folder in the MLLMRec-R1 layout, got {root}")
    titles_path = _find_one(root, "*_titles.csv", "file of titles")
    name = titles_path.name.removesuffix("_titles.csv")
    bad = BadRows(config.max_bad_rows)
    items = _read_titles(titles_path, bad)
    sources: list[tuple[Path, Part | None]] = [(root / f"{part}.tsv", part) for part in _PARTS if (root / f"{part}.tsv").is_file()]
    if config.sequences is not None:
        sources = [(root / config.sequences, None)]
    elif not sources and (root / f"{name}_pairs.tsv").is_file():
        sources = [(root / f"{name}_pairs.tsv", None)]
    elif "train" not in {part for _, part in sources}:
        raise DataError(
            f"{root}: expected train.tsv (and test.tsv) or {name}_pairs.tsv, found {[path.name for path, _ in sources] or 'neither'}"
        )
    histories: list[History] = []
    taken: dict[int, str] = {}
    for path, part in sources:
        histories.extend(_read_users(path, part, items, taken, bad))
    captions_path, genres_path = _optional(root, name, "captions.json"), _optional(root, name, "genres.json")
    captions = _read_captions(captions_path, items) if captions_path else {}
    genres = _read_genres(genres_path) if genres_path else {}
    cot_files = sorted(path for path in root.glob(f"{name}_*cot.json") if "pseudo" not in path.name)
    if len(cot_files) > 1:
        raise DataError(f"{root}: expected at most one file of traces ({name}_*cot.json), got {', '.join(path.name for path in cot_files)}")
    sft, grpo = _read_reasoning(cot_files[0], set(taken)).values() if cot_files else ({}, {})
    pictures = config.images or root / "images"
    if config.images is not None and not pictures.is_dir():
        raise DataError(f"{pictures}: expected a folder with <item id>.jpg pictures (data.images), found none")
    catalogue = []
    for item in keep_chosen(items, histories):
        picture = pictures / f"{item.id}.jpg"
        image = picture if picture.is_file() else None
        catalogue.append(Item(item.id, item.title, genres.get(item.id, ()), captions.get(item.id, ""), image))
    users = [History(h.user, h.items, sft_reasoning=sft.get(h.user), grpo_reasoning=grpo.get(h.user), part=h.part) for h in histories]
    origin = {
        "reader": "mllmrec",
        "catalogue": titles_path.name,
        "interactions": ", ".join(path.name for path, _ in sources),
        "catalogue_items": str(len(items)),
        "captions": f"{captions_path.name} ({len(captions)})" if captions_path else "",
        "reasoning": f"{cot_files[0].name} ({len(sft.keys() | grpo.keys())})" if cot_files else "",
    }
    return make_dataset(name, catalogue, users, bad_rows=bad.count, origin=origin)


def _list_traces(history: History) -> Iterator[dict[str, Any]]:
    """Rows of the file of traces: one where both stages show the same text."""
    if history.sft_reasoning == history.grpo_reasoning:
        if history.sft_reasoning is not None:
            yield {"user_id": history.user, "reasoning": history.sft_reasoning}
        return
    for stage, text in zip(_STAGES, (history.sft_reasoning, history.grpo_reasoning), strict=True):
        if text is not None:
            yield {"user_id": history.user, "reasoning": text, "stages": [stage]}


@contextlib.contextmanager
def _open_object(path: Path) -> Iterator[Callable[[int, Any], None]]:
    """Yields what writes one entry of a JSON object: all captions of a large catalogue are not put together in memory.

    The file is as `json.dumps(..., indent=1)` would have it; without entries there is none.
    """
    count = 0
    with path.open("w", encoding="utf-8") as file:

        def write_entry(key: int, value: Any) -> None:
            nonlocal count
            text = json.dumps(value, ensure_ascii=False, indent=1).replace("\n", "\n ")
            file.write(f'{"," if count else "{"}\n "{key}": {text}')
            count += 1

        yield write_entry
        file.write("\n}")
    if not count:
        path.unlink()


def _write_items(dataset: Dataset, folder: Path) -> None:
    """Titles, captions, genres and pictures. Items are gone through once: they may be made as they are asked for."""
    path = folder / f"{dataset.name}_titles.csv"
    with (
        path.open("w", encoding="utf-8", newline="") as file,
        _open_object(folder / f"{dataset.name}_captions.json") as write_caption,
        _open_object(folder / f"{dataset.name}_genres.json") as write_genres,
    ):
        titles = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)
        titles.writerow(["item", "title"])
        for item in dataset.items.values():
            titles.writerow([item.id, item.title])
            if item.caption:
                write_caption(item.id, {"caption": item.caption})
            if item.genres:
                write_genres(item.id, list(item.genres))
            if item.image is not None:
                (folder / "images").mkdir(exist_ok=True)
                shutil.copyfile(str(item.image), folder / "images" / f"{item.id}.jpg")


def write_mllmrec(dataset: Dataset, folder: Path) -> None:
    """Writes a data set in the layout at the top of this page, so that `read_mllmrec` gives back the same items and histories.

    Histories that know their part go to train.tsv, valid.tsv and test.tsv, others to `<name>_pairs.tsv`. Times have no place in the
    layout. Pictures are copied. The folder is whole or absent.

    Raises:
      DataError: `folder` exists and is not empty, or only some histories know their part.
      OSError: the disk is full or the folder is not writable.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: expected a new or empty folder to write to, got one with files")
    parts = {history.part for history in dataset.histories}
    if None in parts and len(parts) > 1:
        raise DataError(f"{dataset.name}: expected all users to have a part, or none, got both")

    with new_folder(folder) as scratch:
        _write_items(dataset, scratch)
        for part in parts:
            path = scratch / (f"{part}.tsv" if part else f"{dataset.name}_pairs.tsv")
            with path.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(f"{h.user}\t{' '.join(map(str, h.items))}\n" for h in dataset.histories if h.part == part)
        traces = [row for history in dataset.histories for row in _list_traces(history)]
        if traces:
            (scratch / f"{dataset.name}_cot.json").write_text(json.dumps(traces, ensure_ascii=False, indent=1), encoding="utf-8")
