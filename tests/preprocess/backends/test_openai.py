"""Backend `openai` against a server on loopback that does what servers should not."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("openai", reason="needs the extra `openai`")
sys.path.insert(0, str(Path(__file__).parent))

from chat_server import KEY, Handler, Reply, Server, complete, serve

from mllmrec_jax.config import ConfigError
from mllmrec_jax.preprocess.backends.openai import OpenaiWriter, encode_picture, read_retry_after
from mllmrec_jax.preprocess.backends.protocol import Picture, Request, ShownItem, Unanswered, Written, make_request
from mllmrec_jax.preprocess_config import OpenaiConfig


@pytest.fixture
def start() -> Iterator[Callable[[Reply], Server]]:
    with contextlib.ExitStack() as stack:
        yield lambda reply: stack.enter_context(serve(reply))


def open_writer(server: Server, **options: Any) -> OpenaiWriter:
    defaults: dict[str, Any] = {"base_url": server.url, "backoff_s": 0.01, "retries": 3}
    return OpenaiWriter("m", OpenaiConfig(**(defaults | options)))


def list_requests(writer: OpenaiWriter, prompts: Sequence[str] = ("a prompt",)) -> list[Request]:
    return [make_request("pseudo_cot", prompt, [], writer.describe()) for prompt in prompts]


def ask(server: Server, prompt: str = "a prompt", **options: Any) -> Written | Unanswered:
    writer = open_writer(server, **options)
    (answer,) = writer.write(list_requests(writer, [prompt]))
    return answer


def echo(handler: Handler, prompt: str, count: int) -> None:
    handler.send(complete(f"answer to {prompt}"))


def test_answers_arrive_whatever_the_order(start: Callable[[Reply], Server]) -> None:
    others = threading.Event()

    def reply(handler: Handler, prompt: str, count: int) -> None:
        if prompt == "p0":
            others.wait(30)
        echo(handler, prompt, count)
        if prompt == "p9":
            others.set()

    writer = open_writer(start(reply), concurrency=4)
    requests = list_requests(writer, [f"p{number}" for number in range(12)])
    answers = list(writer.write(iter(requests)))
    assert {answer.key: answer.text for answer in answers if isinstance(answer, Written)} == {
        request.key: f"answer to {request.prompt}" for request in requests
    }
    assert answers[0].key != requests[0].key  # the slow one holds up no other
    assert answers[0].usage == {"prompt tokens": 10, "answer tokens": 5}


def test_requests_are_taken_as_they_are_needed_and_never_more_at_a_time_than_allowed(start: Callable[[Reply], Server]) -> None:
    def reply(handler: Handler, prompt: str, count: int) -> None:
        time.sleep(0.03)
        echo(handler, prompt, count)

    server = start(reply)
    writer = open_writer(server, concurrency=3)
    taken, arrived = 0, 0

    def list_lazily() -> Iterator[Request]:
        nonlocal taken
        for request in list_requests(writer, [f"p{number}" for number in range(20)]):
            taken += 1
            yield request

    for _ in writer.write(list_lazily()):
        arrived += 1
        assert taken - arrived <= 4
    assert arrived == 20 and 2 <= server.busiest <= 3


def test_nothing_to_ask_needs_neither_key_nor_server() -> None:
    writer = OpenaiWriter("m", OpenaiConfig(base_url="http://127.0.0.1:9/v1", api_key_env="MLLMREC_NOT_SET"))
    assert list(writer.write([])) == []


@pytest.mark.parametrize("header", ["seconds", "date"])
def test_retry_after_is_waited_for(start: Callable[[Reply], Server], header: str) -> None:
    def reply(handler: Handler, prompt: str, count: int) -> None:
        if count == 1:
            after = "1" if header == "seconds" else time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
            handler.send(b'{"error": {"message": "slow down"}}', 429, retry_after=after)
        else:
            echo(handler, prompt, count)

    server = start(reply)
    answer = ask(server)
    assert isinstance(answer, Written) and answer.usage["repetitions"] == 1
    assert server.times[1] - server.times[0] > 0.95


def test_longer_retry_after_than_allowed_is_not_waited_for(start: Callable[[Reply], Server]) -> None:
    server = start(lambda handler, prompt, count: handler.send(b"{}", 429, retry_after="3600"))
    answer = ask(server, max_retry_after_s=60.0)
    assert isinstance(answer, Unanswered) and answer.kind == "HTTP 429" and "3,600 s" in answer.detail and len(server.asked) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250"}, 0.25),
        ({}, 0.0),
        ({"retry-after": "soon"}, 0.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "nan"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
    ],
)
def test_retry_after_of_any_form(headers: dict[str, str], seconds: float) -> None:
    assert read_retry_after(headers) == seconds


def fail_slowly(handler: Handler) -> None:
    """A byte every now and then: never silent for long, never done."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(100):
        time.sleep(0.05)
        handler.wfile.write(b" ")
        handler.wfile.flush()


