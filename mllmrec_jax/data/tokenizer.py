"""Text segments to token ids and back, for Hugging Face and SentencePiece tokenizers.

Two kinds of text are encoded in two ways. The chat template is *markup*: its `<|im_start|>` is the tokenizer's special token. The user's
message and the answer are *plain*: no part of them may become an added token, whatever a title holds. `split_special_tokens=True` alone
does not give that (it leaves tokens that are added but not special, such as Qwen's `<think>` or `<tool_call>`), so plain text goes through
a twin of the tokenizer that has no added tokens at all. The template is rendered around a sentinel, cut there, and its two halves are
encoded as markup.

Items: with `item_tokens`, `[ITEM_<id>]` is one token; the ids follow the tokenizer's own, in ascending order of item id. They are kept
outside the tokenizer, so no text can be encoded as one; only an `ItemSegment` can.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mllmrec_jax.config import TokenizerConfig
from mllmrec_jax.data.bpe import train_bpe
from mllmrec_jax.data.tokenizer_backends import Backend, HuggingFaceBackend, SentencePieceBackend, TokenizerError
from mllmrec_jax.prompts import CLOSE_THINK, OPEN_THINK, ItemSegment, Segment, TagSegment, write_item_id

_Encode = Callable[[str, bool], tuple[int, ...]]  # of plain text, and whether nothing stands before it
_SENTINEL = "MLLMREC-MESSAGE-b61f"
_REPLACEMENT = "\ufffd"
_CACHED_TEXTS, _CACHED_CHARS = 1 << 16, 160  # texts between item tokens repeat endlessly; whole prompts do not and are not kept

# Used where a tokenizer has no chat template: the message, a line break, the answer.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ bos_token + message['content'] + '\\n' }}{% endif %}{% endfor %}"
)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
)


def _render_template(template: str, messages: list[dict[str, str]], backend: Backend, *, where: str, answer_follows: bool) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered: Any = render_jinja_template(
            [messages],
            chat_template=template,
            add_generation_prompt=answer_follows,
            enable_thinking=False,
            bos_token=backend.bos,
            eos_token=backend.eos,
        )
    except Exception as error:  # a template may raise whatever it likes
        raise TokenizerError(f"{where}: the chat template failed: {type(error).__name__}: {error}") from error
    return rendered[0][0]


def _split_template(template: str, backend: Backend, *, where: str) -> tuple[str, str]:
    """What stands before and after the user's message; the answer follows the second half."""
    message = {"role": "user", "content": _SENTINEL}
    halves = _render_template(template, [message], backend, where=where, answer_follows=True).split(_SENTINEL)
    if len(halves) != 2:
        raise TokenizerError(
            f"{where}: expected a chat template that writes the user's message once, got one that does so {len(halves) - 1} times"
        )
    before, after = halves
    if after.rstrip().endswith(OPEN_THINK):  # a template of a model that always thinks: close the block, as Qwen3's does for thinking off
        after = f"{after.rstrip()}\n\n{CLOSE_THINK}\n\n"
    return before, after


