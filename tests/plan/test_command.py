"""`mllmrec plan`: what it prints, what it refuses, and what it says where nothing fits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mllmrec_jax import cli
from mllmrec_jax.config import ConfigError, MeshConfig
from mllmrec_jax.plan.command import parse_bytes, plan, read_options
from mllmrec_jax.plan.devices import find_device
from mllmrec_jax.plan.models import read_shapes, resolve_model
from mllmrec_jax.plan.search import list_layouts, list_meshes, search_layouts

TINY = "bench/peer_tiny"


@pytest.mark.parametrize(("text", "size"), [("80GB", 80e9), ("80", 80e9), ("16GiB", 16 * 2**30), ("1.5 tb", 1.5e12), ("500MB", 5e8)])
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0GB", "80 gigs", "nan"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="80GB"):
        parse_bytes(text)


def test_meshes_are_all_the_products():
    meshes = list_meshes(8)
    assert len(meshes) == len(set(meshes)) == 10
    assert all(mesh.data * mesh.fsdp * mesh.tensor == 8 for mesh in meshes)


def test_layouts_keep_the_prompts_of_a_step_and_divide():
    config = resolve_model("Qwen3-0.6B")
    found = list(list_layouts(config, 16))
    for chosen, mesh in found:
        assert chosen.grpo.batch_size * chosen.grpo.accumulation == 32
        assert chosen.grpo.batch_size % (mesh.data * mesh.fsdp) == 0
        assert config.model.num_kv_heads % mesh.tensor == 0
    assert MeshConfig(1, 1, 16) not in {mesh for _, mesh in found}  # 8 key/value heads
    assert {chosen.model.remat for chosen, _ in found} == {"none", "dots", "full"}
    assert {chosen.model.cache_dtype for chosen, _ in found} == {"compute", "int8"}


def test_the_fastest_comes_first_and_the_best_fits(capsys, tmp_path):
    out = tmp_path / "deep" / "plan.json"
    assert plan([TINY, "--devices", "2", "--memory", "1GB", "--json", str(out)]) == 0
    said, result = capsys.readouterr().out, json.loads(out.read_text())
    seconds = [one["step_s"] for one in result["fitting"]]
    assert seconds == sorted(seconds)
    assert all(one["memory"]["peak"] <= result["usable_bytes"] == 920_000_000 for one in result["fitting"])
    best = result["fitting"][0]
    assert f"--mesh.data {best['mesh']['data']}" in said and "KV cache of prompts" in said and "logprob" in said
    flags = re.search(r"the first: (.*)", said)
    assert flags is not None
    # What it prints is what a run takes.
    _, config, _ = read_options([TINY, "--devices", "2", *flags[1].split()])
    chosen = config.mesh.data, config.grpo.batch_size, config.grpo.reuse_rollout
    assert chosen == (best["mesh"]["data"], best["batch_size"], best["reuse_rollout"])


def test_eight_bit_caches_come_after_those_asked_for():
    found = search_layouts(resolve_model(TINY), 2, find_device("h100"))
    half = len(found) // 2
    assert {one.config.model.cache_dtype for one in found[:half]} == {"compute"}
    assert {one.config.model.cache_dtype for one in found[half:]} == {"int8"}


def test_more_memory_never_fits_less():
    peaks = [candidate.memory.peak for candidate in search_layouts(resolve_model(TINY), 2, find_device("h100"))]
    least, most = min(peaks), max(peaks)
    counts = [sum(peak <= least + share * (most - least) for peak in peaks) for share in (0.0, 0.3, 0.6, 1.0)]
    assert counts == sorted(counts) and 1 <= counts[0] < counts[-1] == len(peaks)


def test_where_nothing_fits_it_says_by_how_much_and_what_to_change(capsys):
    assert plan([TINY, "--devices", "1", "--memory", "60MB", "--headroom", "0"]) == 1
    said = capsys.readouterr().out
    needs, over = (float(number) for number in re.findall(r"needs ([\d.]+) GB.*?, ([\d.]+) GB more", said)[0])
    assert needs - over == pytest.approx(0.06, abs=0.011)
    assert "most of it is" in said
    assert re.search(r"GB  (fits|does not fit) +2 devices", said)
    assert "grpo.group_size 4" in said


def test_a_folder_and_a_shape_mean_the_same(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(read_shapes()["Qwen3-1.7B"]))
    folder, shape = resolve_model(str(tmp_path)), resolve_model("Qwen3-1.7B")
    assert (folder.model, folder.tokenizer) == (shape.model, shape.tokenizer)


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["Qwen3-5B", "--devices", "8"], "nearest: 'Qwen3-8B'|nearest: 'Qwen3-4B'"),
        (["no/such.toml", "--devices", "8"], "no/such.toml"),
        ([TINY, "--devices", "0"], "--devices: expected at least 1, got 0"),
        ([TINY, "--devices", "7"], "no mesh divides 2 prompts"),
        ([TINY, "--devices", "1", "--memory", "lots"], "--memory"),
        ([TINY, "--devices", "1", "--device", "h300"], "--device: expected one of"),
        ([TINY, "--devices", "1", "--interconnect", "0"], "--interconnect"),
        ([TINY, "--devices", "1", "--headroom", "1"], "--headroom"),
        ([TINY, "--devices", "1", "--measured", "none.json"], "none.json: cannot be read"),
        ([TINY, "--devices", "1", "--prompt.max-prompt-tokens", "4096"], "prompt.max_prompt_tokens"),
    ],
)
def test_bad_input_is_one_message_and_status_2(words, cause, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", *words])
    assert stopped.value.code == 2
    assert re.search(cause, capsys.readouterr().err)


def test_an_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", TINY, "--devices", "1", "--grpo.group-sise", "4"])
    assert stopped.value.code == 2
    assert "group-sise" in capsys.readouterr().err


@pytest.mark.slow
def test_compile_shows_what_xla_says():
    """In a process of its own, which makes its virtual devices before JAX starts."""
    root = Path(__file__).resolve().parents[2]
    words = [sys.executable, "-m", "mllmrec_jax.cli", "plan", TINY, "--devices", "2", "--memory", "2GB", "--compile", "--top", "1"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
    assert "compiled update: arguments" in done.stdout and "compiled rollout: arguments" in done.stdout
