"""Whole runs of `mllmrec preprocess` whose writer is a server: what is kept, what is asked again, what is told."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

pytest.importorskip("openai", reason="needs the extra `openai`")
sys.path.insert(0, str(Path(__file__).parent))
from chat_server import KEY, Handler, Server, complete, serve

from mllmrec_jax.config import ConfigError, RunConfig, to_dict
from mllmrec_jax.data.records import DataError
from mllmrec_jax.preprocess.run import run_preprocess
from mllmrec_jax.preprocess.store import Store
from mllmrec_jax.preprocess.summary import list_summary
from mllmrec_jax.preprocess_config import CaptionConfig, OpenaiConfig, TraceConfig

ROOT = Path(__file__).resolve().parents[3]
WORDS = ["amber", "barn", "cliff", "dusk", "ember", "fjord", "grove", "harbour", "ice", "jetty"]
WRITING = ("caption", "pseudo_cot", "refine_cot")


def write_answer(prompt: str) -> bytes:
    """Words that depend on the prompt."""
    seed = zlib.crc32(prompt.encode())
    words = [WORDS[seed // 10**place % 10] for place in range(4)]
    if "Step 1:" not in prompt:
        return complete(f"A picture of {' and '.join(words)}.", prompt=100, answer=10)
    steps = "\n".join(f"Step {number}: {word} <b>" for number, word in enumerate(words, start=1))
    return complete(f"<think>so</think>\n{steps}", prompt=200, answer=40)


def answer(handler: Handler, prompt: str, count: int) -> None:
    handler.send(write_answer(prompt))


@pytest.fixture
def server() -> Iterator[Server]:
    with serve(answer) as server:
        yield server


def ask(config: RunConfig, server: Server, **options: Any) -> RunConfig:
    """The configuration with all three stages written by `server`."""
    openai = OpenaiConfig(**({"base_url": server.url, "model": "m", "backoff_s": 0.01, "retries": 2} | options))
    traced = TraceConfig(backend="openai")
    stages = {"caption": CaptionConfig(backend="openai"), "pseudo_cot": traced, "refine_cot": traced, "openai": openai}
    return dataclasses.replace(config, preprocess=dataclasses.replace(config.preprocess, **stages))


def read_report(config: RunConfig) -> dict[str, Any]:
    return json.loads((config.output / config.name / "preprocess" / "report.json").read_text())["stages"]


def read_outputs(config: RunConfig) -> dict[str, bytes]:
    folder = config.output / config.name / "preprocess"
    files = (path for name in ("embeddings", "scores", "emit") for path in sorted((folder / name).rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_outputs_do_not_depend_on_the_order_of_answers(config: RunConfig, server: Server, tmp_path: Path) -> None:
    def answer_late(handler: Handler, prompt: str, count: int) -> None:
        time.sleep(zlib.crc32(prompt.encode()) % 7 / 200)
        if count == 1 and zlib.crc32(prompt.encode()) % 5 == 0:
            handler.send(b"{}", 500)
        else:
            answer(handler, prompt, count)

    config = ask(config, server, concurrency=1)
    report = run_preprocess(config)
    server.reply = answer_late
    other = ask(dataclasses.replace(config, output=tmp_path / "a", cache=tmp_path / "b"), server, concurrency=16)
    assert run_preprocess(other)["chain"] == report["chain"]
    assert read_outputs(other) == read_outputs(config) and len(read_outputs(config)) > 20


def test_pictures_go_to_the_stages_that_look_and_to_no_other(config: RunConfig, server: Server) -> None:
    run_preprocess(ask(config, server), until="refine_cot")
    shown: Counter[str] = Counter()
    for body in server.bodies:
        content = body["messages"][0]["content"]
        prompt = content if isinstance(content, str) else content[0]["text"]
        stage = "caption" if "Step 1:" not in prompt else "pseudo_cot" if "attached pictures" in prompt else "refine_cot"
        pictures = 0 if isinstance(content, str) else len(content) - 1
        assert pictures == {"caption": 1, "pseudo_cot": 5, "refine_cot": 0}[stage]
        shown[stage] += 1
    assert set(shown) == set(WRITING)


def test_stages_name_models_of_their_own(config: RunConfig, server: Server) -> None:
    config = ask(config, server)
    named = dataclasses.replace(config.preprocess, refine_cot=TraceConfig(backend="openai", model="reasoner"))
    run_preprocess(dataclasses.replace(config, preprocess=named), until="refine_cot")
    models = {(body["model"], isinstance(body["messages"][0]["content"], str)) for body in server.bodies}
    assert models == {("m", False), ("reasoner", True)}


def test_tokens_and_cost_are_reported_of_this_run_and_those_before(config: RunConfig, server: Server) -> None:
    config = ask(config, server, input_price=1.0, output_price=10.0)
    first = run_preprocess(config, until="caption")["stages"]["caption"]
    assert first["usage"] == {"answer tokens": 400, "prompt tokens": 4000, "cost": pytest.approx(8e-3)} and first["usage_before"] == {}
    report = run_preprocess(config, until="pseudo_cot")
    second = report["stages"]["caption"]
    assert second["done"] == 0 and second["usage"] == {} and second["usage_before"] == first["usage"]
    lines = list(list_summary(report))
    windows = report["windows"]
    assert "caption: those found had cost 400 answer tokens, 0.0080 cost, 4,000 prompt tokens" in lines
    assert f"pseudo_cot: {windows} distinct, 0 found, {windows} done, {40 * windows:,} answer tokens" in "\n".join(lines)


def test_what_stays_unanswered_is_asked_again_alone(config: RunConfig, server: Server) -> None:
    def cut_some(handler: Handler, prompt: str, count: int) -> None:
        bad = zlib.crc32(prompt.encode()) % 4 == 0
        handler.send(complete("A pic", "length", prompt=100, answer=7)) if bad else answer(handler, prompt, count)

    server.reply = cut_some
    config = ask(config, server, concurrency=1)
    with pytest.raises(DataError, match=r"caption: expected 40 texts, \d+ are missing; \d+ truncated \(cut off by") as error:
        run_preprocess(config, until="caption")
    bad = {prompt for prompt in server.asked if zlib.crc32(prompt.encode()) % 4 == 0}
    report = read_report(config)["caption"]
    assert report["unanswered"] == {"truncated": len(bad)} and f"{len(bad)} are missing" in str(error.value)
    assert report["usage"]["answer tokens"] == 10 * (40 - len(bad)) + 7 * len(bad)  # what was cut off was paid for
    server.reply, before = answer, len(server.asked)
    assert run_preprocess(config, until="caption")["stages"]["caption"]["done"] == len(bad)
    assert set(server.asked[before:]) == bad and len(server.asked) == before + len(bad)


def write_config(config: RunConfig, folder: Path) -> Path:
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(to_dict(config)))
    return path


def start_command(path: Path, *words: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "MLLMREC_TEST_KEY": KEY}
    command = [sys.executable, "-c", "from mllmrec_jax.cli import main; main()", "preprocess", str(path), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def list_stored(config: RunConfig, *, stages: tuple[str, ...] = WRITING) -> int:
    total = 0
    for name in stages:
        with Store(config.cache / "preprocess" / name) as store:
            total += len(store)
    return total


def test_killed_run_asks_nothing_again_that_was_stored(config: RunConfig, server: Server, tmp_path: Path) -> None:
    def answer_slowly(handler: Handler, prompt: str, count: int) -> None:
        time.sleep(0.03)
        answer(handler, prompt, count)

    server.reply = answer_slowly
    config = ask(config, server, concurrency=4, api_key_env="MLLMREC_TEST_KEY")
    path = write_config(config, tmp_path)
    child = start_command(path, "--stage", "refine_cot")
    deadline = time.monotonic() + 120
    while len(server.asked) < 55 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    time.sleep(0.2)
    stored, asked = list_stored(config), len(server.asked)
    assert 40 < stored < asked <= stored + 8  # 4 in flight, 4 more that the server had answered when the run was killed
    again = start_command(path, "--stage", "refine_cot")
    said, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    total = list_stored(config)
    assert len(server.asked) - asked == total - stored
    assert max(Counter(server.asked).values()) <= 2 and total == len(set(server.asked))
    assert "refine_cot: " in said and "40 found, 0 done" in said


@pytest.mark.parametrize("mistake", [{"api_key_env": KEY}, {"api_key_env": "gsk_0123456789"}, {"base_url": f"http://{KEY}@localhost/v1"}])
def test_a_key_among_the_settings_is_refused_before_anything_is_written(config: RunConfig, server: Server, mistake: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"preprocess\.openai\.(api_key_env|base_url): expected") as error:
        run_preprocess(ask(config, server, **mistake), until="caption")
    assert not config.output.exists() and not any(key in str(error.value) for key in (KEY, "gsk_"))


def test_the_key_is_nowhere(config: RunConfig, server: Server, tmp_path: Path) -> None:
    def repeat_key(handler: Handler, prompt: str, count: int) -> None:
        told = f"you sent {handler.headers['Authorization']}"
        if server.asked[0] == prompt:
            handler.send(complete(told))
        elif "Step 1:" not in prompt:
            answer(handler, prompt, count)
        else:
            handler.send(json.dumps({"error": told}).encode(), 429 if len(server.asked) < 60 else 401)

    server.reply = repeat_key
    config = ask(config, server, api_key_env="MLLMREC_TEST_KEY")
    child = start_command(write_config(config, tmp_path))
    said, errors = child.communicate(timeout=120)
    assert child.returncode == 2 and re.search(r"error: pseudo_cot: http://.*the key in MLLMREC_TEST_KEY.*you sent Bearer \[key\]", errors)
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    secret = KEY.encode()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 3 and not [path for path in files if secret in path.read_bytes()]
    assert KEY not in said + errors
    assert read_report(config)["pseudo_cot"]["unanswered"]
