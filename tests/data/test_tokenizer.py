"""Token ids: real vectors, real templates, and no text that becomes a special token."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mllmrec_jax.config import PromptConfig, TokenizerConfig
from mllmrec_jax.data.tokenizer import PLAIN_TEMPLATE, Tokenizer, load_tokenizer
from mllmrec_jax.data.tokenizer_backends import TokenizerError
from mllmrec_jax.prompts import (
    ItemText,
    PromptInput,
    list_wording,
    parse_answer,
    render_answer,
    render_prompt,
    sanitise_text,
    write_segments,
)

ITEMS = (3, 7, 12, 40)
SENTENCEPIECE = ("llama2/tokenizer.model", "mistral-v1/tokenizer.model", "spm-test/test_model.model")
REAL = ("huggingface qwen3", "huggingface minimind", *(f"sentencepiece sentencepiece/{name}" for name in SENTENCEPIECE))


def load_real(shared_data: Path, name: str, **options: Any) -> Tokenizer:
    kind, path = name.split()
    config = TokenizerConfig(kind=kind, path=shared_data / "tokenizers" / path, **options)  # type: ignore[arg-type]
    return load_tokenizer(config, item_ids=ITEMS)


@pytest.fixture(scope="module")
def real(shared_data: Path) -> dict[str, Tokenizer]:
    return {name: load_real(shared_data, name) for name in REAL}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train(tmp_path_factory.mktemp("bpe"))


TEXTS = [*list_wording(PromptConfig(style="compact")), "user\n", "assistant\n", " Toy Story\n", " Heat\n"] * 4


def train(cache: Path, **options: Any) -> Tokenizer:
    return load_tokenizer(TokenizerConfig(vocab_size=320, **options), item_ids=ITEMS, texts=TEXTS, cache=cache)


def read_vectors(shared_data: Path, name: str) -> list[tuple[str, list[int]]]:
    folder = shared_data / "tokenizers" / "llamacpp-testvectors"
    texts = (folder / f"{name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = [[int(word) for word in line.split()] for line in (folder / f"{name}.out").read_text().split("\n")]
    assert len(texts) == len(ids) == 47 and texts[-1] == "" and ids[-1] == []  # 46 texts; both files end with an empty one
    return list(zip(texts, ids, strict=True))[:-1]


# The Llama vectors begin with the space that SentencePiece puts before a text, and leave out the beginning-of-sentence token.
@pytest.mark.parametrize(
    ("vectors", "name", "space"),
    [("qwen2", "huggingface qwen3", ""), ("llama-spm", "sentencepiece sentencepiece/llama2/tokenizer.model", " ")],
)
def test_real_vectors(shared_data: Path, real: dict[str, Tokenizer], vectors: str, name: str, space: str) -> None:
    for text, expected in read_vectors(shared_data, vectors):
        ids = real[name].encode_text(text)
        assert ids == expected, text
        assert real[name].decode(ids) == (space + text if text else "")


@pytest.mark.parametrize("name", REAL)
def test_round_trip(real: dict[str, Tokenizer], name: str) -> None:
    texts = ["hello world, this is a test", "I saw a girl with a telescope"]
    if "spm-test" not in name:  # its thousand pieces have no bytes to fall back on
        texts += ["Léon: The Professional (1994)", "千と千尋の神隠し", "two  spaces, a\ttab\nand a line", "\x00", "🎬"]
    for text in texts:
        assert real[name].decode(real[name].encode_text(text)).removeprefix(" ") == text


@given(text=st.text())
def test_byte_tokens_write_any_text(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode_text(text)) == text


PROMPT = PromptInput((ItemText(3, "Toy Story"), ItemText(7, "Heat")), (ItemText(12, "Ran"), ItemText(40, "Big")), "likes noir")


def put_template(tokenizer: Tokenizer, template: str, item_ids: tuple[int, ...] | None = ITEMS) -> Tokenizer:
    return Tokenizer(tokenizer._backend, template=template, item_ids=item_ids, content_hash="", where="here")


def test_qwen_prompt_is_what_transformers_makes(shared_data: Path, real: dict[str, Tokenizer]) -> None:
    from transformers import AutoTokenizer

    template = shared_data / "tokenizers" / "chat_templates" / "Qwen-Qwen3-0.6B.jinja"
    ours = put_template(real["huggingface qwen3"], template.read_text(), item_ids=None)
    theirs: Any = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen3", local_files_only=True, trust_remote_code=False)
    for style in ("full", "compact"):
        segments = render_prompt(PROMPT, PromptConfig(style=style))
        messages = [{"role": "user", "content": write_segments(segments)}]
        text = theirs.apply_chat_template(
            messages, chat_template=template.read_text(), tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        ids, positions = ours.encode_prompt(segments)
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids, keep_stops=True) == text and positions == []


# The always-thinking template of the qwen3 folder opens a block that has to be closed before an answer.
@pytest.mark.parametrize("template", [None, "Qwen-Qwen3-0.6B", "qwen3_nonthinking", "Qwen-QwQ-32B"])
def test_thinking_is_closed(shared_data: Path, real: dict[str, Tokenizer], template: str | None) -> None:
    tokenizer = real["huggingface qwen3"]
    if template:
        tokenizer = put_template(tokenizer, (shared_data / "tokenizers" / "chat_templates" / f"{template}.jinja").read_text())
    text = tokenizer.decode(tokenizer.encode_prompt(render_prompt(PROMPT, PromptConfig()))[0], keep_stops=True)
    assert text.endswith("<title><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_template_with_a_system_turn(shared_data: Path, real: dict[str, Tokenizer]) -> None:
    path = shared_data / "tokenizers" / "chat_templates" / "Qwen-Qwen2.5-7B-Instruct.jinja"
    tokenizer = put_template(real["huggingface qwen3"], path.read_text())
    ids, positions = tokenizer.encode_prompt(render_prompt(PROMPT, PromptConfig(style="compact")))
    text = tokenizer.decode(ids, keep_stops=True)
    assert text.startswith("<|im_start|>system\nYou are Qwen") and text.endswith("next<|im_end|>\n<|im_start|>assistant\n")
    assert [ids[position] for position in positions] == [151669, 151670]


@pytest.mark.parametrize(
    ("name", "size", "stops", "pad"),
    [
        ("huggingface qwen3", 151669, (151645, 151643), 151643),
        ("huggingface minimind", 6400, (2, 0), 0),
        ("sentencepiece sentencepiece/llama2/tokenizer.model", 32000, (2,), 0),
        ("sentencepiece sentencepiece/mistral-v1/tokenizer.model", 32000, (2,), 0),
        ("sentencepiece sentencepiece/spm-test/test_model.model", 1000, (2,), 0),
    ],
)
def test_ids_of_note(real: dict[str, Tokenizer], name: str, size: int, stops: tuple[int, ...], pad: int) -> None:
    tokenizer = real[name]
    assert (tokenizer.vocab_size, tokenizer.item_range) == (size + len(ITEMS), (size, size + len(ITEMS)))
    assert (tokenizer.stop_ids, tokenizer.pad_id) == (stops, pad)


def test_without_a_chat_template_the_plain_one_is_used(real: dict[str, Tokenizer]) -> None:
    tokenizer = real["sentencepiece sentencepiece/llama2/tokenizer.model"]
    assert tokenizer.template == PLAIN_TEMPLATE
    ids, positions = tokenizer.encode_prompt(render_prompt(PROMPT, PromptConfig(style="compact", list_candidates=False)))
    middle = 32000 + ITEMS.index(3)
    assert ids[0] == 1 and ids[-1] == 13  # <s> before, a line break after
    assert ids[1 : positions[0]] == tokenizer.encode_text("history")  # a first word, with SentencePiece's space
    assert ids[positions[0]] == middle
    assert tokenizer.decode(ids) == "<s> history[ITEM_3] Toy Story\n[ITEM_7] Heat\nreference<think>likes noir</think>next\n"
    assert tokenizer.encode_answer(render_answer(ItemText(7, "Heat"), PromptConfig())) == [32001, *tokenizer.encode_text("Heat"), 2]


def test_trained_tokenizer_spends_a_token_a_part(trained: Tokenizer) -> None:
    config = PromptConfig(style="compact", history_fields=(), candidate_fields=(), answer_title=False)
    prompt = PromptInput((ItemText(3), ItemText(7)), (ItemText(12), ItemText(40)))
    ids, positions = trained.encode_prompt(render_prompt(prompt, config))
    text = trained.decode(ids, keep_stops=True)
    assert text == "<|im_start|>user\nhistory[ITEM_3][ITEM_7]candidates[ITEM_12][ITEM_40]next<|im_end|>\n<|im_start|>assistant\n"
    assert len(ids) == 4 + 3 + 8  # items, parts, and the template: <|im_start|> user \n, then <|im_end|> \n <|im_start|> assistant \n
    first = trained.vocab_size - len(ITEMS)
    assert [ids[position] for position in positions] == [first, first + 1]
    assert trained.encode_answer(render_answer(ItemText(40), config)) == [first + 3, trained.stop_ids[0]]
    assert trained.decode(trained.stop_ids[:1], keep_stops=True) == "<|im_end|>"


MARKUP = [
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "<|fim_prefix|>",
    "</s>",
    "<s>",
    "<unk>",
    "<0x0A>",
]
PLANTED = [*MARKUP, "[ITEM_7]", "\n", "\u202e", "\x00", "\ud800", "candidates", "next", " | ", "\uff3bITEM_7\uff3d", "\u2581"]
hostile_texts = st.lists(st.one_of(st.sampled_from(PLANTED), st.text(st.characters(), max_size=4)), max_size=4).map("".join)


def get_ordinary(tokenizer: Tokenizer) -> range:
    first, last = tokenizer.item_range or (0, 0)
    assert last == tokenizer.vocab_size
    return range(first)


@pytest.mark.parametrize("name", ["trained", *REAL])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    titles=st.lists(hostile_texts, min_size=4, max_size=4),
    details=st.lists(hostile_texts, min_size=4, max_size=4),
    reasoning=st.none() | hostile_texts,
    style=st.sampled_from(["full", "compact"]),
)
def test_hostile_text_makes_no_special_token(
    request: pytest.FixtureRequest, name: str, titles: list[str], details: list[str], reasoning: str | None, style: Any
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue("trained") if name == "trained" else request.getfixturevalue("real")[name]
    config = PromptConfig(style=style)
    texts = [ItemText(item, title, detail) for item, title, detail in zip(ITEMS, titles, details, strict=True)]
    plain = [ItemText(item, "a", "b") for item in ITEMS]
    markup = set(tokenizer._backend.markup)

    def find_special(parts: list[ItemText], trace: str | None) -> list[int]:
        ids, positions = tokenizer.encode_prompt(render_prompt(PromptInput(tuple(parts[:2]), tuple(parts[2:]), trace), config))
        assert [ids[position] for position in positions] == [tokenizer.item_range[0], tokenizer.item_range[0] + 1]  # type: ignore[index]
        return [id_ for id_ in ids if id_ in markup or id_ not in get_ordinary(tokenizer)]

    # The hostile prompt holds the very special and item tokens, in order, that the same prompt with innocent texts holds.
    assert find_special(texts, reasoning) == find_special(plain, None if reasoning is None else "c")

    for text in (*titles, *details):  # unsanitised, too
        assert not markup & set(tokenizer.encode_text(text))
        assert set(tokenizer.encode_text(text)) <= set(get_ordinary(tokenizer))

    for item in texts:
        ids = tokenizer.encode_answer(render_answer(item, config))
        assert [id_ for id_ in ids if id_ in markup or id_ not in get_ordinary(tokenizer)] == [
            tokenizer.item_range[0] + ITEMS.index(item.id),  # type: ignore[index]
            tokenizer.stop_ids[0],
        ]
        answer = parse_answer(tokenizer.decode(ids))
        assert answer is not None and answer.item_id == item.id
        if "sentencepiece" not in name:  # those may normalise, or lack characters
            assert answer.title == sanitise_text(item.title, config.max_title_chars)


def test_added_tokens_that_are_not_special_stay_text(real: dict[str, Tokenizer]) -> None:
    # split_special_tokens=True alone would let these three through.
    qwen = real["huggingface qwen3"]
    ids = qwen.encode_text("<think></think><tool_call>")
    assert max(ids) < 151643 and qwen.decode(ids) == "<think></think><tool_call>"


def test_think_tags_of_ours_are_qwens_tokens(real: dict[str, Tokenizer]) -> None:
    ids = real["huggingface qwen3"].encode_answer(render_answer(ItemText(7, "Heat"), PromptConfig(), reasoning="</think> so"))
    assert ids.count(151667) == ids.count(151668) == 1
    answer = parse_answer(real["huggingface qwen3"].decode(ids))
    assert answer is not None and (answer.item_id, answer.title, answer.reasoning) == (7, "Heat", "\u2039/think> so")


def test_decode_stops_and_shows_strangers(trained: Tokenizer) -> None:
    item = trained.item_range[0] + 1  # type: ignore[index]
    words = trained.encode_text(" Heat")
    stop, other = trained.stop_ids[0], trained.stop_ids[1]
    assert trained.decode([item, *words, stop, *words]) == "[ITEM_7] Heat"
    assert trained.decode([item, other, *words]) == "[ITEM_7]"
    assert trained.decode([item, trained.vocab_size, *words]) == "[ITEM_7]\ufffd Heat"
    assert trained.decode([]) == ""


def test_prefix_space_belongs_to_the_text_not_to_the_segment(tmp_path: Path) -> None:
    # A tokenizer of Llama's kind: every text gets a space in front when encoded, and loses one when decoded.
    characters = {char: row for row, char in enumerate("\u2581Heat[ITM_0123456789]:nxhisorycdw")}
    spec = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": len(characters) + row,
                "content": text,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for row, text in enumerate(("<s>", "</s>"))
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}],
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {"type": "BPE", "vocab": characters, "merges": []},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    settings_ = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_))
    tokenizer = load_tokenizer(TokenizerConfig(kind="huggingface", path=tmp_path), item_ids=ITEMS)
    ids = tokenizer.encode_answer(render_answer(ItemText(7, "Heat"), PromptConfig()))
    size = len(characters) + 2
    assert ids == [size + ITEMS.index(7), 0, 1, 2, 3, 4, size - 1]
    assert tokenizer.decode(ids) == "[ITEM_7] Heat"
    assert tokenizer.encode_text("Heat") == [0, 1, 2, 3, 4]


def test_fingerprint_is_of_the_content(tmp_path: Path, trained: Tokenizer) -> None:
    assert train(tmp_path / "again").fingerprint == trained.fingerprint  # trained anew, elsewhere
    (folder,) = (tmp_path / "again").iterdir()
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    config = TokenizerConfig(kind="huggingface", path=moved)
    assert load_tokenizer(config, item_ids=ITEMS).fingerprint == trained.fingerprint
    others = [
        load_tokenizer(config, item_ids=ITEMS[:-1]),
        load_tokenizer(TokenizerConfig(kind="huggingface", path=moved, item_tokens=False), item_ids=ITEMS),
    ]
    template = tmp_path / "plain.jinja"
    template.write_text(PLAIN_TEMPLATE)
    others.append(load_tokenizer(TokenizerConfig(kind="huggingface", path=moved, chat_template=template), item_ids=ITEMS))
    file = moved / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    others.append(load_tokenizer(config, item_ids=ITEMS))
    assert len({trained.fingerprint, *(other.fingerprint for other in others)}) == 1 + len(others)


def test_trained_tokenizer_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="No space left"):
            train(tmp_path)
    assert not list(tmp_path.iterdir())
    train(tmp_path)
    (folder,) = tmp_path.iterdir()
    written = (folder / "tokenizer.json").stat().st_mtime_ns
    train(tmp_path)
    assert (folder / "tokenizer.json").stat().st_mtime_ns == written  # found, not trained again


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "writes the user's message once"),
        ("nothing", "writes the user's message once"),
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("{% if %}", "the chat template failed"),
    ],
)
def test_unfit_templates_are_refused(tmp_path: Path, trained: Tokenizer, template: str, message: str) -> None:
    del trained
    path = tmp_path / "bad.jinja"
    path.write_text(template)
    with pytest.raises(TokenizerError, match=message):
        train(tmp_path, chat_template=path)


def test_unfit_tokenizers_are_refused(tmp_path: Path, shared_data: Path, trained: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="neither"):
        load_tokenizer(TokenizerConfig(kind="huggingface", path=tmp_path), item_ids=ITEMS)
    with pytest.raises(TokenizerError, match="found none"):
        load_tokenizer(TokenizerConfig(kind="sentencepiece", path=tmp_path / "x.model"), item_ids=ITEMS)
    damaged = tmp_path / "damaged.model"
    damaged.write_bytes(b"no model")
    with pytest.raises(TokenizerError, match=r"damaged\.model: expected a SentencePiece model"):
        load_tokenizer(TokenizerConfig(kind="sentencepiece", path=damaged), item_ids=ITEMS)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="expected a Hugging Face tokenizer folder"):
        load_tokenizer(TokenizerConfig(kind="huggingface", path=tmp_path), item_ids=ITEMS)
    with pytest.raises(TokenizerError, match="item_tokens = true"):  # no underscore among its thousand pieces
        load_real(shared_data, REAL[-1], item_tokens=False)
    with pytest.raises(TokenizerError, match="item 99: expected one of the 4 items"):
        trained.encode_answer(render_answer(ItemText(99), PromptConfig()))
    with pytest.raises(TokenizerError, match="duplicates"):
        load_tokenizer(TokenizerConfig(vocab_size=300), item_ids=[1, 1], texts=TEXTS, cache=tmp_path)
    with pytest.raises(ValueError, match="at least 261"):
        load_tokenizer(TokenizerConfig(vocab_size=100), item_ids=ITEMS, texts=TEXTS, cache=tmp_path)
