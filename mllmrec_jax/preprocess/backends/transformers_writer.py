"""Backend `transformers`: texts by a model on this machine.

Requests are read ahead in a window, sorted by length, and answered in batches of about the same length; threads decode and process the
pictures of the next batches while the model works. A batch that does not fit into memory is halved, and so are the batches after it.

A text depends on which requests shared its batch no more than floating point makes it: padding is masked, draws are each request's own, but
sums are rounded otherwise in another batch, and where two tokens are about as likely, that can decide between them. So a run that was
stopped may end with other texts than one that was not; a text that is finished is never written again.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, LogitsProcessorList
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from mllmrec_jax.config import ConfigError, to_dict
from mllmrec_jax.preprocess.backends.pretrained import (
    choose_device,
    find_model,
    free_memory,
    identify_model,
    is_out_of_memory,
    load_model,
    load_processor,
    open_picture,
    read_settings,
)
from mllmrec_jax.preprocess.backends.protocol import Request, Unanswered, Written
from mllmrec_jax.preprocess.backends.reasoning import strip_reasoning
from mllmrec_jax.preprocess.backends.sampling import SeededSampler, draw_uniforms
from mllmrec_jax.preprocess_config import TransformersConfig

_VERSION = 1  # raise it when the same request gives another text
_AHEAD = 2  # batches prepared, or in preparation, beside the one the model works on
_PICTURE_TOKENS = 256  # what a picture counts where requests are compared by length


class TransformersWriter:
    """Any image-text-to-text model, or a causal language model where no pictures are shown."""

    def __init__(self, model: str, config: TransformersConfig):
        """Looks the model up and reads its configuration; its weights are read with the first request.

        Args:
          model: folder or hub name; empty: `config.model`.
          config: how it is run.

        Raises:
          ConfigError: no such model, a model of another kind, one without a chat template, or no such device.
        """
        key = "preprocess: model" if model else "preprocess.transformers.model"
        self._config, self._name = config, model or config.model
        self._device = choose_device(config.device)
        self._folder = find_model(self._name, key)
        settings = read_settings(self._folder, key)
        self._sees = type(settings) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        if not self._sees and type(settings) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ConfigError(
                f"{key}: expected a model that writes (image-text-to-text or causal), got {self._name} ({settings.model_type})"
            )
        if self._sees:
            self._processor = load_processor(self._folder, settings)
            self._tokenizer = self._processor.tokenizer
        else:
            self._processor = self._tokenizer = AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False, local_files_only=True)
        if not self._processor.chat_template:
            raise ConfigError(f"{key}: expected a model with a chat template, got {self._name}")
        self._tokenizer.padding_side = "left"  # new tokens follow the prompt's last
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._identity = identify_model(self._folder)
        self._budget: int | None = None  # lengths of a batch's requests, added; None until memory did not suffice

    def describe(self) -> dict[str, Any]:
        config = self._config
        draws = {"temperature": config.temperature, "top_p": config.top_p, "seed": config.seed} if config.temperature else {}
        limits = {task: {"max_new_tokens": limit} for task, limit in to_dict(config.max_new_tokens).items()}
        return {"backend": "transformers", "version": _VERSION, "model": self._identity, "dtype": config.dtype, **draws, "tasks": limits}

    def _find_limit(self, request: Request) -> int:
        return getattr(self._config.max_new_tokens, request.task)

    def _estimate_length(self, request: Request) -> int:
        """About how many tokens a request takes in memory."""
        pictures = sum(item.picture is not None for item in request.items)
        return len(request.prompt.encode()) // 4 + _PICTURE_TOKENS * pictures + self._find_limit(request)

    def _order(self, requests: Iterable[Request]) -> list[Request]:
        """The longest first: what does not fit into memory shows at once. Requests of a task, and so of a limit, stand together."""
        return sorted(requests, key=lambda request: (request.task, self._estimate_length(request)), reverse=True)

    def _cut_batch(self, waiting: list[Request]) -> tuple[list[Request], list[Request]]:
        """The next batch of ordered requests, and the rest."""
        count = min(self._config.batch_size, len(waiting))
        if waiting and self._budget is not None:
            count = min(count, max(1, self._budget // self._estimate_length(waiting[0])))
        batch = [request for request in waiting[:count] if request.task == waiting[0].task]
        return batch, waiting[len(batch) :]

    def _read(self, source: Iterator[Request]) -> list[Request]:
        requests = list(itertools.islice(source, self._config.window))
        if not self._sees and any(item.picture is not None for request in requests for item in request.items):
            raise ConfigError(f"preprocess: expected a model that reads pictures for {requests[0].task}, got {self._name}")
        return requests

    def _prepare(self, batch: list[Request], decoders: ThreadPoolExecutor) -> Any:
        """Tensors of a batch, on the host."""
        chats = []
        for request in batch:
            pictures = [item.picture for item in request.items if item.picture is not None]
            shown = [{"type": "image", "image": image} for image in decoders.map(open_picture, pictures)]
            content = [*shown, {"type": "text", "text": request.prompt}] if self._sees else request.prompt
            chats.append([{"role": "user", "content": content}])
        options: dict[str, Any] = {"processor_kwargs": {"padding": True}} if self._sees else {"padding": True}
        return self._processor.apply_chat_template(
            chats, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt", **options
        )

    @torch.inference_mode()
    def _answer(self, model: Any, batch: list[Request], prepared: Any) -> list[Written]:
        config, limit = self._config, self._find_limit(batch[0])
        inputs = {
            name: value.to(self._device, model.dtype if value.is_floating_point() else None, non_blocking=True)
            for name, value in prepared.items()
        }
        length = inputs["input_ids"].shape[1]
        samplers = LogitsProcessorList()
        if config.temperature:
            uniforms = draw_uniforms([request.key for request in batch], limit).to(self._device)
            samplers.append(SeededSampler(uniforms, prompt_length=length, temperature=config.temperature, top_p=config.top_p))
        stops = model.generation_config.eos_token_id
        stops = self._tokenizer.eos_token_id if stops is None else stops
        options = {"max_new_tokens": limit, "do_sample": False, "eos_token_id": stops, "pad_token_id": self._tokenizer.pad_token_id}
        written = model.generate(**inputs, logits_processor=samplers, **options)[:, length:].cpu()
        prompts = prepared["attention_mask"].sum(dim=1).tolist()
        stopped = torch.isin(written, torch.tensor(stops))
        answers = []
        for request, tokens, ends, prompt_tokens in zip(batch, written, stopped, prompts, strict=True):
            count = int(ends.int().argmax()) + 1 if ends.any() else len(tokens)
            text = strip_reasoning(self._tokenizer.decode(tokens[:count], skip_special_tokens=True))
            usage: dict[str, float] = {"prompt tokens": prompt_tokens, "answer tokens": count}
            if not ends.any():
                usage["answers cut off"] = 1
            answers.append(Written(request.key, text, usage))
        return answers

    def _try_answer(self, model: Any, batch: list[Request], prepared: Any) -> list[Written] | None:
        """None where memory did not suffice; what the attempt held is free again."""
        try:
            return self._answer(model, batch, prepared)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler: the error keeps the frames of the attempt, and their tensors, alive.
        free_memory()
        return None

    def _lower_budget(self, batch: list[Request]) -> None:
        longest = max(map(self._estimate_length, batch))
        self._budget = longest * len(batch) // 2
        said = f"transformers: out of memory at {len(batch)} requests of about {longest:,} tokens; going on with half as many at a time"
        print(said, file=sys.stderr, flush=True)

    def write(self, requests: Iterable[Request]) -> Iterator[Written | Unanswered]:
        source = iter(requests)
        waiting: list[Request] = []
        ahead: deque[tuple[list[Request], Future[Any]]] = deque()
        model: Any = None
        # Processors are not safe to share: one thread runs them, and has the pictures decoded by the others.
        with ThreadPoolExecutor(self._config.decode_threads) as decoders, ThreadPoolExecutor(1) as preparer:
            try:
                while True:
                    while len(ahead) <= _AHEAD:
                        if len(waiting) < self._config.batch_size and (read := self._read(source)):
                            waiting = self._order([*waiting, *read])
                        batch, waiting = self._cut_batch(waiting)
                        if not batch:
                            break
                        ahead.append((batch, preparer.submit(self._prepare, batch, decoders)))
                    if not ahead:
                        return
                    if model is None:
                        kind = AutoModelForImageTextToText if self._sees else AutoModelForCausalLM
                        attention = self._config.attention
                        model = load_model(kind, self._folder, device=self._device, dtype=self._config.dtype, attention=attention)
                    batch, future = ahead.popleft()
                    answers = self._try_answer(model, batch, future.result())
                    if answers is not None:
                        yield from answers
                    elif len(batch) == 1:
                        detail = (
                            f"a request of about {self._estimate_length(batch[0]):,} tokens does not fit into the memory of {self._device}"
                        )
                        yield Unanswered(batch[0].key, "out_of_memory", detail, {})
                    else:
                        self._lower_budget(batch)
                        while ahead:
                            later, future = ahead.pop()
                            future.cancel()
                            batch += later
                        waiting = self._order([*batch, *waiting])
            finally:
                for _, future in ahead:
                    future.cancel()
