"""Models in folders or on the hub: found, told apart by their content, loaded. Only safetensors are read; no code comes with a model."""

from __future__ import annotations

import gc
import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from transformers import AutoConfig, AutoProcessor, GenerationConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from mllmrec_jax.config import ConfigError
from mllmrec_jax.preprocess.backends.protocol import Picture
from mllmrec_jax.preprocess.store import hash_content

_FILES = ("*.json", "*.jinja", "*.model", "*.safetensors", "*.txt")
_OTHER_FORMATS = ("onnx/*", "openvino/*", "original/*")
_BLOB = re.compile(r"[0-9a-f]{64}")  # the hub's cache names a large file by its sha256
_NARROWEST = 16  # a picture's longer side by its shorter one, at most; processors refuse narrow strips, or blow them up


def find_model(name: str, key: str) -> Path:
    """The folder of a model: `name` where that is a folder, else what the hub, or its cache on this machine, has under that name.

    Args:
      name: path or hub name.
      key: of the configuration, for messages.

    Raises:
      ConfigError: there is none, or it holds no configuration or no weights as safetensors.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, allow_patterns=list(_FILES), ignore_patterns=list(_OTHER_FORMATS)))
        except (OSError, ValueError) as error:  # the hub's errors are one or the other
            wanted = f"{key}: expected a folder with a model, or a hub name that can be reached or is in the cache, got '{name}'"
            raise ConfigError(f"{wanted} ({str(error).splitlines()[0]})") from error
    for wanted in ("config.json", "*.safetensors"):
        if not next(folder.glob(wanted), None):
            raise ConfigError(f"{key}: expected {wanted} in the model's folder, found none in {folder}")
    return folder


def identify_model(folder: Path) -> str:
    """64 hex digits of the contents of a model's files, wherever they lie and whatever they are called on the hub."""
    files = [path for pattern in _FILES for path in folder.rglob(pattern)]
    names = sorted({path.relative_to(folder).as_posix() for path in files})

    def digest(name: str) -> list[str]:
        blob = (folder / name).resolve()
        if _BLOB.fullmatch(blob.name):
            return [name, blob.name]
        with blob.open("rb") as file:
            return [name, hashlib.file_digest(file, "sha256").hexdigest()]

    with ThreadPoolExecutor() as pool:
        return hash_content(list(pool.map(digest, names)))


def read_settings(folder: Path, key: str) -> Any:
    """The model's configuration.

    Raises:
      ConfigError: it cannot be read, or is of a class that this version of transformers does not know.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{key}: cannot read {folder / 'config.json'}: {str(error).splitlines()[0]}") from error


def choose_device(name: str) -> torch.device:
    """The device that `preprocess.transformers.device` names.

    Raises:
      ConfigError: this machine, or this build of torch, has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).splitlines()[0]
        raise ConfigError(f"preprocess.transformers.device: expected a device of this machine, got '{name}' ({reason})") from error


def load_processor(folder: Path, settings: Any) -> Any:
    """A model's processor for texts and pictures.

    The part for videos is left out: it needs torchvision. Pictures are processed by Pillow, so that the same picture gives the same values
    whether torchvision is there or not.
    """
    known: Any = PROCESSOR_MAPPING.get(type(settings), None)
    if known is None or "video_processor" not in known.get_attributes():
        return AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False, local_files_only=True)

    class PictureProcessor(known):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    return PictureProcessor.from_pretrained(folder, backend="pil", local_files_only=True)


_loaded: dict[tuple[Any, ...], Any] = {}


def free_memory() -> None:
    """Hands back what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_model(auto_class: Any, folder: Path, *, device: torch.device, dtype: str, attention: str = "sdpa") -> Any:
    """The model in `folder`, ready for inference. One is in memory at a time: stages that share a model find it there.

    What its generation settings say about sampling is dropped; only the tokens that end an answer are kept.
    """
    key = (auto_class, folder, device, dtype, attention)
    if key not in _loaded:
        _loaded.clear()
        free_memory()
        options = {"dtype": dtype, "attn_implementation": attention, "use_safetensors": True}
        model = auto_class.from_pretrained(folder, **options, trust_remote_code=False, local_files_only=True).to(device).eval()
        given = getattr(model, "generation_config", None)
        if given is not None:
            model.generation_config = GenerationConfig(eos_token_id=given.eos_token_id, pad_token_id=given.pad_token_id)
        _loaded[key] = model
    return _loaded[key]


def open_picture(picture: Picture) -> Image.Image:
    """RGB; a strip is widened with white, to at least a 16th of its longer side."""
    image = picture.open()
    least = -(-max(image.size) // _NARROWEST)
    if min(image.size) >= least:
        return image
    return ImageOps.pad(image, (max(image.width, least), max(image.height, least)), color="white")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory did not suffice, on whatever device."""
    texts = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and any(text in str(error) for text in texts))
