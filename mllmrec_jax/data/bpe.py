"""A small byte-level BPE, trained on a catalogue and the prompts' own wording, for models trained from random weights."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from mllmrec_jax.data.atomic import new_folder

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_MARKUP = (END_OF_TEXT, TURN_START, TURN_END, "<think>", "</think>")
_BYTES = 256

# ChatML without a system turn and without thinking.
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _return_memory() -> None:
    """Gives the system back what the trainer freed, which glibc keeps: about half a kilobyte a distinct word of the texts."""
    with contextlib.suppress(AttributeError, OSError):  # other C libraries do it by themselves, or not at all
        ctypes.CDLL(None).malloc_trim(0)


def train_bpe(texts: Iterable[str], *, vocab_size: int, cache: Path) -> Path:
    """Trains a byte-level BPE, or finds the one that the same texts and size gave before.

    Every byte is a token, so any text can be written; ids 0 to 4 are `<|endoftext|>` (padding), `<|im_start|>`, `<|im_end|>`, `<think>`,
    `</think>`. Texts that repeat weigh more.

    Args:
      texts: what to train on; gone through twice.
      vocab_size: number of tokens wanted, markup and bytes included; fewer come out where the texts have no more pairs to merge.
      cache: folder that holds trained tokenizers; the new one is `bpe-<hash of texts, size and template>`, whole or not there.

    Returns:
      A Hugging Face tokenizer folder (`tokenizer.json`, `tokenizer_config.json`).

    Raises:
      ValueError: `vocab_size` is smaller than bytes and markup together, or `texts` can be gone through only once.
      OSError: the folder cannot be written; nothing is left behind.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    least = _BYTES + len(_MARKUP)
    if vocab_size < least:
        raise ValueError(
            f"tokenizer.vocab_size: expected at least {least} ({_BYTES} bytes, {len(_MARKUP)} special tokens), got {vocab_size}"
        )
    if iter(texts) is texts:
        raise ValueError("texts: expected what can be gone through twice, got an iterator")
    digest = hashlib.sha256(json.dumps([vocab_size, _CHAT_TEMPLATE, _MARKUP]).encode())
    for text in texts:
        digest.update(json.dumps(text).encode())
    folder = cache / f"bpe-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(_MARKUP),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.encode("utf-8", "replace").decode("utf-8") for text in texts), trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    trained = tokenizer.to_str(pretty=True)
    del tokenizer, trainer  # the trainer holds the words
    _return_memory()
    with new_folder(folder) as unfinished:
        (unfinished / "tokenizer.json").write_text(trained, encoding="utf-8")
        (unfinished / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return folder
