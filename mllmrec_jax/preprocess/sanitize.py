"""Masks item ids and catalogue titles in a reasoning trace, and lists what it changed; knows the catalogue and no target.

A name that is rare in English is masked wherever it stands. Any other name ("Heat", "Love Story") is masked where a rule says that it is
a mention. `docs/sanitize.md` has the rules in words, with examples and what they were measured to reach; here they stand in the order of
`_find_rule`. Deciding goes on until nothing more is masked, with masks in place of what was, so that sanitising twice changes nothing.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from operator import itemgetter
from typing import Literal, NamedTuple

from mllmrec_jax.preprocess.title_index import (
    ARTICLES,
    FUNCTION_WORDS,
    ID_MASK,
    SENTENCE_END,
    TITLE_MASK,
    Name,
    TitleIndex,
    Word,
    fold_text,
    join_words,
    read_words,
    split_words,
)

__all__ = ["ID_MASK", "TITLE_MASK", "Change", "Sanitised", "TitleIndex", "count_names", "sanitize_trace"]


class Change(NamedTuple):
    """One masked span; `start` and `end` are places in the original text, and `text` is what stood there."""

    kind: Literal["title", "id"]
    text: str
    start: int
    end: int
    item: int | None
    """The item that was named; None for an id outside the catalogue and for a title that several items share."""
    rule: str


class Sanitised(NamedTuple):
    """A trace without ids and titles, and the changes in the order of the text."""

    text: str
    changes: tuple[Change, ...]


_ID = re.compile(
    r"[\[(<{]\s*item[\s_\-#:]*(?:id)?[\s_\-#:]*(?P<bracketed>\d+)\s*[\])>}]"
    r"|(?<![a-z0-9])item(?:[_\-#]|\s*#|[\s_\-]*id[\s_\-#:]*)\s*(?P<marked>\d+)(?![a-z0-9])"
    r"|(?<![a-z0-9])(?:movie|film|product|video)(?:\s*#|[\s_\-]*id[\s_\-#:]*)\s*(?P<noun>\d+)(?![a-z0-9])"
    r"|(?<![a-z0-9])item (?P<bare>\d+)(?![a-z0-9])"
)

_OPEN_QUOTES, _CLOSE_QUOTES = "\"“„«‹‘*_「『《〈<>'", "\"”“»›’*_」』》〉<>'"  # noqa: RUF001
_OPENING = re.compile(rf"(?:[{_OPEN_QUOTES[:-1]}]|(?<![^\W_])'|[«‹„]\s)\Z")  # noqa: RUF001
_CLOSING = re.compile(rf"[.,!?;:…\0]*(?:[{_CLOSE_QUOTES[:-1]}]|'(?![^\W_])|\s[»›“])")  # noqa: RUF001
_YEAR = r"(?:1[89]|20)\d\d"
# "(1995)", behind stops and quotes, and behind another name of the film: "(La Haine) (1995)", "(La Haine, 1995)".
_YEAR_AFTER = re.compile(
    rf"[.!?…\0]*(?P<quotes>[\"”»›’'*_」』》〉]*),?(?:\s*\([^()\n]{{1,60}}\))?\s*[(\[](?:[^()\d\n]{{1,60}},)?\s*(?P<year>{_YEAR})(?:\s+(?:film|movie))?\s*[)\]]"  # noqa: RUF001
)
_YEAR_INSIDE = re.compile(rf"\s*\(\s*{_YEAR}\s*\)")
_STOP = re.compile(r"[.!?:…。！？]|\n")  # noqa: RUF001
_LIST_MARK = re.compile(r"[ \t]*(?:[-*•–]|\(?\d+[.):])?[ \t\"“'*_]*\Z")
_LIST_END = re.compile(r"[ \t\"”'*_.,;!?…\0]*(?:\(\d{4}\))?[ \t\"”'*_.,;]*(?:\n|\Z)")
_BETWEEN_TITLES = re.compile(r"(?:[\s,;/&()\"“”'‘’«»*_]|\band\b|\bor\b|\bplus\b|\bas well as\b|\(\d{4}\))*\Z", re.IGNORECASE)  # noqa: RUF001
_ABBREVIATIONS = read_words("dr mr mrs ms st vs vol no jr sr pt mt sgt lt col gen capt")
_PART_END = re.compile(r"\s?[:(]")

_CUES = read_words(
    "film films movie movies picture classic thriller comedy drama sequel remake blockbuster documentary western musical title titled "
    "entitled called watched watching saw rated enjoyed"
)
_FILM_NOUNS = _CUES | read_words(
    "story tale adventure romance horror entry work masterpiece piece production mystery fantasy adaptation biopic installment noir"
)
_PREDICATES = read_words(
    "stars starring features featuring directed released follows tells explores delves showcases showcased captures blends combines "
    "delivers offers presents stands remains boasts weaves depicts portrays marks exemplifies revolves centers chronicles"
)
_SERIES = read_words("series franchise saga trilogy quadrilogy universe film films movie movies sequel sequels installment installments")
_NAMING = read_words(
    "named character mr mrs ms dr actor actress director king queen captain president portrays plays playing portraying played role as by "
    "sir uncle aunt saint st"
)
MASKS = frozenset({TITLE_MASK, ID_MASK})
# Words that start a sentence and are no part of a name behind them: "In Speed", "Like Heat".
_OPENERS = read_words(
    "in with from like unlike while both and but although though also as for before after since when where if overall the a an his her "
    "its their this that watching director movie film movies films on at by to of or not yet so than then here there until"
)
_PARTICLES = read_words("of de del della di da von van der den du la le")
_DATES = read_words(
    "january february march april may june july august september october november december monday tuesday wednesday thursday friday "
    "saturday sunday english french german spanish italian american british christmas hollywood"
)


class _Text:
    """A folded trace as words; a mask is one word."""

    def __init__(self, source: str):
        self.source = source
        self.folded, self.places = fold_text(source)
        self.words = split_words(self.folded)
        self.look()

    def look(self) -> None:
        """Reads off the case and the sentence starts of the words as they are now."""
        letters = ["" if word.key in MASKS else self.source[self.places[word.start]] for word in self.words]
        self.upper = [letter.isupper() for letter in letters]
        self.lower = [letter.islower() for letter in letters]
        self.starts = [
            place == 0 or (bool(_STOP.search(self.gap(place))) and not (self.gap(place) == ". " and self.key(place - 1) in _ABBREVIATIONS))
            for place in range(len(self.words))
        ]
        self.cased = any(self.upper)
        self.plain_lines: set[int] = set()
        """Lines with a lower-case word of weight: in others (headings) capitals say nothing."""
        self.surnames: set[str] = set()
        """Last words of longer capitalised names ("John Woo")."""
        self.lines, line = [], 0
        for place, word in enumerate(self.words):
            line += "\n" in self.gap(place)
            self.lines.append(line)
            if self.lower[place] and word.key not in FUNCTION_WORDS:
                self.plain_lines.add(line)
            if place and self.upper[place - 1] and self.upper[place] and self.gap(place) == " " and self.key(place - 1) not in _OPENERS:
                self.surnames.add(word.key)

    def gap(self, place: int) -> str:
        """The folded text between word `place` and the one before."""
        start = self.words[place - 1].end if place else 0
        return self.folded[start : self.words[place].start if place < len(self.words) else len(self.folded)]

    def key(self, place: int) -> str:
        """The word at `place`, empty outside the text."""
        return self.words[place].key if 0 <= place < len(self.words) else ""


def _list_candidates(text: _Text, index: TitleIndex) -> Iterator[tuple[int, int, Name]]:
    """(first word, word after the last, name) of every name of the catalogue in what is not masked."""
    for reading in join_words(text.folded, text.words):
        keys = [key for key, _, _ in reading]
        for place, key in enumerate(keys):
            for length in index.lengths.get(key, ()):
                name = index.names.get(" ".join(keys[place : place + length])) if place + length <= len(keys) else None
                first, last = reading[place][1], reading[place + length - 1][2] if name else 0
                if name is None or (not name.stops and any(_ends_sentence(text, inner) for inner in range(first + 1, last))):
                    continue
                if length > 1 and text.key(last - 1) in ARTICLES and not re.fullmatch(r", |[^\s\"“”]*", text.gap(last - 1)):
                    continue  # "Matrix, The", "L.A.", but not "... the Matrix. The"
                if length == 1 and last - first == 2 and text.gap(last - 1) == "'" and text.key(last - 1) == "s":
                    continue  # "John's" is no "Johns"
                yield first, last, name


def _ends_sentence(text: _Text, place: int) -> bool:
    """Whether a sentence ends before the word at `place`: a stop and a space, not behind an abbreviation."""
    before = text.key(place - 1)
    return bool(SENTENCE_END.search(text.gap(place))) and len(before) > 1 and before not in _ABBREVIATIONS


def _touches_name(text: _Text, first: int, last: int) -> bool:
    """Whether capitalised words or masks stand right before or after, so that the span is a part of some longer name."""
    after = last + (text.key(last) in _PARTICLES and text.gap(last) == " ")  # "Laura del Sol"
    if _goes_on(text, after) and (after == last or _goes_on(text, last, case=False)):
        return True
    if not _goes_on(text, first, case=False):
        return False
    before = first - 1
    if text.key(before) in _PARTICLES or (text.key(before) == "the" and text.key(before - 1) == "of"):  # "Man of Steel"
        before -= 1 + (text.key(before) == "the")
        return before >= 0 and _is_name_word(text, before) and not text.starts[before]  # but "Fans of Heat"
    return _is_name_word(text, before) and not (text.starts[before] and text.key(before) in _OPENERS)


def _goes_on(text: _Text, place: int, *, case: bool = True) -> bool:
    """Whether the word at `place` belongs to one name with the word before it: a space, a hyphen, or a stop behind an initial between."""
    if not 0 < place < len(text.words) or (case and not _is_name_word(text, place)):
        return False
    gap = text.gap(place)
    return gap in {" ", "-", "'"} or (gap == ". " and (len(text.key(place - 1)) == 1 or text.key(place - 1) in _NAMING))


def _is_name_word(text: _Text, place: int) -> bool:
    return text.upper[place] or text.key(place) == TITLE_MASK


def _follows_as_film(text: _Text, last: int) -> bool:
    """Whether what comes after speaks of a film: "stars ...", "is a gripping crime thriller"."""
    if last >= len(text.words) or not re.fullmatch(r",? ", text.gap(last)):
        return False
    if text.key(last) in _PREDICATES:
        return True
    return text.key(last) in {"is", "was"} and any(word.key in _FILM_NOUNS for word in text.words[last + 1 : last + 12])


def _neighbours_title(text: _Text, first: int, last: int) -> bool:
    """Whether a masked title stands in the same enumeration: commas, quotes, "and" and years between, and more than spaces."""
    for place in range(first - 1, max(first - 4, -1), -1):
        if text.key(place) == TITLE_MASK:
            return _is_enumeration(text.folded[text.words[place].end : text.words[first].start])
    for place in range(last, min(last + 4, len(text.words))):
        if text.key(place) == TITLE_MASK:
            return _is_enumeration(text.folded[text.words[last - 1].end : text.words[place].start])
    return False


def _is_enumeration(between: str) -> bool:
    return bool(_BETWEEN_TITLES.match(between)) and not between.isspace()


def _find_rule(text: _Text, first: int, last: int, name: Name) -> str | None:
    """The rule by which words [first, last), article included, are a mention of `name`; None where they are not."""
    start, end = text.words[first].start, text.words[last - 1].end
    whole = not _touches_name(text, first, last)
    if name.distinctive and (last - first > 1 or whole):
        return "distinctive"
    opened, closed = _find_quotes(text.folded, start, end)
    if opened and closed:
        return "quoted"
    if (match := _YEAR_AFTER.match(text.folded, end)) and (whole or match["year"] in name.years):
        return "year"
    if text.key(first - 1) == ID_MASK and _BETWEEN_TITLES.match(text.gap(first)):
        return "after id"
    if name.genre:
        return None
    line = text.folded.rfind("\n", max(0, start - 20), start) + 1
    if (line or start <= 20) and _LIST_MARK.match(text.folded[line:start]) and _LIST_END.match(text.folded, end):
        return "line"
    # The words that titles capitalise; not what stands behind an apostrophe ("I'll").
    content = [
        place for place in range(first, last) if text.key(place) not in FUNCTION_WORDS and (place == first or text.gap(place) != "'")
    ]
    content = content or range(first, last)
    small = any(text.lower[place] for place in content)
    capital = any(text.upper[place] for place in content) and not small
    if not whole or (text.cased and small):
        return None
    before = text.key(first - 1)
    single = len(content) == 1
    if single and (opened or closed) and not _PART_END.match(text.gap(last)):  # "Jack and the Beanstalk" in quotes
        return None
    if before in _CUES and text.gap(first) == " ":
        return "film cue"
    if single and text.gap(first) == " " and _is_cast(before, text.key(first - 2)):
        return None
    surname = last - first == 1 and text.key(first) in text.surnames
    if not surname and _neighbours_title(text, first, last):
        return "beside a title"
    if not capital or text.lines[first] not in text.plain_lines:
        return None
    if name.part:  # many are names of persons
        return "series" if text.key(last) in _SERIES or text.key(last - 1).isdigit() else None
    if _follows_as_film(text, last):
        return "subject"
    key = text.key(content[0])
    if single and (key in _DATES or surname or (last - first == 1 and not name.bare)):
        return None
    inside = any(text.upper[place] and not text.starts[place] for place in content)
    return "capitals" if inside or text.key(last - 1).isdigit() else None


def _is_cast(before: str, second: str) -> bool:
    """Whether the two words before a name say that a person or a role follows: "played by", "the role of", but not "such as"."""
    return second in {"role", "character", "part"} if before == "of" else before in _NAMING and (second, before) != ("such", "as")


def _find_quotes(folded: str, start: int, end: int) -> tuple[bool, bool]:
    """Whether a quotation or emphasis opens right before `start`, and whether one closes right after `end`, a year and stops between."""
    after = folded[end : end + 40]
    if match := _YEAR_INSIDE.match(after):
        after = after[match.end() :]
    return bool(_OPENING.search(folded[max(0, start - 3) : start])), bool(_CLOSING.match(after))


def _mask_ids(text: _Text, index: TitleIndex) -> list[Change]:
    changes = []
    for match in _ID.finditer(text.folded):
        digits = match["bracketed"] or match["marked"] or match["noun"] or match["bare"]
        item = int(digits) if len(digits) <= 18 and int(digits) in index.ids else None
        if item is not None or match["bare"] is None:
            changes.append(_replace(text, match.start(), match.end(), "id", item, "id"))
    text.look()
    return changes


def _replace(text: _Text, start: int, end: int, kind: Literal["title", "id"], item: int | None, rule: str) -> Change:
    """Puts one mask in place of the words between two places of the folded text."""
    while start and text.places[start] == text.places[start - 1]:  # whole characters: "½" folds to several
        start -= 1
    while end < len(text.places) and text.places[end] == text.places[end - 1]:
        end += 1
    low = bisect_left(text.words, start, key=lambda word: word.start)
    high = bisect_left(text.words, end, key=lambda word: word.start)
    text.words[low:high] = [Word(ID_MASK if kind == "id" else TITLE_MASK, start, end)]
    first = text.places[start]
    # Up to the next character that folds to something, so that no accent or joiner of the last one is left over.
    last = text.places[end] if end < len(text.places) else len(text.source)
    return Change(kind, text.source[first:last], first, last, item, rule)


def _widen(folded: str, start: int, end: int) -> tuple[int, int]:
    """Takes a closing bracket and the year behind a title into the span, with the quotes where the year stands behind them."""
    if "(" in folded[start:end] and (bracket := re.match(r"\s?\)", folded[end : end + 2])):  # the last of "Seven (Se7en)"
        end += bracket.end() * (folded.count("(", start, end) > folded.count(")", start, end))
    match = _YEAR_AFTER.match(folded, end)
    if match is None:
        return start, end
    if not match["quotes"]:
        return start, match.end()
    opening = folded[max(0, start - len(match["quotes"])) : start]
    balanced = len(opening) == len(match["quotes"]) and all(mark in _OPEN_QUOTES for mark in opening)
    return (start - len(opening), match.end()) if balanced else (start, end)


def _mask_titles(text: _Text, index: TitleIndex) -> list[Change]:
    """One round: masks what the rules find, longer names first."""
    found: list[tuple[int, int, int | None, str]] = []
    taken: set[int] = set()
    candidates = sorted(_list_candidates(text, index), key=lambda candidate: (candidate[0] - candidate[1], candidate[0]))
    for first, last, name in candidates:
        if taken.isdisjoint(range(first, last)):
            first -= name.articled and first > 0 and text.key(first - 1) in ARTICLES and text.gap(first) == " " and first - 1 not in taken
            rule = _find_rule(text, first, last, name)
            if rule is not None:
                taken.update(range(first, last))
                found.append((*_widen(text.folded, text.words[first].start, text.words[last - 1].end), name.item, rule))
    changes, reached = [], -1
    for start, end, item, rule in sorted(found, key=itemgetter(0)):
        if start >= reached:  # a second name in brackets may lie in the span of the first
            changes.append(_replace(text, start, end, "title", item, rule))
            reached = end
    text.look()
    return changes


def sanitize_trace(text: str, index: TitleIndex) -> Sanitised:
    """Masks every item id as `[id]` and every mention of a catalogue title as `[title]`.

    A title's mask takes in the English article before it, where the title has one, and the year in parentheses after it. Text that is
    not masked is left as it is, character for character. Idempotent.
    """
    work = _Text(text)
    changes = _mask_ids(work, index)
    while found := _mask_titles(work, index):
        changes += found
    pieces, kept, place = [], [], 0
    for change in sorted(changes, key=lambda change: (change.start, -change.end)):
        if change.start >= place:  # not inside the brackets that a later round took in with a title's year
            pieces += [text[place : change.start], ID_MASK if change.kind == "id" else TITLE_MASK]
            place = change.end
            kept.append(change)
    return Sanitised("".join([*pieces, text[place:]]), tuple(kept))


def count_names(text: str, index: TitleIndex) -> int:
    """How many times words of `text` could be read as a name of the catalogue, mention or not; masks are none."""
    return sum(1 for _ in _list_candidates(_Text(text), index))
