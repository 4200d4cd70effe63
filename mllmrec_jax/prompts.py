"""Every prompt and the answer grammar: text in, text out, no tokenizer.

A prompt is a tuple of segments. Text that is ours (wording, `<think>` tags) and text that came with the data never share a segment's
meaning: only an `ItemSegment` can become an item token and only a `TagSegment` can become a token of the tokenizer's markup, and neither is
ever built from a string of the catalogue. Nothing here receives a target: `PromptInput` has no such field.

The answer grammar, for which `render_answer` and `parse_answer` are the only writer and reader:

    answer    = "[ITEM_" id "]" [" " title] ["\\n<think>" reasoning "</think>"]
    id        = "0" | digit from 1 to 9, then digits; ASCII only, no leading zeros, at most 18 digits
    title     = characters without a line break, "[ITEM_" or "<think>"

White space around the whole answer is ignored; anything else around it makes the answer unreadable.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from mllmrec_jax.config import ItemField, PromptConfig

OPEN_THINK, CLOSE_THINK = "<think>", "</think>"
_LONGEST_ID = 18  # digits: every such id is an int64

_ITEM = re.compile(r"\[ITEM_(0|[1-9][0-9]{0,17})\]")
_ANSWER = re.compile(
    r"\s*\[ITEM_(?P<id>0|[1-9][0-9]{0,17})\]"
    r"(?:[ \t]+(?P<title>(?:(?!\[ITEM_|</?think>)[^\r\n])*))?"
    r"(?:\s*<think>(?P<reasoning>(?:(?!</?think>).)*)</think>)?\s*\Z",
    re.DOTALL,
)


class PromptError(ValueError):
    """A prompt or answer that cannot be written; the message names the argument, what it must be, and what it was."""


@dataclass(frozen=True, slots=True)
class ItemText:
    """What is written about an item: `[ITEM_<id>] <title> | <detail>`, empty parts left out."""

    id: int
    title: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class PromptInput:
    """What a prompt may know: the past, the candidates in their shown order and, in training prompts only, a reasoning trace."""

    history: tuple[ItemText, ...]
    candidates: tuple[ItemText, ...]
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class TextSegment:
    """Plain text; no part of it may ever become a special token."""

    text: str


@dataclass(frozen=True, slots=True)
class TagSegment:
    """Markup of ours (`<think>`, `</think>`): a token of its own where the tokenizer has one, plain text elsewhere."""

    text: str


@dataclass(frozen=True, slots=True)
class ItemSegment:
    """`[ITEM_<id>]`: one token where items are tokens, plain text elsewhere."""

    id: int
    in_history: bool = False

    @property
    def text(self) -> str:
        return write_item_id(self.id)


Segment = TextSegment | TagSegment | ItemSegment


@dataclass(frozen=True, slots=True)
class Answer:
    """A readable answer; `title` is empty where none was written."""

    item_id: int
    title: str = ""
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class PromptParts:
    """The parts found in a written prompt: item ids as shown, and the reasoning's text where there is one."""

    history: tuple[int, ...]
    candidates: tuple[int, ...]
    reasoning: str | None


def write_item_id(item_id: int) -> str:
    """`[ITEM_<id>]`.

    Raises:
      PromptError: `item_id` is negative or has more than 18 digits.
    """
    if not 0 <= item_id < 10**_LONGEST_ID:
        raise PromptError(f"item id: expected an integer from 0 to 10**{_LONGEST_ID} - 1, got {item_id}; renumber the catalogue")
    return f"[ITEM_{item_id}]"


def _fold_char(char: str) -> str:
    """One character made harmless on its own; may be empty."""
    category = unicodedata.category(char)
    if category in ("Cc", "Zl", "Zp"):  # controls, line and paragraph separators
        return " "
    if category == "Cf":  # bidirectional marks, joiners, tags: invisible, and some tokenizers' normalisers drop them, making new words
        return ""
    if category == "Cs":  # half of a surrogate pair has no UTF-8
        return "\ufffd"
    # Full-width and small forms of the grammar's delimiters turn into the plain ones in tokenizers that normalise to NFKC.
    plain = unicodedata.normalize("NFKC", char)
    return plain if plain in ("[", "<") else char


def _opens_markup(char: str, following: str) -> bool:
    ahead = unicodedata.normalize("NFKC", following)
    if char == "[":
        return ahead.lstrip()[:4].casefold() == "item"
    return bool(ahead) and (ahead[0] in "|/!?" or ahead[0].isalnum())


