from __future__ import annotations

import json
import re
import string
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmrec_jax.config import DataConfig
from mllmrec_jax.data.movielens import read_movielens
from mllmrec_jax.data.records import Item
from mllmrec_jax.preprocess.sanitize import ID_MASK, TITLE_MASK, Sanitised, TitleIndex, sanitize_trace
from mllmrec_jax.preprocess.title_index import list_names

TITLES = {
    1: "Heat (1995)",
    2: "Speed (1994)",
    3: "It (1990)",
    4: "Ghost (1990)",
    5: "Postino, Il (The Postman) (1994)",
    6: "Seven (Se7en) (1995)",
    7: "Matrix, The (1999)",
    8: "Romance (1999)",
    9: "Glimmerfolk Parade (2001)",
    10: "Love Story (1970)",
    11: "Quellbrook's Lantern (1988)",
    12: "Star Voyages: Episode IV - The Amber Gate (1977)",
    13: "M*A*S*H (1970)",
    14: "Jack (1996)",
    15: "Жара (1995)",
    16: "千と千尋の神隠し (2001)",
    17: "기생충 (2019)",
    18: "Wend & Moorhaven II (1991)",
    19: "Cléo de Marsonne (1962)",
    20: "Alien³ (1992)",
    21: "Sgt. Brindle (1996)",
    25: "Johns (1995)",
    22: "Hamlet (1948)",
    23: "Hamlet (1996)",
    24: "Escape from L.A. (1996)",
    123: "8 1/2 (1963)",
}
INDEX = TitleIndex(Item(item, title, ("Drama", "Romance", "War")) for item, title in TITLES.items())
RARE = (
    "glimmerfolk parade",
    "quellbrook's lantern",
    "wend & moorhaven ii",
    "cléo de marsonne",
    "star voyages: episode iv - the amber gate",
)


def mask(text: str) -> str:
    return sanitize_trace(text, INDEX).text


def restore(cleaned: Sanitised) -> str:
    """The original, put together again from what the changes say."""
    pieces = re.split("(" + re.escape(TITLE_MASK) + "|" + re.escape(ID_MASK) + ")", cleaned.text)
    texts = iter(change.text for change in cleaned.changes)
    return "".join(next(texts) if piece in (TITLE_MASK, ID_MASK) else piece for piece in pieces)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('The user liked "Heat" and the colours.', 'The user liked "[title]" and the colours.'),
        ('Earlier came "heat," and it stayed.', 'Earlier came "[title]," and it stayed.'),
        ("Earlier came «Heat».", "Earlier came «[title]»."),
        ("They chose *Speed* twice.", "They chose *[title]* twice."),
        ("They chose <i>Speed</i> twice.", "They chose <i>[title]</i> twice."),
        ("After Speed (1994) came a comedy.", "After [title] came a comedy."),
        ('After "Speed" (1994) came a comedy.', "After [title] came a comedy."),
        ("The film Ghost was next.", "The film [title] was next."),
        ("the film ghost was next.", "the film [title] was next."),
        ("Fans of Heat might stay.", "Fans of [title] might stay."),
        ("Speed stars a bus driver who never stops.", "[title] stars a bus driver who never stops."),
        ("Heat is a gripping crime film about two men.", "[title] is a gripping crime film about two men."),
        ('They saw "Heat", Speed and Ghost there.', 'They saw "[title]", [title] and [title] there.'),
        ("Chosen:\n1. Ghost\n2. Speed (1994)\n", "Chosen:\n1. [title]\n2. [title]\n"),
        ("He returned to The Matrix again.", "He returned to [title] again."),
        ("He returned to Matrix, The (1999) again.", "He returned to [title] again."),
        ("the Matrix's green light is here", "[title]'s green light is here"),
        ("A pick like Il Postino or The Postman shows it.", "A pick like [title] or [title] shows it."),
        ("A pick like Seven (Se7en) (1995) shows it.", "A pick like [title] shows it."),
        ("in the mood of GLIMMERFOLK   parade today", "in the mood of [title] today"),
        ("in the mood of glimmer\u200bfolk-parade today", "in the mood of [title] today"),
        ("one more quellbrooks lantern night", "one more [title] night"),
        ("one more Quellbrook’s Lantern night", "one more [title] night"),
        ("wend and moorhaven 2 was calm", "[title] was calm"),
        ("a bit of Ｃｌｅｏ　ｄｅ　Ｍａｒｓｏｎｎｅ here", "a bit of [title] here"),
        ("a bit of " + unicodedata.normalize("NFD", "Cléo de Marsonne") + " here", "a bit of [title] here"),
        ('the warmth of "The Amber Gate" and the Star Voyages saga', 'the warmth of "[title]" and the [title] saga'),
        ("the humour of MASH and M.A.S.H runs on", "the humour of [title] and [title] runs on"),
        ("the dread of «Alien 3» and «Alien³»", "the dread of «[title]» and «[title]»"),
        ("Фильм «Жара» о двух людях.", "Фильм «[title]» о двух людях."),
        ("昨日『千と千尋の神隠し』を見た。", "昨日『[title]』を見た。"),
        ("昨日千と千尋の神隠しを見た。", "昨日[title]を見た。"),
        ("영화 <기생충>은 좋다", "영화 <[title]>은 좋다"),
        ("a film such as Sgt. Brindle helps", "a film such as [title] helps"),
        ("known for Escape from L.A. and more", "known for [title]. and more"),
        ('the dream of "8 1/2" and "8½"', 'the dream of "[title]" and "[title]"'),
        ("Next is [ITEM_1] Heat on the list.", "Next is [id] [title] on the list."),
        ("Take [ITEM_123], [ item 9 ] or item_7.", "Take [id], [id] or [id]."),
        ("Take [ITEM_99999999999999999999] now.", "Take [id] now."),
        ("It has movie ID: 77, item #5 and item 123.", "It has [id], [id] and [id]."),
        ("Take ［ＩＴＥＭ＿１２３］ or [IT\u200bEM_7].", "Take [id] or [id]."),
    ],
)
def test_mentions_are_masked(text: str, expected: str) -> None:
    cleaned = sanitize_trace(text, INDEX)
    assert cleaned.text == expected
    assert restore(cleaned) == text
    assert all(text[change.start : change.end] == change.text for change in cleaned.changes)


