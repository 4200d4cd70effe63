"""Random models of the true classes, built from configurations and saved as a hub folder would hold them. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXTS = ("One user chose these movies, oldest first, with descriptions of their pictures: Step 1, Step 2, Step 3, Step 4.",)


def train_tokenizer(*, vocab_size: int = 512, texts: Iterable[str] = _TEXTS, **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Qwen's special tokens; `options` go to the tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", **options)


def _size_text(tokenizer: Any, hidden: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 16,
        "num_key_value_heads": hidden // 32,
        "head_dim": 16,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }


def save_qwen3_vl(folder: Path, *, hidden: int = 64, layers: int = 2, side: int = 64, seed: int = 0) -> Path:
    """A Qwen3-VL that sees pictures at about `side` x `side` pixels."""
    tokenizer = train_tokenizer()
    tokenizer.chat_template = TEMPLATE
    token: Any = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    vision = {
        "depth": layers,
        "hidden_size": hidden // 2,
        "intermediate_size": hidden,
        "num_heads": 4,
        "out_hidden_size": hidden,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(
        text_config={**_size_text(tokenizer, hidden, layers), "rope_parameters": rope},
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    # What the published model says about sampling: a greedy answer must not hear of it.
    model.generation_config.update(temperature=0.7, top_k=20, top_p=0.8, do_sample=True, eos_token_id=[tokenizer.eos_token_id, 0])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": side * side // 2, "longest_edge": side * side}
    Qwen2VLImageProcessorPil(patch_size=16, size=size).save_pretrained(folder)
    return folder


def save_qwen3(folder: Path, *, hidden: int = 64, layers: int = 2, seed: int = 0) -> Path:
    """A Qwen3 that reads text alone."""
    tokenizer = train_tokenizer()
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    Qwen3ForCausalLM(Qwen3Config(**_size_text(tokenizer, hidden, layers))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def save_clip(folder: Path, *, seed: int = 0) -> Path:
    """A CLIP for pictures of 32 x 32 pixels and 24 tokens."""
    tokenizer = train_tokenizer(model_max_length=24)
    ends = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0, "bos_token_id": 1}
    text = {**_TOWER, **ends, "max_position_embeddings": 24}
    torch.manual_seed(seed)
    CLIPModel(CLIPConfig(text_config=text, vision_config={**_TOWER, "image_size": 32, "patch_size": 8}, projection_dim=16)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_siglip(folder: Path, *, seed: int = 0) -> Path:
    """A SigLIP for pictures of 32 x 32 pixels and 24 tokens."""
    tokenizer = train_tokenizer(model_max_length=24, model_input_names=["input_ids"])
    ends = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0, "bos_token_id": 1}
    text = {**_TOWER, **ends, "max_position_embeddings": 24, "projection_size": 32}
    torch.manual_seed(seed)
    SiglipModel(SiglipConfig(text_config=text, vision_config={**_TOWER, "image_size": 32, "patch_size": 8})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