@functools.lru_cache(maxsize=1 << 15)
def sanitise_text(text: str, max_chars: int | None = None) -> str:
    """Catalogue text made one harmless line: it can pass neither for the answer grammar nor for markup, whatever it holds.

    Line breaks and controls become spaces (runs of space become one), invisible formatting characters go, lone surrogates become U+FFFD,
    `[` before `ITEM` becomes `(`, `<` before anything a tag could start with becomes U+2039, and the result is in NFC (what Qwen's
    tokenizers produce, so that a title survives encoding and decoding unchanged). Idempotent. Characters are only ever replaced in place by
    ones that no pattern uses, so that nothing new can form out of what is left.

    Args:
      text: any string.
      max_chars: a longer result is cut to this many characters, the last one an ellipsis; None does not cut.
    """
    if text.isascii() and text.isprintable():
        folded = text
    else:
        folded = unicodedata.normalize("NFC", "".join(map(_fold_char, unicodedata.normalize("NFC", text))))
    folded = " ".join(folded.split())
    if "[" in folded or "<" in folded:
        chars = list(folded)
        for place, char in enumerate(chars):
            if char in "[<" and _opens_markup(char, folded[place + 1 : place + 33]):
                chars[place] = "(" if char == "[" else "\u2039"
        folded = "".join(chars)
    if max_chars is not None and len(folded) > max_chars:
        folded = folded[: max_chars - 1].rstrip() + "\u2026"
    return text if folded == text else folded  # one string where two would be remembered


def describe_item(
    item_id: int, *, title: str, genres: Sequence[str], caption: str, fields: Sequence[ItemField], config: PromptConfig
) -> ItemText:
    """An item's text with the chosen fields, sanitised; only titles are cut (to `config.max_title_chars` characters)."""
    detail = []
    if "genres" in fields and genres:
        detail.append(sanitise_text(", ".join(genres)))
    if "caption" in fields and caption:
        detail.append(sanitise_text(caption))
    return ItemText(item_id, sanitise_text(title, config.max_title_chars) if "title" in fields else "", " | ".join(filter(None, detail)))


def _after_id(item: ItemText, config: PromptConfig) -> str:
    title, detail = sanitise_text(item.title, config.max_title_chars), sanitise_text(item.detail)
    return (f" {title}" if title else "") + (f" | {detail}" if detail else "")


def _answer_form(config: PromptConfig) -> str:
    return "[ITEM_<id>] <title>" if config.answer_title else "[ITEM_<id>]"


def _full_wording(config: PromptConfig) -> dict[str, str]:
    noun = config.noun
    if config.list_candidates:
        role = f"You recommend {noun}s. You are given the {noun}s one user chose lately and a list of candidates, one of which came next."
        question = f"Which candidate did the user choose next? Reply with that one {noun} alone, copied from the list, as"
    else:
        role = f"You recommend {noun}s. You are given the {noun}s one user chose lately."
        question = f"Which {noun} did the user choose next? Reply with that one {noun} alone, as"
    return {
        "role": role,
        "history": "\n\nChosen so far, oldest first:\n",
        "candidates": "\nCandidates:\n",
        "reasoning": "\nThoughts about this user, for reference only:\n",
        "question": f"\n{question} {_answer_form(config)}",
    }


_COMPACT_WORDING = {"role": "", "history": "history", "candidates": "candidates", "reasoning": "reference", "question": "next"}


def list_wording(config: PromptConfig) -> tuple[str, ...]:
    """The constant texts of `config`'s prompts, for training a tokenizer that knows them."""
    wording = _COMPACT_WORDING if config.style == "compact" else _full_wording(config)
    return tuple(text for text in wording.values() if text)


