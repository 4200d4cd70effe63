"""Backend `openai`: any server that speaks OpenAI's chat completions, many requests at a time, answers handed on as they arrive.

Repetitions are `tenacity`'s and not the client's own, so that each attempt passes the rate limits and has a time limit as a whole, and so
that an answer that cannot be read is asked again as a broken connection is.
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import io
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

import anyio.to_thread
import openai
import tenacity
from aiolimiter import AsyncLimiter
from anyio.from_thread import start_blocking_portal
from PIL import Image
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from mllmrec_jax.config import ConfigError
from mllmrec_jax.preprocess.backends.protocol import Picture, Request, Unanswered, Written
from mllmrec_jax.preprocess.backends.reasoning import strip_reasoning
from mllmrec_jax.preprocess.backends.secrets import check_secrets
from mllmrec_jax.preprocess_config import OpenaiConfig
from mllmrec_jax.prompts import sanitise_text

VERSION = 1  # raise it when the same request means something else to the server
_STOPS = frozenset({"HTTP 401", "HTTP 402", "HTTP 403", "HTTP 404"})  # no other request would fare better
_REPEATED = frozenset({408, 409, 429})
_KEPT = 1024  # encoded pictures in memory, some 40 kB each: a popular item is in many histories
_QUALITY = 85  # of the JPEGs sent
_DETAIL_CHARS = 300
_LONGEST_BACKOFF_S = 60.0
_SECRET_CHARS = 8  # anything shorter is a word that a text may hold


class _Details(BaseModel):
    reasoning_tokens: NonNegativeInt | None = None


class _Usage(BaseModel):
    prompt_tokens: NonNegativeInt = 0
    completion_tokens: NonNegativeInt = 0
    completion_tokens_details: _Details | None = None


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    """What is read of an answer; servers differ in the rest."""

    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Usage | None = None


class _FailedError(Exception):
    """One attempt that brought no answer."""

    def __init__(self, kind: str, detail: str, *, repeat: bool, retry_after_s: float = 0.0):
        super().__init__(kind)
        self.kind, self.detail, self.repeat, self.retry_after_s = kind, detail, repeat, retry_after_s


def encode_picture(image: Image.Image, *, side: int) -> str:
    """A JPEG as a data URL, its longer side at most `side` pixels; of the file it came from, no metadata are left."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.info = {}
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a response asks to wait (RFC 9110, section 10.2.3: a number or a date; milliseconds in `retry-after-ms`), 0 for none."""
    for name, seconds in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            return max(0.0, float(value) * seconds)
        except ValueError:
            pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


class _Pace:
    """Units a minute, evenly: `step` of them at a time. What was not known when it was spent is settled with what is spent next."""

    def __init__(self, per_minute: int, step: float):
        self._limiter = AsyncLimiter(step, 60 * step / per_minute) if per_minute else None
        self._step, self.owed = step, 0.0

    async def spend(self, units: float) -> None:
        self.owed += units
        while self._limiter is not None and self.owed > 0:
            part = min(self.owed, self._step)
            self.owed -= part
            await self._limiter.acquire(part)


class _Session:
    """Connections and limits of one call of `write`; an asynchronous context manager, used in one event loop."""

    def __init__(self, model: str, config: OpenaiConfig, key: str):
        self._model, self._config, self._key = model, config, key
        self._requests = _Pace(config.requests_per_minute, 1.0)
        self._tokens = _Pace(config.tokens_per_minute, max(1.0, config.tokens_per_minute / 60))
        self._answers, self._answers_tokens = 0, 0
        self._one = anyio.CapacityLimiter(1)  # Pillow's decoding sets warnings aside, which two threads cannot do at a time
        self._pictures: dict[str, str] = {}
        self._body = {config.max_tokens_field: config.max_tokens, **_read_extra(config.extra_body)}
        if config.temperature is not None:
            self._body["temperature"] = config.temperature
        # The client would add what it finds in variables of its own, meant for another server.
        self._headers = {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}
        if not key:
            self._headers["Authorization"] = openai.Omit()
        limits = openai.Timeout(config.timeout_s, connect=config.connect_timeout_s, read=config.read_timeout_s)
        self._client = openai.AsyncOpenAI(api_key=key or "none", base_url=config.base_url, timeout=limits, max_retries=0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.close()

    def _hide(self, text: str) -> str:
        """A server may repeat the key; it goes no further."""
        return text.replace(self._key, "[key]") if len(self._key) >= _SECRET_CHARS else text

    def _encode(self, picture: Picture) -> str:
        url = self._pictures.get(picture.digest)
        if url is None:
            url = encode_picture(picture.open(), side=self._config.image_side)
            if len(self._pictures) >= _KEPT:
                self._pictures.pop(next(iter(self._pictures)))
            self._pictures[picture.digest] = url
        return url

    async def _compose(self, request: Request) -> str | list[dict[str, Any]]:
        """The message: plain text where there are no pictures, which servers of text models expect."""
        pictures = [item.picture for item in request.items if item.picture is not None]
        urls = [await anyio.to_thread.run_sync(self._encode, picture, limiter=self._one) for picture in pictures]
        shown = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return [{"type": "text", "text": request.prompt}, *shown] if shown else request.prompt

    def _describe_status(self, error: openai.APIStatusError) -> _FailedError:
        status, after = error.status_code, read_retry_after(error.response.headers)
        repeat = status in _REPEATED or status >= 500
        detail = error.response.text
        if repeat and after > self._config.max_retry_after_s:
            repeat, detail = False, f"told to wait {after:,.0f} s, more than preprocess.openai.max_retry_after_s; {detail}"
        return _FailedError(f"HTTP {status}", detail, repeat=repeat, retry_after_s=after)

    async def _attempt(self, content: str | list[dict[str, Any]], tokens: float) -> _Completion:
        await self._requests.spend(1)
        await self._tokens.spend(tokens)
        try:
            async with asyncio.timeout(self._config.timeout_s):
                response = await self._client.chat.completions.with_raw_response.create(
                    model=self._model,
                    messages=[{"role": "user", "content": content}],  # type: ignore[typeddict-item]
                    extra_body=self._body,
                    extra_headers=self._headers,
                )
        except (TimeoutError, openai.APITimeoutError):
            raise _FailedError("timed out", "no answer in time", repeat=True) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise _FailedError("no connection", f"{type(cause).__name__} {cause}", repeat=True) from None
        except openai.APIStatusError as error:
            raise self._describe_status(error) from None
        try:
            return _Completion.model_validate_json(response.content)
        except ValidationError:
            beginning = response.content[: 2 * _DETAIL_CHARS].decode(errors="replace")
            raise _FailedError("no completion", f"expected a chat completion, got {beginning!r}", repeat=True) from None

    def _count(self, usage: _Usage | None) -> Counter[str]:
        if usage is None:
            return Counter({"answers without a count of tokens": 1})
        counts = Counter({"prompt tokens": usage.prompt_tokens, "answer tokens": usage.completion_tokens})
        if usage.completion_tokens_details is not None:
            counts["reasoning tokens"] = usage.completion_tokens_details.reasoning_tokens or 0
        return counts

    def _price(self, counts: Counter[str]) -> dict[str, float]:
        cost = counts["prompt tokens"] * self._config.input_price + counts["answer tokens"] * self._config.output_price
        priced = self._config.input_price or self._config.output_price
        return {**(+counts), **({"cost": cost / 1e6} if priced else {})}

    async def answer(self, request: Request) -> Written | Unanswered:
        """Asks until there is an answer or no use in asking again."""
        content = await self._compose(request)
        guess = self._answers_tokens / self._answers if self._answers else len(request.prompt) / 4
        repeating = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, _FailedError) and error.repeat),
            stop=tenacity.stop_after_attempt(self._config.retries + 1),
            wait=tenacity.wait_exception(lambda error: getattr(error, "retry_after_s", 0.0))
            + tenacity.wait_random_exponential(multiplier=self._config.backoff_s, max=_LONGEST_BACKOFF_S),
            reraise=True,
        )
        try:
            completion, failed = await repeating(self._attempt, content, guess), None
        except _FailedError as error:
            completion, failed = None, error
        repeated = Counter({"repetitions": repeating.statistics["attempt_number"] - 1})
        if completion is None:
            assert failed is not None
            detail = sanitise_text(self._hide(failed.detail), _DETAIL_CHARS)
            return Unanswered(request.key, failed.kind, detail, dict(+repeated))

        counts = self._count(completion.usage)
        spent = counts["prompt tokens"] + counts["answer tokens"]
        if spent:
            self._tokens.owed += spent - guess
            self._answers, self._answers_tokens = self._answers + 1, self._answers_tokens + spent
        usage = self._price(counts + repeated)
        choice = completion.choices[0]
        text = strip_reasoning(self._hide(choice.message.content or ""))
        if choice.finish_reason == "length":
            return Unanswered(request.key, "truncated", "cut off by preprocess.openai.max_tokens or the model's context", usage)
        if choice.message.refusal or choice.finish_reason == "content_filter":
            refusal = sanitise_text(self._hide(choice.message.refusal or "the server's content filter"), _DETAIL_CHARS)
            return Unanswered(request.key, "refused", refusal, usage)
        if not text:
            return Unanswered(request.key, "empty", f"no text beside reasoning, finish_reason {choice.finish_reason!r}", usage)
        return Written(request.key, text, usage)


def _read_extra(text: str) -> dict[str, Any]:
    """`extra_body` as an object.

    Raises:
      ConfigError: it is none, or has a field that is set elsewhere.
    """
    try:
        extra = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"preprocess.openai.extra_body: expected a JSON object, got {text!r} ({error})") from None
    if not isinstance(extra, dict):
        raise ConfigError(f"preprocess.openai.extra_body: expected a JSON object, got {text!r}")
    taken = {"model", "messages", "stream", "n", "temperature", "max_tokens", "max_completion_tokens"} & set(extra)
    if taken:
        raise ConfigError(f"preprocess.openai.extra_body: expected fields that are set nowhere else, got {', '.join(sorted(taken))}")
    return extra


def _is_url(text: str) -> bool:
    try:
        address = urlsplit(text)
        return address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:
        return False


class OpenaiWriter:
    """Asks a server. It holds the name of the key's variable; the key itself is read when there is something to ask."""

    def __init__(self, model: str, config: OpenaiConfig):
        """Raises:
        ConfigError: no model or no server is named, `api_key_env` is no name, or `extra_body` no JSON object.
        """
        if not model:
            raise ConfigError("preprocess.openai.model: expected the model's name on the server (or a stage's own `model`), got none")
        check_secrets(config)
        if not _is_url(config.base_url):
            raise ConfigError(f"preprocess.openai.base_url: expected a URL such as http://localhost:8000/v1, got {config.base_url!r}")
        self._model, self._config = model, config
        self._extra = _read_extra(config.extra_body)

    def describe(self) -> dict[str, Any]:
        # Not the limit of tokens: what it cuts off is not kept.
        config = self._config
        said = {"model": self._model, "temperature": config.temperature, "extra": self._extra, "image_side": config.image_side}
        return {"backend": "openai", "version": VERSION, **said}

    def _read_key(self) -> str:
        name = self._config.api_key_env
        if not name:
            return ""
        key = os.environ.get(name, "").strip()
        if not key:
            raise ConfigError(f"preprocess.openai.api_key_env: expected the key in the environment variable {name}, which is not set")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ConfigError(f"environment variable {name}: expected a key of printable ASCII characters, got others")
        return key

    def write(self, requests: Iterable[Request]) -> Iterator[Written | Unanswered]:
        """At most one more than `concurrency` requests are taken ahead of their answers.

        Raises:
          ConfigError: the key is missing, the server refuses it, or does not answer (`max_failures`).
        """
        todo = iter(requests)
        request = next(todo, None)
        if request is None:
            return
        session = _Session(self._model, self._config, self._read_key())
        with start_blocking_portal(name="openai") as portal, portal.wrap_async_context_manager(session):
            running: set[Future[Written | Unanswered]] = set()
            failures = 0
            while request is not None or running:
                if request is not None:
                    running.add(portal.start_task_soon(session.answer, request))
                    request = next(todo, None)
                full = request is None or len(running) >= self._config.concurrency
                done, running = wait(running, timeout=None if full else 0, return_when=FIRST_COMPLETED)
                stop = ""
                for answer in (future.result() for future in done):
                    yield answer
                    failures = failures + 1 if isinstance(answer, Unanswered) else 0
                    if isinstance(answer, Unanswered) and (answer.kind in _STOPS or failures == self._config.max_failures):
                        stop = stop or self._describe_stop(answer, failures)
                if stop:  # what arrived with it has been handed on
                    raise ConfigError(stop)

    def _describe_stop(self, answer: Unanswered, failures: int) -> str:
        key = f"the key in {self._config.api_key_env}" if self._config.api_key_env else "no key (preprocess.openai.api_key_env is empty)"
        return (
            f"{self._config.base_url}, model {self._model!r}, {key}: expected an answer, got none {failures:,} times in a row, "
            f"last {answer.kind}: {answer.detail}; answers so far are kept, the same command goes on"
        )