FAILURES: dict[str, tuple[Callable[[Handler], None], str]] = {
    "500": (lambda handler: handler.send(b"<h1>oops</h1>", 500, content_type="text/html"), "HTTP 500"),
    "429 without a time": (lambda handler: handler.send(b"{}", 429), "HTTP 429"),
    "cut": (Handler.cut, "no connection"),
    "silent": (lambda handler: time.sleep(2), "timed out"),
    "slow body": (fail_slowly, "timed out"),
    "no JSON": (lambda handler: handler.send(b'{"choices": [{"mess'), "no completion"),
    "a page": (lambda handler: handler.send(b"<html>log in</html>", content_type="text/html"), "no completion"),
    "other JSON": (lambda handler: handler.send(b'{"error": "busy"}'), "no completion"),
    "no choices": (lambda handler: handler.send(b'{"choices": []}'), "no completion"),
    "wrong types": (lambda handler: handler.send(b'{"choices": [{"message": {"content": 7}}]}'), "no completion"),
    "no UTF-8": (lambda handler: handler.send(b'{"choices": [{"message": {"content": "\xff"}}]}'), "no completion"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_passing_failures_are_asked_again_and_lasting_ones_counted(start: Callable[[Reply], Server], name: str) -> None:
    fail, kind = FAILURES[name]

    def reply(handler: Handler, prompt: str, count: int) -> None:
        echo(handler, prompt, count) if prompt == "passing" and count > 1 else fail(handler)

    server = start(reply)
    times = {"read_timeout_s": 0.6, "timeout_s": 0.9} if kind == "timed out" else {}
    writer = open_writer(server, retries=2, **times)
    passing, lasting = list_requests(writer, ["passing", "lasting"])
    answers = {answer.key: answer for answer in writer.write([passing, lasting])}
    assert answers[passing.key] == Written(passing.key, "answer to passing", {"prompt tokens": 10, "answer tokens": 5, "repetitions": 1})
    unanswered = answers[lasting.key]
    assert isinstance(unanswered, Unanswered) and unanswered.kind == kind and unanswered.usage == {"repetitions": 2}
    assert Counter(server.asked) == {"passing": 2, "lasting": 3}


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (complete("half of", "length"), "truncated"),
        (complete("<think>no end", "length"), "truncated"),
        (complete(None, refusal="I will not"), "refused"),
        (complete("", "content_filter"), "refused"),
        (complete(""), "empty"),
        (complete(None, reasoning_content="thought only"), "empty"),
        (complete("<think>no end"), "empty"),
        (complete("  \n"), "empty"),
    ],
)
def test_unusable_answers_are_not_asked_again_and_are_paid_for(start: Callable[[Reply], Server], body: bytes, kind: str) -> None:
    server = start(lambda handler, prompt, count: handler.send(body))
    answer = ask(server, input_price=2.0, output_price=10.0)
    assert isinstance(answer, Unanswered) and answer.kind == kind and len(server.asked) == 1
    assert answer.usage == {"prompt tokens": 10, "answer tokens": 5, "cost": pytest.approx(70e-6)}


def test_reasoning_is_left_out_and_its_tokens_are_counted(start: Callable[[Reply], Server]) -> None:
    body = json.loads(complete("<think>hm</think>\n\nStep 1: \u4e03\u4eba\u306e\u4f8d \U0001f3ac", reasoning_content="hm, hm"))
    body["usage"]["completion_tokens_details"] = {"reasoning_tokens": 3}
    answer = ask(start(lambda handler, prompt, count: handler.send(json.dumps(body).encode())))
    assert answer[1:] == ("Step 1: \u4e03\u4eba\u306e\u4f8d \U0001f3ac", {"prompt tokens": 10, "answer tokens": 5, "reasoning tokens": 3})