def render_prompt(prompt: PromptInput, config: PromptConfig) -> tuple[Segment, ...]:
    """The user's message.

    Both styles have the same parts in the same order: history (oldest first), candidates (where `config.list_candidates`), reasoning
    (where given), question. `full` numbers the history and gives each item a line; `compact` writes one word a part, so that a model
    trained from random weights spends its tokens on items.

    Raises:
      PromptError: the history is empty, or candidates should be listed and there are none.
    """
    if not prompt.history:
        raise PromptError("history: expected at least one item, got none")
    if config.list_candidates and not prompt.candidates:
        raise PromptError("candidates: expected at least one item to list, got none; set prompt.list_candidates = false to leave them out")
    full = config.style == "full"
    wording = _full_wording(config) if full else _COMPACT_WORDING
    segments: list[Segment] = [TextSegment(wording["role"] + wording["history"])]
    for number, item in enumerate(prompt.history, start=1):
        if full:
            segments.append(TextSegment(f"{number}. "))
        segments.append(ItemSegment(item.id, in_history=True))
        after = _after_id(item, config)
        if full or after:  # a line break ends the text of an item, and so cannot be part of one
            segments.append(TextSegment(after + "\n"))
    if config.list_candidates:
        segments.append(TextSegment(wording["candidates"]))
        for item in prompt.candidates:
            segments.append(ItemSegment(item.id))
            after = _after_id(item, config)
            if full or after:
                segments.append(TextSegment(after + "\n"))
    if prompt.reasoning is not None:
        segments += [TextSegment(wording["reasoning"]), TagSegment(OPEN_THINK)]
        segments += [TextSegment(sanitise_text(prompt.reasoning)), TagSegment(CLOSE_THINK)]
        if full:
            segments.append(TextSegment("\n"))
    segments.append(TextSegment(wording["question"]))
    return tuple(segments)


def render_answer(item: ItemText, config: PromptConfig, reasoning: str | None = None) -> tuple[Segment, ...]:
    """The assistant's message naming `item`, in the answer grammar; `item.detail` is not part of an answer."""
    segments: list[Segment] = [ItemSegment(item.id)]
    title = sanitise_text(item.title, config.max_title_chars) if config.answer_title else ""
    if title:
        segments.append(TextSegment(f" {title}"))
    if reasoning is not None:
        segments += [TextSegment("\n"), TagSegment(OPEN_THINK), TextSegment(sanitise_text(reasoning)), TagSegment(CLOSE_THINK)]
    return tuple(segments)


def write_segments(segments: Sequence[Segment]) -> str:
    """The segments as one string: what a person reads, and what a decoder gives back."""
    return "".join(segment.text for segment in segments)


def parse_answer(text: str) -> Answer | None:
    """Reads an answer by the grammar above; None where `text` is not one."""
    match = _ANSWER.match(text)
    if match is None:
        return None
    reasoning = match["reasoning"]
    return Answer(int(match["id"]), (match["title"] or "").strip(), None if reasoning is None else reasoning.strip())


def split_prompt(text: str, config: PromptConfig) -> PromptParts:
    """Finds the parts of a written prompt (a whole one, chat template included), from its text alone: what a leak audit reads.

    The marks it looks for end in `[ITEM_` or a tag, or stand between line breaks, none of which sanitised catalogue text can hold.

    Raises:
      PromptError: `text` was not written by `render_prompt` with `config`.
    """
    wording = _full_wording(config) if config.style == "full" else _COMPACT_WORDING
    mark = re.escape(wording["history"]) + (r"(?=1\. \[ITEM_)" if config.style == "full" else r"(?=\[ITEM_)")
    start = re.search(mark, text)
    end = text.rfind(wording["question"])
    if start is None or end < start.end():
        raise PromptError(f"prompt: expected the parts of a {config.style} prompt, got {text[:80]!r}")
    body, reasoning, candidates = text[start.end() : end], None, ""
    opened = body.find(wording["reasoning"] + OPEN_THINK)
    if opened >= 0:
        closed = body.find(CLOSE_THINK, opened)
        if closed < 0:
            raise PromptError(f"prompt: expected {CLOSE_THINK} after the reasoning, got {body[opened : opened + 80]!r}")
        reasoning = body[opened + len(wording["reasoning"] + OPEN_THINK) : closed]
        body = body[:opened]
    if config.list_candidates:
        body, found, candidates = body.partition(wording["candidates"] + "[ITEM_")
        if not found:
            raise PromptError(f"prompt: expected {wording['candidates']!r} and a list of candidates, got {body[-80:]!r}")
        candidates = "[ITEM_" + candidates
    history = tuple(int(found) for found in _ITEM.findall(body))
    return PromptParts(history, tuple(int(found) for found in _ITEM.findall(candidates)), reasoning)


def mentions_title(text: str, title: str) -> bool:
    """Whether `text` names a title: as whole words, with or without a year in brackets at its end.

    Case counts for a single word of fewer than six letters ("It", "Big"), which would otherwise be found everywhere.
    """
    text, title = sanitise_text(text), sanitise_text(title)
    bare = re.sub(r"\s*\(\d{4}\)$", "", title)
    for name in {title, bare} - {""}:
        flags = re.NOFLAG if len(name) < 6 and " " not in name else re.IGNORECASE
        if text.isascii() and name.isascii() and name.lower() not in text.lower():
            continue  # a pattern for every title costs a hundred times as much
        if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, flags):
            return True
    return False
