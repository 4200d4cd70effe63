"""The catalogue's titles in a form that text can be searched for: folding, words, names, and how rare a name is.

Folding makes spellings of one title equal: case, accents, width, apostrophes, invisible characters, Roman numerals, `&`. A *name* is a
sequence of folded words that stands for one or more items: the title itself, the names in parentheses behind it, with the article in front
("Matrix, The" is "the matrix") and without, and the parts before and after a colon where they say enough by themselves.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from spellchecker import SpellChecker

from mllmrec_jax.data.records import Item

TITLE_MASK, ID_MASK = "[title]", "[id]"

ARTICLES = frozenset({"the", "a", "an"})
_MOVED_ARTICLE = re.compile(
    r"^(?P<head>.+?),\s*(?P<article>the|an?|las?|le|les|los|el|il|lo|gli|i|das|der|die|den|det|ein|eine|une?|o|os|as|l['’])"  # noqa: RUF001
    r"\s*(?P<tail>:.*)?$",
    re.IGNORECASE,
)
_YEAR = re.compile(r"\(\s*(?:1[89]|20)\d\d[^)]*\)\s*$")
_GROUP = re.compile(r"\(([^()]*)\)")
_ALIAS_MARK = re.compile(r"^\s*(?:a\.?\s?k\.?\s?a\.?|aka|also known as|or)\s+", re.IGNORECASE)
_PART = re.compile(r"(?:\s+or)?\s*:\s+|\s+[-–—]\s+", re.IGNORECASE)

SENTENCE_END = re.compile(r"(?<!\.)[.;][\"”’')\]]*\s|\n\s*\n")  # noqa: RUF001

# Words of scripts that are written without spaces are single characters (a Hangul syllable after NFKD is two or three).
_UNSPACED = (
    r"[\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff][\u3099\u309a]?"
    r"|[\u1100-\u115f][\u1160-\u11a7]*[\u11a8-\u11ff]*"
)
_WORD = re.compile(rf"{re.escape(TITLE_MASK)}|{re.escape(ID_MASK)}|{_UNSPACED}|(?:(?!{_UNSPACED})[^\W_])+|&")
_UNSPACED_WORD = re.compile(rf"(?:{_UNSPACED})\Z")
_GLUE = re.compile(r"[^\w\s\"“”«»()\[\]<>]{1,3}\Z|_\Z")

_LETTERS = {"æ": "ae", "œ": "oe", "ø": "o", "đ": "d", "ð": "d", "ł": "l", "þ": "th", "ı": "i"} | dict.fromkeys("‘’`´ʼʻ′", "'")  # noqa: RUF001
_ROMAN = {"ii": "2", "iii": "3", "iv": "4", "vi": "6", "vii": "7", "viii": "8", "ix": "9"}

# A name of several words whose chance in English text is below 1e-11, were words independent, is a mention wherever it stands.
_DISTINCTIVE = 11.0
_UNKNOWN_ENGLISH, _UNKNOWN_FOREIGN, _UNSPACED_CHARACTER = 8.0, 4.5, 2.5  # -log10 of the chance of a word that the list does not have


def read_words(words: str) -> frozenset[str]:
    """A set out of words with spaces between."""
    return frozenset(words.split())


# Words that titles write in lower case, or that say nothing by themselves.
FUNCTION_WORDS = read_words(
    "a an the and or nor but of in on at to for from with by as into over under up vs versus part episode volume vol chapter movie film "
    "is it its if de la le les el il du des der die das et y"
)


class Word(NamedTuple):
    """A folded word; `start` and `end` are places in the folded text."""

    key: str
    start: int
    end: int


class Name(NamedTuple):
    """What a sequence of words stands for."""

    item: int | None
    """The item it names; None where several items share the name."""
    distinctive: bool
    """So rare in English text that it is a mention in any context."""
    part: bool
    """A part of a longer title, before or after a colon."""
    genre: bool
    """Also the name of a genre."""
    years: tuple[str, ...]
    """Years that the catalogue has behind it."""
    stops: bool
    """Has a full stop inside, as in "Sgt. Bilko"."""
    articled: bool
    """Stands for a title with an English article in front, which a mention may have or lack."""
    bare: bool
    """Stands for a title without an English article in front."""


@functools.lru_cache(maxsize=1 << 14)
def _fold_char(char: str) -> str:
    category = unicodedata.category(char)
    if category == "Cf":  # joiners, marks of direction, soft hyphens: invisible
        return ""
    parts = unicodedata.normalize("NFKD", _LETTERS.get(char.lower(), char))
    # Accents go; the classes kept change a word (Indic nukta and virama, kana voicing).
    folded = "".join(part for part in parts if not (10 <= unicodedata.combining(part) <= 36 or unicodedata.combining(part) >= 200))
    folded = "".join(_LETTERS.get(part, part) for part in folded.casefold().replace("\u2044", "\0"))  # the fraction slash
    return f"\0{folded}\0" if category == "No" else folded  # superscripts and fractions are words of their own


def fold_text(text: str) -> tuple[str, Sequence[int]]:
    """The folded text, and for each of its characters the place in `text` that it comes from."""
    if text.isascii():
        return text.lower().replace("`", "'"), range(len(text))
    pieces = [_fold_char(char) for char in text]
    return "".join(pieces), [place for place, piece in enumerate(pieces) for _ in piece]


def split_words(folded: str) -> list[Word]:
    """Words of a folded text in order; a mask is a word, punctuation is between words."""
    words = []
    for match in _WORD.finditer(folded):
        key = match.group()
        words.append(Word("and" if key == "&" else _ROMAN.get(key, key), match.start(), match.end()))
    return words


def join_words(folded: str, words: Sequence[Word]) -> Iterator[list[tuple[str, int, int]]]:
    """The readings of a run of words, as (key, first word, word after the last).

    Every word by itself; words joined across an apostrophe ("bug's" as "bugs"); across any punctuation without space ("Face/Off" as
    "faceoff"). Readings that equal an earlier one are left out.
    """
    split = [(word.key, place, place + 1) for place, word in enumerate(words)]
    yield split
    glue = []
    for left, right in itertools.pairwise(words):
        gap = folded[left.end : right.start]
        masked = left.key in (TITLE_MASK, ID_MASK) or right.key in (TITLE_MASK, ID_MASK)
        glue.append("" if masked or not _GLUE.match(gap) else "'" if gap == "'" else "-")
    seen = {frozenset()}
    for joiners in ("'", "'-"):
        joined_at = frozenset(place for place, mark in enumerate(glue) if mark and mark in joiners)
        if joined_at in seen:
            continue
        seen.add(joined_at)
        reading: list[tuple[str, int, int]] = []
        for key, start, end in split:
            if start - 1 in joined_at:
                before = reading.pop()
                reading.append((before[0] + words[start].key, before[1], end))
            else:
                reading.append((key, start, end))
        yield reading


@functools.cache
def _count_english() -> tuple[dict[str, int], float]:
    counts = dict(SpellChecker(language="en").word_frequency.dictionary)
    return counts, math.log10(sum(counts.values()))


def count_word(key: str) -> int:
    """How often a folded word is counted in the English frequency list (1.6e9 words of film dialogue); 0 for a word it does not have."""
    return _count_english()[0].get(key, 0)


def _measure_surprise(keys: Iterable[str]) -> float:
    """-log10 of the chance of these words in English text, were words independent."""
    counts, total = _count_english()
    surprise = 0.0
    for key in keys:
        if key in FUNCTION_WORDS:
            surprise += 0.5
        elif _UNSPACED_WORD.match(key):
            surprise += _UNSPACED_CHARACTER
        elif key.isdigit():
            surprise += min(len(key), 4) / 2
        elif key in counts:
            surprise += total - math.log10(counts[key])
        elif len(key) <= 2:
            surprise += 3.0
        else:
            surprise += _UNKNOWN_ENGLISH if key.isascii() else _UNKNOWN_FOREIGN
    return surprise


def _is_distinctive(keys: Sequence[str]) -> bool:
    """Whether a name is a mention in any context: several words that are rare together, or one long word unknown to English."""
    if len(keys) == 1:
        return keys[0].isascii() and keys[0].isalpha() and len(keys[0]) >= 6 and not count_word(keys[0])
    return _measure_surprise(keys) >= _DISTINCTIVE


def list_names(title: str) -> Iterator[str]:
    """The ways a title is written, without the year: whole, without what stands in brackets, what stands in brackets; articles moved."""
    title = _YEAR.sub("", title)
    aliases = [alias for group in _GROUP.findall(title) for alias in [_ALIAS_MARK.sub("", group)] if alias.strip()]
    main = _GROUP.sub(" ", title)
    if main != title:
        yield title.strip()
    for name in (main, *aliases):
        name = name.strip()
        yield name
        if match := _MOVED_ARTICLE.match(name):
            space = "" if match["article"][-1] in "'’" else " "  # noqa: RUF001
            yield f"{match['article']}{space}{match['head']}{match['tail'] or ''}"
            if " " in match["head"]:
                yield match["head"]


def _list_keys(name: str) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The readings of a name, and whether its words are distinctive (a joined "hardboiled" is as common as "hard-boiled")."""
    folded, _ = fold_text(name)
    distinctive = None
    for reading in join_words(folded, split_words(folded)):
        keys = tuple(key for key, _, _ in reading)
        if distinctive is None:
            distinctive = _is_distinctive(keys[1:] if keys and keys[0] in ARTICLES else keys)
        yield keys, distinctive