@pytest.mark.parametrize(
    "text",
    [
        "In the heat of the moment they speed away; it was a ghost of an idea.",
        "It rains. Speed matters. Heat rises.",
        "Seven times the seven dwarfs went home.",
        "A tender love story, full of romance and the war.",
        "The genres are Drama, Romance and War.",
        "The Man of Speed, the King of Heat and the Miami Heat are other names.",
        "Jack Nicholson and Peter Jack meet Jack del Sol.",
        'He read "Jack and the Beanstalk" and "The Return of Jack" at night.',
        "The role of Jack is small.",
        "We met John's mother there.",
        "A matrix of colours, an item on the list, 8 of 9 items.",
        "In war. The matrix of things stays.",
        "Step 4: Heat And Speed Of Taste",
        "Поэтому стоит жара.",
        "",
        " \n\t",
    ],
)
def test_ordinary_words_stay(text: str) -> None:
    assert sanitize_trace(text, INDEX) == Sanitised(text, ())


def test_changes_say_what_was_named() -> None:
    cleaned = sanitize_trace('Take [ITEM_7], item_500, "Heat" and "Hamlet".', INDEX)
    assert [(change.kind, change.text, change.item) for change in cleaned.changes] == [
        ("id", "[ITEM_7]", 7),
        ("id", "item_500", None),
        ("title", "Heat", 1),
        ("title", "Hamlet", None),
    ]
    assert [change.rule for change in cleaned.changes] == ["id", "id", "quoted", "quoted"]


@st.composite
def respell(draw: st.DrawFn, names: tuple[str, ...] = RARE) -> str:
    """A rare title with random case, and random marks or spaces between its words."""
    name = draw(st.sampled_from(names))
    words = [word for word in re.split(r"[^\w']+", name) if word]
    words = ["and" if word == "&" else word for word in words] if "&" not in name else name.split()
    gaps = draw(st.lists(st.sampled_from([" ", "  ", "-", ", ", " - ", ": ", "_", "\u00a0", "\u2013"]), min_size=9, max_size=9))
    upper = iter(draw(st.lists(st.booleans(), min_size=len(name), max_size=len(name))))
    spelled = "".join(char for word, gap in zip(words, gaps, strict=False) for char in [*word, gap])
    return "".join(char.upper() if next(upper, False) else char for char in spelled).rstrip(" -,:_\u2013\u00a0")


AROUND = st.text(st.sampled_from("abc xyz,.\n!?()'\"ÄжZ7"), max_size=30)


@given(AROUND, respell(), AROUND)
def test_planted_titles_are_found(before: str, title: str, after: str) -> None:
    cleaned = sanitize_trace(f"{before} {title} {after}", INDEX)
    start = len(before) + 1
    assert any(change.start <= start and change.end >= start + len(title) for change in cleaned.changes), cleaned


@given(st.text(st.sampled_from(string.ascii_letters + string.digits + " .,:;!?\"'()\n-*_éжß½²"), max_size=200))
def test_text_without_a_title_is_unchanged(text: str) -> None:
    index = TitleIndex([Item(1, "Zqxjk Vwqzx (1999)"), Item(2, "Qzzkx (1999)")])
    if "zq" not in text.lower() and "qz" not in text.lower():
        assert sanitize_trace(text, index) == Sanitised(text, ())


NAMES = [*(name for title in TITLES.values() for name in list_names(title)), *TITLES.values(), *RARE]
WORDS = ["heat", "the", "The", "A", "and", "film", "of", "(1995)", "[ITEM_1]", "item 7", "[title]", "[id]", "is", "stars", "Jack", "such"]
MARKS = [" ", ", ", ". ", '"', "'", "“", "”", "*", "\n", "- ", "-", "'s", ":", "(", ")", "½", "\u0301", "\u200b", "千"]
PIECES = st.sampled_from([*NAMES, *WORDS, *MARKS])


