"""Every part of `mllmrec bench` start to finish, as the command line starts it, at sizes that say nothing of speed."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mllmrec_jax import cli
from mllmrec_jax.bench import loader
from mllmrec_jax.bench.measure import read_clocks
from mllmrec_jax.bench.rows import make_document, make_row
from mllmrec_jax.bench.run import BENCHMARKS
from mllmrec_jax.config import RunConfig

MODEL = {"num_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
WORLD = {"items": 20, "users": 30, "min_length": 6, "max_length": 8}
OPTIONS = {
    **{f"--model.{name}": value for name, value in MODEL.items()},
    **{f"--data.posterworld.{name}": value for name, value in WORLD.items()},
    "--data.history_len": 5,
    "--prompt.max_prompt_tokens": 24,
    "--tokenizer.vocab_size": 64,
    "--grpo.group_size": 3,
    "--grpo.max_new_tokens": 5,
    "--grpo.lora.rank": 4,
    "--sft.accumulation": 2,
    "--evaluate.batch_size": 4,
    "--preprocess.embed.steps": 3,
    "--preprocess.embed.batch_size": 4,
    "--mesh.data": 1,  # of the tests' eight devices
}


def bench(folder: Path, what: str, *options: Any, repeats: int = 2) -> dict[str, Any]:
    """The document that the command wrote."""
    path = folder / f"{what}.json"
    words = ["bench", what, "--json", path, "--repeats", repeats, "--cache", folder / "cache", *options]
    words += [word for pair in OPTIONS.items() for word in pair]
    cli.main([str(word) for word in words])
    return json.loads(path.read_text())


def check_row(row: dict[str, Any], repeats: int = 2) -> None:
    assert len(row["seconds"]) == repeats
    assert min(row["seconds"]) <= row["p20"] <= row["p50"] <= row["p80"] <= max(row["seconds"])
    assert row["shape"]


def test_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = bench(tmp_path, "step")
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == ["generate", "update", "step"]
    for name, row in rows.items():
        check_row(row)
        assert document[f"{name}_s"] == {key: row[key] for key in ("p20", "p50", "p80")}
        # B (P + G C) tokens against B G (P + C).
        assert row["unshared_tokens_per_s"] / row["tokens_per_s"] == pytest.approx(2 * 3 * (24 + 5) / (2 * (24 + 3 * 5)))
        assert row["samples_per_s"] * row["p50"] == pytest.approx(6)
        assert row["flops"]["executed_xla"] >= row["flops"]["executed_formula"] > 0
        assert row["bytes"]["accessed_xla"] > row["bytes"]["least_formula"] > 0
        assert row["mfu"] is None  # of a CPU no peak is known
    assert rows["update"]["memory_xla"]["peak"] > 0
    assert document["shapes"] == {"prompts": 2, "prompt_tokens": 24, "group_size": 3, "new_tokens": 5, "vocabulary": 64}
    assert {"commit", "versions", "device"} <= set(document["provenance"])
    assert f"wrote {tmp_path / 'step.json'}" in capsys.readouterr().out


@pytest.mark.parametrize(("factor", "code"), [(1.0, None), (1.25, cli.SLOWER)])
def test_a_slower_row_ends_with_a_status(
    factor: float, code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(config: RunConfig, *, repeats: int) -> dict[str, Any]:
        seconds = [scale * (1 + 0.001 * i) for i in range(repeats)]
        return make_document("step", config, [make_row("step", seconds, shape={"prompts": 2})], repeats=repeats, clocks=read_clocks())

    monkeypatch.setitem(BENCHMARKS, "step", measure)
    scale = 0.1
    bench(tmp_path, "step", repeats=9)
    old = (tmp_path / "step.json").rename(tmp_path / "old.json")
    scale *= factor
    if code is None:
        bench(tmp_path, "step", "--compare", old, repeats=9)
    else:
        with pytest.raises(SystemExit) as stopped:
            bench(tmp_path, "step", "--compare", old, repeats=9)
        assert stopped.value.code == code
    assert ("SLOWER by over 10%" in capsys.readouterr().out) == (code is not None)


@pytest.mark.slow
def test_step_over_a_mesh(tmp_path: Path) -> None:
    document = bench(tmp_path, "step", "--mesh.fsdp", 2, "--mesh.tensor", 2, repeats=1)
    for row in document["rows"]:
        assert row["shape"]["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
        assert row["bytes"]["accessed_xla"] is None
        # Of all devices together.
        assert row["flops"]["executed_xla"] >= row["flops"]["executed_formula"]


def test_rollout(tmp_path: Path) -> None:
    document = bench(tmp_path, "rollout")
    prefill, rollout = document["rows"]
    assert [prefill["name"], rollout["name"]] == ["prefill", "rollout"]
    assert prefill["tokens_per_s"] * prefill["p50"] == pytest.approx(2 * 24)
    assert rollout["flops"]["model"] > prefill["flops"]["model"]


@pytest.mark.slow
def test_update(tmp_path: Path) -> None:
    document = bench(tmp_path, "update", "--grpo.accumulation", 2)
    update, reusing = document["rows"]
    assert [update["name"], reusing["name"]] == ["update", "update_reusing"]
    assert reusing["flops"]["executed_xla"] < update["flops"]["executed_xla"]
    assert document["shapes"]["prompts"] == 4


def test_sft(tmp_path: Path) -> None:
    (row,) = bench(tmp_path, "sft")["rows"]
    check_row(row)
    assert row["shape"]["prompts"] == 4
    assert row["samples_per_s"] * row["p50"] == pytest.approx(4)


def test_kernels(tmp_path: Path) -> None:
    rows = bench(tmp_path, "kernels", "--grpo.max_new_tokens", 3, repeats=1)["rows"]
    names = [row["name"] for row in rows]
    assert names.count("logprob forward") == 2  # by chunks, and the reference
    assert {"attention prompt forward", "attention group gradient", "sampling"} <= set(names)
    for row in rows:
        check_row(row, repeats=1)


def test_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "EXAMPLES", 130)
    document = bench(tmp_path, "loader", repeats=1)
    names = [f"{store} {cache} {epoch}" for store in ("held", "sharded") for cache in ("cold", "warm") for epoch in ("first", "next")]
    assert [row["name"] for row in document["rows"]] == names
    for row in document["rows"]:
        assert row["shape"]["examples"] == 128  # whole batches of 4
        assert row["examples_per_s"] * row["p50"] == pytest.approx(128)
        assert row["times_trainer"] == pytest.approx(row["examples_per_s"] / document["trainer_examples_per_s"])
    assert not list((tmp_path / "cache").glob("bench-loader-*"))


def test_rank(tmp_path: Path) -> None:
    document = bench(tmp_path, "rank", "--data.negatives", 3)
    rank, alone = document["rows"]
    assert rank["shape"]["group_size"] == 4
    assert rank["users_per_s"] * rank["p50"] == pytest.approx(4)
    assert alone["users_per_s"] * alone["p50"] == pytest.approx(1)
    assert document["times_faster"]["p50"] > 0


@pytest.mark.skipif(find_spec("torch") is None or find_spec("rapidfuzz") is None, reason="needs the extra `preprocess`")
def test_preprocess(tmp_path: Path) -> None:
    rows = {row["name"]: row for row in bench(tmp_path, "preprocess", repeats=1)["rows"]}
    # A caption a distinct picture, an embedding a picture and a title.
    assert 0 < rows["caption"]["made"][0] <= 20
    assert rows["embed"]["made"][0] == rows["caption"]["made"][0] + 20
    assert rows["caption"]["captions_per_s"] == pytest.approx(rows["caption"]["made"][0] / rows["caption"]["p50"])


@pytest.mark.slow
def test_scaling(tmp_path: Path) -> None:
    plot = tmp_path / "plots" / "curves.svg"
    document = bench(tmp_path, "scaling", "--over", "group_size", "--values", "2,4", "--plot", plot, repeats=1)
    steps = [row for row in document["rows"] if row["name"] == "step"]
    assert [(row["group_size"], row["layout"]) for row in steps] == [(2, "shared"), (2, "repeated"), (4, "shared"), (4, "repeated")]
    for shared, repeated in zip(steps[::2], steps[1::2], strict=True):
        assert shared["flops"]["executed_formula"] < repeated["flops"]["executed_formula"]
    assert set(document["exponents"]) == {"shared", "repeated"}
    assert document["exponents"]["repeated"]["peak_bytes"] > document["exponents"]["shared"]["peak_bytes"]
    text = "".join(ElementTree.parse(plot).getroot().itertext())
    assert "completions a prompt, G" in text
    assert "shared ~ x^" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["scaling"], "--over: expected a size"),
        (["step", "--over", "layers"], "--over: expected nothing"),
        (["scaling", "--over", "group_size", "--values", "1,4"], "expected sizes of at least 2"),
        (["scaling", "--over", "layers", "--values", "4"], "expected two sizes or more"),
        (["step", "--repeats", "0"], "--repeats: expected at least 1"),
        (["step", "--threshold", "0"], "--threshold: expected a share above 0"),
        (["step", "--plot", "x.svg"], "--plot: belongs to"),
        (["step", "--compare", "none.json"], "none.json: cannot be read"),
        (["step", "--prompt.max_prompt_tokens", "5000"], "5000 tokens and 32 new tokens need 5032 positions"),
        pytest.param(
            ["preprocess", "--data.source", "movielens", "--data.path", "x"],
            "data.source: expected 'posterworld'",
            marks=pytest.mark.skipif(find_spec("torch") is None, reason="needs the extra `preprocess`"),
        ),
    ],
)
def test_bad_options_are_one_message(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *words, "--mesh.data", "1"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