class TitleIndex:
    """The names of a catalogue, built once. Look-ups are by joined words; `lengths` says which lengths are worth trying."""

    def __init__(self, items: Iterable[Item]):
        self.ids: set[int] = set()
        self.names: dict[str, Name] = {}
        self.lengths: dict[str, tuple[int, ...]] = {}
        """First word of a name -> lengths (words) of the names that start with it, longest first."""
        genres: set[str] = set()
        for item in items:
            self.ids.add(item.id)
            genres.update(" ".join(keys) for genre in item.genres for keys, _ in _list_keys(genre))
            years = tuple(re.findall(r"\d{4}", "".join(_YEAR.findall(item.title))))
            for name in list_names(item.title):
                for keys, distinctive in _list_keys(name):
                    self._add(keys, item.id, distinctive, years=years, stops=bool(SENTENCE_END.search(name)))
                parts = [part for part in _PART.split(name) if part]
                for part in parts if len(parts) > 1 else ():
                    for keys, _ in _list_keys(part):
                        weight = sum(key not in FUNCTION_WORDS and not key.isdigit() for key in keys)
                        if weight >= 2 or (weight and keys[-1].isdigit()):  # "Star Wars", "Terminator 2", but no "Mission"
                            self._add(keys, item.id, False, part=True)
        lengths: dict[str, set[int]] = {}
        for key in self.names:
            first, *rest = key.split(" ")
            lengths.setdefault(first, set()).add(1 + len(rest))
        self.lengths = {first: tuple(sorted(found, reverse=True)) for first, found in lengths.items()}
        for genre in genres & self.names.keys():
            self.names[genre] = self.names[genre]._replace(genre=True, distinctive=False)

    def _add(
        self,
        keys: tuple[str, ...],
        item: int,
        distinctive: bool,
        *,
        part: bool = False,
        years: tuple[str, ...] = (),
        stops: bool = False,
    ) -> None:
        articled = len(keys) > 1 and keys[0] in ARTICLES
        key = " ".join(keys[articled:])
        if not key:
            return
        known = self.names.get(key, Name(item, distinctive, part, False, years, stops, articled, not articled))
        # A part gives way to a title of the same words: "Star Wars" to a film of that name.
        owner = item if known.part and not part else known.item if known.item == item or part > known.part else None
        self.names[key] = Name(
            owner,
            distinctive=known.distinctive or distinctive,
            part=known.part and part,
            genre=False,
            years=known.years if set(years) <= set(known.years) else known.years + years,
            stops=known.stops or stops,
            articled=known.articled or articled,
            bare=known.bare or not articled,
        )