def test_answers_without_a_count_of_tokens_say_so(start: Callable[[Reply], Server]) -> None:
    body = json.loads(complete("yes"))
    del body["usage"]
    answer = ask(start(lambda handler, prompt, count: handler.send(json.dumps(body).encode())), input_price=1.0)
    assert answer[1:] == ("yes", {"answers without a count of tokens": 1, "cost": 0.0})


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_a_refusing_server_stops_the_run_at_once(start: Callable[[Reply], Server], monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("MLLMREC_TEST_KEY", KEY)

    def reply(handler: Handler, prompt: str, count: int) -> None:
        handler.send(json.dumps({"error": {"message": f"no: {handler.headers['Authorization']}"}}).encode(), status)

    server = start(reply)
    writer = open_writer(server, api_key_env="MLLMREC_TEST_KEY", concurrency=2)
    with pytest.raises(ConfigError) as error:
        list(writer.write(list_requests(writer, [f"p{number}" for number in range(50)])))
    assert all(word in str(error.value) for word in (server.url, "'m'", "MLLMREC_TEST_KEY", f"HTTP {status}", "no: Bearer [key]"))
    assert KEY not in repr(error.value) and len(server.asked) <= 4


def test_a_server_that_is_down_stops_the_run(start: Callable[[Reply], Server]) -> None:
    server = start(echo)
    server.shutdown()
    server.server_close()
    writer = open_writer(server, retries=1, max_failures=5, concurrency=2)
    with pytest.raises(ConfigError, match="none 5 times in a row, last no connection"):
        list(writer.write(list_requests(writer, [f"p{number}" for number in range(50)])))


def test_failures_here_and_there_do_not_stop_the_run(start: Callable[[Reply], Server]) -> None:
    def reply(handler: Handler, prompt: str, count: int) -> None:
        handler.send(b"{}", 400) if int(prompt) % 3 == 0 else echo(handler, prompt, count)

    server = start(reply)
    writer = open_writer(server, max_failures=5, concurrency=1)
    answers = list(writer.write(list_requests(writer, [str(number) for number in range(30)])))
    assert Counter(type(answer) for answer in answers) == {Written: 20, Unanswered: 10}
    assert max(Counter(server.asked).values()) == 1  # 400 is not asked again


def test_requests_a_minute_hold_with_repetitions(start: Callable[[Reply], Server]) -> None:
    def reply(handler: Handler, prompt: str, count: int) -> None:
        handler.send(b"{}", 500) if count == 1 else echo(handler, prompt, count)

    server = start(reply)
    writer = open_writer(server, requests_per_minute=1200)
    began = time.monotonic()
    assert len(list(writer.write(list_requests(writer, [f"p{number}" for number in range(10)])))) == 10
    assert len(server.times) == 20 and time.monotonic() - began >= 19 * 0.05


def test_tokens_a_minute_hold(start: Callable[[Reply], Server]) -> None:
    server = start(lambda handler, prompt, count: handler.send(complete("yes", prompt=90, answer=60)))
    writer = open_writer(server, tokens_per_minute=30_000, concurrency=2)  # 500 a second
    began = time.monotonic()
    assert len(list(writer.write(list_requests(writer, [f"p{number}" for number in range(14)])))) == 14
    # 14 of 150 tokens; a second's worth goes at once, and the last two are settled with nobody.
    assert time.monotonic() - began > 2


def make_picture(side: int) -> Picture:
    image = Image.new("RGB", (side, side // 2), "teal")
    image.info |= {"comment": b"private", "exif": b"Exif\0\0private", "icc_profile": b"private", "dpi": (72, 72)}
    return Picture("0" * 64, lambda: image)


def test_pictures_are_sent_small_and_without_metadata(start: Callable[[Reply], Server]) -> None:
    server = start(echo)
    writer = open_writer(server, image_side=64)
    items = [ShownItem("a", picture=make_picture(300)), ShownItem("b"), ShownItem("c", picture=make_picture(300))]
    (answer,) = writer.write([make_request("pseudo_cot", "look", items, writer.describe())])
    assert isinstance(answer, Written)
    text, *shown = server.bodies[0]["messages"][0]["content"]
    assert text == {"type": "text", "text": "look"} and [part["type"] for part in shown] == ["image_url"] * 2
    head, _, data = shown[0]["image_url"]["url"].partition(",")
    content = base64.b64decode(data)
    image = Image.open(io.BytesIO(content))
    assert head == "data:image/jpeg;base64" and image.format == "JPEG" and image.size == (64, 32)
    assert not image.getexif() and b"private" not in content


def test_small_pictures_are_not_enlarged() -> None:
    content = base64.b64decode(encode_picture(Image.new("RGB", (1, 1)), side=512).partition(",")[2])
    assert Image.open(io.BytesIO(content)).size == (1, 1)


def test_requests_without_pictures_are_plain_text(start: Callable[[Reply], Server]) -> None:
    server = start(echo)
    writer = open_writer(server)
    items = [ShownItem("a title", "a caption")]
    assert len(list(writer.write([make_request("refine_cot", "refine", items, writer.describe(), draft="Step 1")]))) == 1
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "refine"}]


def test_what_is_sent_beside_the_message(start: Callable[[Reply], Server], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "another-servers")
    monkeypatch.setenv("MLLMREC_TEST_KEY", f"{KEY}\n")
    server = start(echo)
    ask(server)
    ask(
        server,
        api_key_env="MLLMREC_TEST_KEY",
        temperature=0.0,
        max_tokens=7,
        max_tokens_field="max_completion_tokens",
        extra_body='{"k": [1]}',
    )
    bare, full = server.bodies
    assert set(bare) == {"model", "messages", "max_tokens"}
    assert (full["temperature"], full["max_completion_tokens"], full["k"]) == (0.0, 7, [1]) and "max_tokens" not in full
    assert "another-servers" not in str(server.headers)
    assert "authorization" not in server.headers[0] and server.headers[1]["authorization"] == f"Bearer {KEY}"


def test_description_has_what_decides_the_text_and_nothing_else() -> None:
    base = OpenaiConfig(base_url="http://a/v1")
    told = OpenaiWriter("m", base).describe()
    same = OpenaiConfig(
        base_url="http://b/v1", concurrency=1, input_price=3.0, api_key_env="X", max_tokens=9, retries=0, tokens_per_minute=1, model="n"
    )
    assert OpenaiWriter("m", same).describe() == told
    changes: list[dict[str, Any]] = [{"temperature": 0.5}, {"image_side": 64}, {"extra_body": '{"k": 1}'}]
    for change in changes:
        assert OpenaiWriter("m", OpenaiConfig(base_url="http://a/v1", **change)).describe() != told
    assert OpenaiWriter("n", base).describe() != told


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model": ""}, "openai.model: expected the model's name"),
        ({"base_url": ""}, "openai.base_url: expected a URL"),
        ({"base_url": "localhost:8000/v1"}, "openai.base_url: expected a URL"),
        ({"base_url": "http://localhost:80000/v1"}, "openai.base_url: expected a URL"),
        ({"base_url": f"http://me:{KEY}@localhost/v1"}, "without user and password"),
        ({"extra_body": "{"}, "openai.extra_body: expected a JSON object"),
        ({"extra_body": "[1]"}, "openai.extra_body: expected a JSON object"),
        ({"extra_body": '{"messages": []}'}, "got messages"),
        ({"api_key_env": "MLLMREC_NOT_SET"}, "MLLMREC_NOT_SET, which is not set"),
        ({"api_key_env": KEY}, "expected the name of an environment variable"),
        ({"api_key_env": "MLLMREC_BAD_KEY"}, "MLLMREC_BAD_KEY: expected a key of printable"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLMREC_BAD_KEY", f"{KEY}\u2019")
    defaults: dict[str, Any] = {"base_url": "http://127.0.0.1:9/v1", "model": "m"}
    config = OpenaiConfig(**(defaults | options))

    def open_and_ask() -> None:
        writer = OpenaiWriter(config.model, config)
        list(writer.write(list_requests(writer)))

    with pytest.raises(ConfigError, match=expected) as error:
        open_and_ask()
    assert KEY not in str(error.value)
