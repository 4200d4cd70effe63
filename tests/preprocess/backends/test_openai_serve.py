"""Backend `openai` against `transformers serve` with a tiny random model of a true class (Qwen3-VL)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("openai", reason="needs the extra `openai`")
pytest.importorskip("fastapi", reason="`transformers serve` needs fastapi")
pytest.importorskip("uvicorn", reason="`transformers serve` needs uvicorn")

from mllmrec_jax.config import RunConfig
from mllmrec_jax.preprocess.backends.openai import OpenaiWriter
from mllmrec_jax.preprocess.backends.protocol import Picture, ShownItem, Unanswered, Written, make_request
from mllmrec_jax.preprocess.run import run_preprocess
from mllmrec_jax.preprocess.writing import WritingError
from mllmrec_jax.preprocess_config import CaptionConfig, OpenaiConfig

pytestmark = pytest.mark.slow

# The processor's part for videos would need torchvision.
COMMAND = """
import sys
from transformers import Qwen3VLProcessor
names = [name for name in Qwen3VLProcessor.get_attributes() if name != "video_processor"]
Qwen3VLProcessor.get_attributes = classmethod(lambda cls: names)
from transformers.cli.transformers import main
sys.argv = ["transformers", "serve", sys.argv[1], "--port", sys.argv[2], "--device", "cpu"]
main()
"""


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@pytest.fixture(scope="module")
def options(qwen3_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenaiConfig]:
    """How to ask the server. Ends are made likely: a random model would seldom come to one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    url, deadline = f"http://localhost:{port}", time.monotonic() + 120
    with log.open("wb") as file:
        server = subprocess.Popen([sys.executable, "-c", COMMAND, str(qwen3_vl), str(port)], stdout=file, stderr=file)
    try:
        while not is_up(url):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"`transformers serve` does not start here: {log.read_text(errors='replace')[-500:]}")
            time.sleep(0.2)
        end = json.loads((qwen3_vl / "generation_config.json").read_text())["eos_token_id"]
        bias = {str(token): 1.5 for token in (end if isinstance(end, list) else [end])}
        extra = json.dumps({"logit_bias": bias})
        yield OpenaiConfig(base_url=f"{url}/v1", model=str(qwen3_vl), max_tokens=24, extra_body=extra, temperature=1.0, concurrency=2)
    finally:
        server.terminate()
        server.wait(30)


def test_pictures_are_seen_and_tokens_counted(options: OpenaiConfig) -> None:
    writer = OpenaiWriter(options.model, options)
    pictures = [Picture(f"{place}" * 64, lambda: Image.new("RGB", (120, 180), "teal")) for place in range(2)]
    requests = [
        make_request("pseudo_cot", "Look: \u4e03", [ShownItem("a", picture=picture) for picture in pictures[:count]], writer.describe())
        for count in range(3)
    ]
    answers = {answer.key: answer for answer in writer.write(requests)}
    read = [answers[request.key].usage["prompt tokens"] for request in requests]
    assert read[1] - read[0] == read[2] - read[1] > 2  # each picture is as many tokens more
    for answer in answers.values():
        assert isinstance(answer, Written) or answer.kind in ("truncated", "empty")
        assert 0 < answer.usage["answer tokens"] <= 24


def test_a_limit_that_is_too_small_is_told(options: OpenaiConfig) -> None:
    writer = OpenaiWriter(options.model, dataclasses.replace(options, max_tokens=1, extra_body=""))
    (answer,) = writer.write([make_request("refine_cot", "Say it.", [], writer.describe())])
    assert isinstance(answer, Unanswered) and answer.kind == "truncated" and answer.usage["answer tokens"] == 1


def test_captions_are_written_once(config: RunConfig, options: OpenaiConfig) -> None:
    stages = {"caption": CaptionConfig(backend="openai"), "openai": dataclasses.replace(options, max_failures=100)}
    data = dataclasses.replace(config.data, posterworld=dataclasses.replace(config.data.posterworld, items=12, users=10))
    config = dataclasses.replace(config, data=data, preprocess=dataclasses.replace(config.preprocess, **stages))
    for _ in range(12):  # what was cut off or came out empty is asked again, and drawn anew
        with contextlib.suppress(WritingError):
            report = run_preprocess(config, until="caption")["stages"]["caption"]
            break
    else:
        pytest.fail("captions are missing after twelve runs")
    assert report["found"] + report["done"] == 12
    assert (report["usage"] | report["usage_before"])["answer tokens"] > 0
    again = run_preprocess(config, until="caption")["stages"]["caption"]
    assert (again["found"], again["done"], again["usage"]) == (12, 0, {})
