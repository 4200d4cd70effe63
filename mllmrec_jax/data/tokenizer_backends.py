"""The two tokenizer libraries behind one face: plain text, markup, and what each file says about itself."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mllmrec_jax.data.bpe import END_OF_TEXT

_PARTS = ("normalizer", "pre_tokenizer", "decoder")  # of a tokenizer.json, beside its model


class TokenizerError(ValueError):
    """A tokenizer that cannot be used, or something it cannot encode; the message names what, where, and what was expected."""


class Backend(Protocol):
    """What a tokenizer library must give.

    `encode_plain` never gives an id of `markup`; `encode_markup` gives one wherever its text stands. `first` says whether nothing stands
    before the text (libraries put a space before the first word); `decode_plain` adds and removes no space.
    """

    size: int  # one more than the largest id
    markup: Mapping[int, str]  # ids that plain text never becomes -> their text
    bos: str
    eos: str
    pad_id: int
    end_ids: tuple[int, ...]  # ids the library's own files name as ends, most usual first
    template: str | None

    def encode_plain(self, text: str, first: bool) -> tuple[int, ...]: ...

    def encode_markup(self, text: str, first: bool) -> tuple[int, ...]: ...

    def decode_plain(self, ids: Sequence[int]) -> str: ...


def _make_encodable(text: str) -> str:
    """Joins surrogate pairs and replaces lone surrogates, which have no UTF-8."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _drop_prefix_space(spec: Any) -> Any:
    """A tokenizer.json normalizer, pre-tokenizer or decoder that neither adds nor removes a space where its text begins."""
    if isinstance(spec, list):
        return [part for part in map(_drop_prefix_space, spec) if part is not None]
    if not isinstance(spec, dict):
        return spec
    if spec.get("type") in ("Prepend", "Strip"):
        return None
    changed = {key: _drop_prefix_space(value) for key, value in spec.items()}
    if spec.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
    if spec.get("type") == "ByteLevel":
        changed["add_prefix_space"] = False
    return changed


def _make_plain(full: Any, frame: Any) -> Any:
    """A tokenizer with the (shared) vocabulary of `full`, the other parts of `frame`, and no added tokens."""
    plain = type(full)(full.model)
    for name in _PARTS:
        setattr(plain, name, getattr(frame, name))
    return plain


class HuggingFaceBackend:
    def __init__(self, folder: Path):
        from tokenizers import Tokenizer as RustTokenizer
        from tokenizers import models
        from transformers import AutoTokenizer

        try:
            loaded: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # the library raises anything from KeyError to its own types
            raise TokenizerError(f"{folder}: expected a Hugging Face tokenizer folder: {type(error).__name__}: {error}") from error
        if not loaded.is_fast:
            raise TokenizerError(
                f"{folder}: expected a tokenizer that the `tokenizers` library runs (tokenizer.json), got {type(loaded).__name__}"
            )
        self._full = loaded.backend_tokenizer
        frame = RustTokenizer(models.BPE())  # the parts without the vocabulary, as JSON of a few lines
        for name in _PARTS:
            setattr(frame, name, getattr(self._full, name))
        spec = json.loads(frame.to_str())
        later = spec | {name: _drop_prefix_space(spec[name]) for name in _PARTS}
        self._plain = _make_plain(self._full, frame)
        self._plain_later = self._plain if later == spec else _make_plain(self._full, RustTokenizer.from_str(json.dumps(later)))

        vocabulary = self._full.get_vocab(with_added_tokens=True)
        self.size = 1 + max(vocabulary.values())
        self.markup: Mapping[int, str] = {id_: token.content for id_, token in self._full.get_added_tokens_decoder().items()}
        unknown = getattr(self._full.model, "unk_token", None)
        ends = [loaded.eos_token_id, vocabulary.get(END_OF_TEXT), *_read_generation_ends(folder)]
        self.end_ids = tuple(id_ for id_ in ends if id_ is not None)
        # Text with characters the vocabulary lacks becomes `unk`; it is kept out of plain text only where it would end or pad something.
        self._never = frozenset(id_ for id_, text in self.markup.items() if text != unknown or id_ in self.end_ids)
        self.bos, self.eos = loaded.bos_token or "", loaded.eos_token or ""
        pads = (loaded.pad_token_id, vocabulary.get(unknown), *self.end_ids, 0)
        self.pad_id = next(id_ for id_ in pads if id_ is not None)
        self.template: str | None = loaded.get_chat_template() if loaded.chat_template else None

    def encode_plain(self, text: str, first: bool) -> tuple[int, ...]:
        ids = (self._plain if first else self._plain_later).encode(_make_encodable(text), add_special_tokens=False).ids
        return tuple(id_ for id_ in ids if id_ not in self._never)

    def encode_markup(self, text: str, first: bool) -> tuple[int, ...]:
        del first
        return tuple(self._full.encode(text, add_special_tokens=False).ids)

    def decode_plain(self, ids: Sequence[int]) -> str:
        return self._plain_later.decode(list(ids), skip_special_tokens=False)