def _find_turn_end(template: str, backend: Backend, *, where: str) -> int | None:
    """The special token that the template writes after an assistant's message."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SENTINEL}]
    after = _render_template(template, messages, backend, where=where, answer_follows=False).rpartition(_SENTINEL)[2]
    return next((id_ for id_ in backend.encode_markup(after, False) if id_ in backend.markup), None)


def _share_numbers(encode: _Encode) -> _Encode:
    """`encode` with equal ids one object, over all its answers: answers that are kept are half as large."""
    seen: dict[int, int] = {}

    def encode_shared(text: str, first: bool) -> tuple[int, ...]:
        ids = encode(text, first)
        return tuple(map(seen.setdefault, ids, ids))

    return encode_shared


def _hash_json(value: Any) -> str:
    """SHA-256 of `json.dumps(value)`, which is not put together in memory."""
    digest = hashlib.sha256()
    for piece in json.JSONEncoder().iterencode(value):
        digest.update(piece.encode())
    return digest.hexdigest()


class Tokenizer:
    """Encodes prompts and answers; see the module's docstring. Made by `load_tokenizer`."""

    vocab_size: int
    """One more than the largest id, item tokens included: what a model's vocabulary must be at least."""
    pad_id: int
    """Fills what lengths say is not there; may be an ordinary token."""
    stop_ids: tuple[int, ...]
    """Any of these ends an answer; the first is the one `encode_answer` writes."""
    fingerprint: str
    """Content hash of everything that shapes ids: the tokenizer's files, the template, the item tokens."""
    item_range: tuple[int, int] | None
    """First item token and one past the last; None where items are not tokens."""
    template: str
    """Jinja source of the chat template."""

    def __init__(self, backend: Backend, *, template: str, item_ids: Iterable[int] | None, content_hash: str, where: str):
        self._backend = backend
        self.template = template
        before, after = _split_template(template, backend, where=where)
        # A space before the message belongs to the message's first word, in every tokenizer there is.
        self._lead = before[len(before.rstrip(" ")) :]
        before = before.removesuffix(self._lead)
        self._prefix = backend.encode_markup(before, True)
        self._message_first = not any(id_ not in backend.markup for id_ in self._prefix)
        self._suffix = backend.encode_markup(after, False)
        turn_end = _find_turn_end(template, backend, where=where)
        self.stop_ids = tuple(dict.fromkeys([*([] if turn_end is None else [turn_end]), *backend.end_ids]))
        if not self.stop_ids:
            raise TokenizerError(f"{where}: expected a token that ends an answer (eos, or one in the chat template), got none")
        self.pad_id = backend.pad_id
        self._tags = {text: id_ for id_, text in backend.markup.items() if text in (OPEN_THINK, CLOSE_THINK)}
        ordered = sorted(() if item_ids is None else item_ids)
        if any(left == right for left, right in itertools.pairwise(ordered)):
            raise TokenizerError("item_ids: expected each item id once, got duplicates")
        for item in (*ordered[:1], *ordered[-1:]):
            write_item_id(item)  # refuses what the others lie between
        self._items = {item: backend.size + row for row, item in enumerate(ordered)}
        self._item_ids = array("q", ordered)
        self.item_range = (backend.size, backend.size + len(ordered)) if item_ids is not None else None
        self.vocab_size = backend.size + len(ordered)
        shape = [content_hash, template, self.stop_ids, self.pad_id, ordered if item_ids is not None else None]
        self.fingerprint = _hash_json(shape)[:16]
        self._encode_short: _Encode = functools.lru_cache(_CACHED_TEXTS)(_share_numbers(backend.encode_plain))
        if item_ids is None:
            probe = write_item_id(1234567890)
            if (found := backend.decode_plain(backend.encode_plain(probe, False)).strip()) != probe:
                raise TokenizerError(f"{where}: cannot write {probe} (it reads back as {found!r}); set tokenizer.item_tokens = true")

    def _encode_repeated(self, text: str, first: bool) -> tuple[int, ...]:
        return self._encode_short(text, first) if len(text) <= _CACHED_CHARS else self._backend.encode_plain(text, first)

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text on its own, as the tokenizer's library gives them without special tokens; never an added or item token."""
        return list(self._encode_repeated(text, True))

    def _encode_segments(self, segments: Sequence[Segment], ids: list[int], encode: _Encode, *, text: str, first: bool) -> list[int]:
        """Appends to `ids`; `text` is what stands before the first segment. Returns where history items were put."""
        positions = []
        for segment in segments:
            token = None
            if isinstance(segment, ItemSegment) and self.item_range is not None:
                token = self._items.get(segment.id)
                if token is None:
                    raise TokenizerError(f"item {segment.id}: expected one of the {len(self._items)} items with a token of their own")
            elif isinstance(segment, TagSegment):
                token = self._tags.get(segment.text)
            if token is None:
                text += segment.text
                continue
            if text:
                ids += encode(text, first)
                text = ""
            first = False
            if isinstance(segment, ItemSegment) and segment.in_history:
                positions.append(len(ids))
            ids.append(token)
        if text:
            ids += encode(text, first)
        return positions

    def encode_prompt(self, segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
        """The user's message inside the chat template, up to where the answer starts.

        Returns:
          The ids, and the positions of the history's item tokens in them (none where items are not tokens).

        Raises:
          TokenizerError: an item has no token.
        """
        ids = list(self._prefix)
        positions = self._encode_segments(segments, ids, self._encode_repeated, text=self._lead, first=self._message_first)
        ids += self._suffix
        return ids, positions

    def encode_answer(self, segments: Sequence[Segment]) -> list[int]:
        """The answer's ids, ending with `stop_ids[0]`.

        Raises:
          TokenizerError: an item has no token.
        """
        ids: list[int] = []
        # Each item has its own: kept, they would drive out what prompts repeat.
        self._encode_segments(segments, ids, self._backend.encode_plain, text="", first=False)
        ids.append(self.stop_ids[0])
        return ids

    def decode(self, ids: Iterable[int], *, keep_stops: bool = False) -> str:
        """Text of `ids` before the first stop token (of all of them with `keep_stops`).

        Item and added tokens are written as their text, `<think>` included; ids beyond `vocab_size` (a model's vocabulary may be padded)
        as U+FFFD, so that they spoil an answer rather than vanish from it.
        """
        texts, run = [], []
        markup, size = self._backend.markup, self._backend.size
        for id_ in map(int, ids):
            if id_ in self.stop_ids and not keep_stops:
                break
            if 0 <= id_ < size and id_ not in markup:
                run.append(id_)
                continue
            if run:
                texts.append(self._backend.decode_plain(run))
                run = []
            in_items = size <= id_ < self.vocab_size
            texts.append(write_item_id(self._item_ids[id_ - size]) if in_items else markup.get(id_, _REPLACEMENT))
        if run:
            texts.append(self._backend.decode_plain(run))
        return "".join(texts)


def _hash_files(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def load_tokenizer(config: TokenizerConfig, *, item_ids: Iterable[int], texts: Iterable[str] = (), cache: Path | None = None) -> Tokenizer:
    """Loads, or for `train_bpe` trains, the tokenizer that `config` names.

    The chat template is `config.chat_template`, else the tokenizer's own, else `PLAIN_TEMPLATE` (beginning-of-sentence token where there is
    one, the message, a line break, the answer, end-of-sentence token); it is rendered with `enable_thinking=False`.

    Args:
      config: which tokenizer.
      item_ids: the catalogue; used where `config.item_tokens`.
      texts: what `train_bpe` trains on.
      cache: folder where `train_bpe` keeps what it trained.

    Raises:
      TokenizerError: the files are missing or unfit, or the template fails.
    """
    folder_or_file = config.path
    if config.kind == "train_bpe":
        if cache is None:
            raise TokenizerError("cache: expected a folder for the trained tokenizer, got None")
        folder_or_file = train_bpe(texts, vocab_size=config.vocab_size, cache=cache)
    if folder_or_file is None:
        raise TokenizerError(f"tokenizer.path: expected a {config.kind} tokenizer, got nothing")
    where = str(folder_or_file)
    if config.kind == "sentencepiece":
        if not folder_or_file.is_file():
            raise TokenizerError(f"{where}: expected a SentencePiece .model file, found none")
        backend: Backend = SentencePieceBackend(folder_or_file)
        content_hash = _hash_files([folder_or_file])
    else:
        files = [folder_or_file / name for name in _TOKENIZER_FILES if (folder_or_file / name).is_file()]
        if not files:
            raise TokenizerError(f"{where}: expected a Hugging Face folder with tokenizer.json or tokenizer_config.json, found neither")
        backend = HuggingFaceBackend(folder_or_file)
        content_hash = _hash_files(files)
    template = backend.template or PLAIN_TEMPLATE
    if config.chat_template is not None:
        try:
            template = config.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"tokenizer.chat_template: expected a readable Jinja file: {error}") from error
        where = str(config.chat_template)
    return Tokenizer(backend, template=template, item_ids=item_ids if config.item_tokens else None, content_hash=content_hash, where=where)