@given(st.lists(PIECES, max_size=14).map("".join) | st.lists(PIECES, max_size=14).map(" ".join) | st.text(max_size=80))
def test_sanitising_twice_changes_nothing_more(text: str) -> None:
    once = sanitize_trace(text, INDEX)
    assert sanitize_trace(once.text, INDEX).text == once.text
    ends = [0, *(change.end for change in once.changes)]
    assert all(end <= change.start < change.end for end, change in zip(ends, once.changes, strict=False))
    assert all(text[change.start : change.end] == change.text for change in once.changes)


@given(st.lists(PIECES, max_size=14).map(" ".join))
def test_no_rare_title_is_left(text: str) -> None:
    words = " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", mask(text)).casefold()))
    for name in ("glimmerfolk parade", "quellbrook s lantern", "cléo de marsonne", "star voyages episode iv the amber gate"):
        assert f" {name} " not in f" {words} "


def test_hostile_titles() -> None:
    long = "Wandering " * 1000 + "Thrumwick"
    index = TitleIndex([Item(1, ""), Item(2, " () (1999)"), Item(3, "[title]"), Item(4, "\u200b"), Item(5, long), Item(6, "a" * 10_000)])
    assert sanitize_trace(f"about {long} again", index).text == "about [title] again"
    assert sanitize_trace(f"about {'a' * 10_000} again", index).text == "about [title] again"
    assert sanitize_trace("Wandering " * 2000, index).text == "Wandering " * 2000
    plain = "nothing () [title] [id] \ud800 here"
    assert sanitize_trace(plain, index) == Sanitised(plain, ())


def test_a_part_belongs_to_no_other_title() -> None:
    index = TitleIndex([Item(1, "Star Voyages: The Amber Gate"), Item(2, "Star Voyages"), Item(3, "Star Voyages: Dusk of Kings")])
    changes = sanitize_trace('"The Amber Gate" and "Star Voyages"', index).changes
    assert [change.item for change in changes] == [1, 2]


@pytest.mark.slow
def test_a_hundred_thousand_titles() -> None:
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("an", "el", "ir", "on", "um")]
    items = [
        Item(number, f"{syllables[number % 70]}{syllables[number // 70 % 70]} of {syllables[number // 4900 % 70]}mere {number} (1999)")
        for number in range(100_000)
    ]
    index = TitleIndex(items)
    sentence = "For viewers who enjoy the muted light of {} the next pick will feel familiar, with colour and calm. "
    short, long = ("".join(sentence.format(items[7 * place].title) for place in range(count)) for count in (20, 200))
    started = time.perf_counter()
    assert len(sanitize_trace(short, index).changes) == 20
    middle = time.perf_counter()
    assert len(sanitize_trace(long, index).changes) == 200
    ended = time.perf_counter()
    assert ended - middle < 40 * (middle - started), "ten times the text takes ten times as long"


def test_real_texts(shared_data: Path) -> None:
    """Held on MovieLens titles and on 400 descriptions a language model wrote of them."""
    dataset = read_movielens(DataConfig(path=shared_data / "ml-1m", sequences="sequences_5core.txt"))
    index = TitleIndex(dataset.items.values())
    titles = list(dataset.items.values())[::5]
    forms = {
        "quoted": 'Last week she saw "{name}" with a friend and liked the colours.',
        "with a year": "Other choices, such as {name} ({year}), share the dark palette.",
        "in a list": "Step 1: what was chosen.\n- {name}\n- something else entirely",
        "in a sentence": "For viewers who enjoy {name} the muted light will feel familiar.",
        "by id": "The choice [ITEM_{id}] {name} is close to the history.",
    }
    for form, wording in forms.items():
        found = 0
        for item in titles:
            name = next(iter(reversed([*list_names(item.title)][:2])) if item.title.count(", ") else iter(list_names(item.title)))
            text = wording.format(name=name, year=item.title[-5:-1], id=item.id)
            cleaned = sanitize_trace(text, index)
            found += any(change.kind == "title" for change in cleaned.changes) and name not in cleaned.text
        assert found >= 0.99 * len(titles), form

    texts = json.loads((shared_data / "ml-1m-text" / "colakg_llm_response_item.json").read_text(encoding="utf-8"))
    sentences = changed = named = missed = 0
    for item, text in list(texts.items())[::10]:
        cleaned = sanitize_trace(text, index)
        places = [match.end() for match in re.finditer(r"[.!?][\"”]?\s+(?=[\"“A-Z])", text)]
        sentences += len(places) + 1
        changed += len({sum(place <= change.start for place in places) for change in cleaned.changes})
        title = list_names(dataset.items[int(item)].title) if int(item) in dataset.items else iter(())
        for quoted in [f'"{name}"' for name in title]:
            named += text.count(quoted)
            missed += cleaned.text.count(quoted)
    assert named > 50 and missed <= 0.01 * named
    assert 0.5 < changed / sentences < 0.65