def _read_generation_ends(folder: Path) -> list[int]:
    file = folder / "generation_config.json"
    if not file.is_file():
        return []
    ends = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


class SentencePieceBackend:
    # Appended to a serialised model, this is a second `normalizer_spec` (field 3), which protobuf merges into the first:
    # add_dummy_prefix (field 3) and remove_extra_whitespaces (field 4) off. Text that follows other text needs both off.
    _NO_SPACE_CHANGES = b"\x1a\x04\x18\x00\x20\x00"

    def __init__(self, file: Path):
        from sentencepiece import SentencePieceProcessor

        try:
            model = file.read_bytes()
            self._first = SentencePieceProcessor(model_proto=model)
            self._later = SentencePieceProcessor(model_proto=model + self._NO_SPACE_CHANGES)
            self.size = self._first.vocab_size()
        except (OSError, RuntimeError, ValueError) as error:
            raise TokenizerError(f"{file}: expected a SentencePiece model: {error}") from error
        if self._first.eos_id() < 0:
            raise TokenizerError(f"{file}: expected a SentencePiece model with an end-of-sentence piece (eos), got one without")
        pieces = {id_: self._first.id_to_piece(id_) for id_ in range(self.size)}
        controls = {id_: piece for id_, piece in pieces.items() if self._first.is_control(id_)}
        # Pieces a model's author defined are matched in any text; those that look like markup are treated as special.
        ordinary = (self._first.is_control, self._first.is_unknown, self._first.is_byte)
        written = {id_: piece for id_, piece in pieces.items() if re.fullmatch(r"<.+>|\[.+\]", piece) and not any(f(id_) for f in ordinary)}
        defined = {id_: piece for id_, piece in written.items() if self._first.encode(piece)[-1:] == [id_] and len(piece) > 2}
        self.markup: Mapping[int, str] = controls | defined
        self._ids = {piece: id_ for id_, piece in controls.items()}
        self._control = re.compile("(" + "|".join(map(re.escape, self._ids)) + ")")
        self._defined = re.compile("|".join(map(re.escape, defined.values()))) if defined else None
        self.bos = pieces[self._first.bos_id()] if self._first.bos_id() >= 0 else ""
        self.eos = pieces[self._first.eos_id()]
        self.pad_id = self._first.pad_id() if self._first.pad_id() >= 0 else self._first.unk_id()
        self.end_ids = (self._first.eos_id(),)
        self.template: str | None = None

    def encode_plain(self, text: str, first: bool) -> tuple[int, ...]:
        text = _make_encodable(text)
        # Cut after the first character of anything that would become a piece of markup.
        cuts = [match.start() + 1 for match in self._defined.finditer(text)] if self._defined else []
        parts = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
        ids = [(self._first if first and number == 0 else self._later).encode(part) for number, part in enumerate(parts)]
        return tuple(itertools.chain.from_iterable(ids))

    def encode_markup(self, text: str, first: bool) -> tuple[int, ...]:
        ids: list[int] = []
        for part in filter(None, self._control.split(text)):
            if part in self._ids:
                ids.append(self._ids[part])
            else:
                ids += (self._first if first else self._later).encode(part)
                first = False
        return tuple(ids)

    def decode_plain(self, ids: Sequence[int]) -> str:
        return self._later.decode(list(ids))
