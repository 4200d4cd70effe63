from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mllmrec_jax.config import ConfigError
from mllmrec_jax.preprocess.backends import pretrained, transformers_writer
from mllmrec_jax.preprocess.backends.protocol import Picture, Request, ShownItem, Task, Unanswered, Written, make_request
from mllmrec_jax.preprocess.backends.sampling import SeededSampler, draw_uniforms
from mllmrec_jax.preprocess.backends.transformers_writer import TransformersWriter
from mllmrec_jax.preprocess.store import hash_content
from mllmrec_jax.preprocess_config import TokenLimits, TransformersConfig

LIMITS = TokenLimits(caption=5, pseudo_cot=8, refine_cot=8, quality=8)


def make_picture(seed: int, size: tuple[int, int] = (40, 60)) -> Picture:
    def draw() -> Image.Image:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))

    return Picture(f"{seed:064x}", draw)


def make_writer(folder: Path, **options: Any) -> TransformersWriter:
    return TransformersWriter(str(folder), TransformersConfig(dtype="float32", max_new_tokens=LIMITS, **options))


def make_requests(writer: TransformersWriter, count: int = 10, *, pictures: bool = True, task: Task = "pseudo_cot") -> list[Request]:
    """Of different lengths and, where they are shown, different numbers of pictures."""
    shown = [[ShownItem("a", picture=make_picture(10 * row + place)) for place in range(row % 3 * pictures)] for row in range(count)]
    return [make_request(task, f"request {row} " + "word " * (7 * row % 31), items, writer.describe()) for row, items in enumerate(shown)]


def answer(writer: TransformersWriter, requests: list[Request]) -> dict[str, str]:
    """Texts by prompt: keys differ where settings do."""
    prompts = {request.key: request.prompt for request in requests}
    answers = list(writer.write(iter(requests)))
    assert len(answers) == len(requests) and all(isinstance(one, Written) for one in answers)
    return {prompts[one.key]: one.text for one in answers if isinstance(one, Written)}


class Crowded:
    """A model that runs out of memory above a number of rows."""

    def __init__(self, model: Any, most: int, *, error: type[RuntimeError] = torch.OutOfMemoryError):
        self._model, self._most, self._error = model, most, error
        self.rows: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **inputs: Any) -> torch.Tensor:
        self.rows.append(len(inputs["input_ids"]))
        if self.rows[-1] > self._most:
            raise self._error("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return self._model.generate(**inputs)


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_up(most: int, **options: Any) -> list[Crowded]:
        made: list[Crowded] = []

        def load(*words: Any, **names: Any) -> Crowded:
            made.append(Crowded(pretrained.load_model(*words, **names), most, **options))
            return made[-1]

        monkeypatch.setattr(transformers_writer, "load_model", load)
        return made

    return set_up


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_does_not_depend_on_its_batch(qwen3_vl: Path, temperature: float) -> None:
    found = []
    for batch_size, window in ((1, 1), (4, 10), (7, 3)):
        writer = make_writer(qwen3_vl, batch_size=batch_size, window=window, temperature=temperature, top_p=0.95)
        found.append(answer(writer, make_requests(writer)))
    assert found[0] == found[1] == found[2]
    assert len(set(found[0].values())) > 5


def test_draws_follow_their_seed_and_greedy_answers_do_not_hear_of_the_models_own_sampling(qwen3_vl: Path) -> None:
    texts = []
    for options in ({"temperature": 1.0}, {"temperature": 1.0, "seed": 1}, {}, {"seed": 1}):
        writer = make_writer(qwen3_vl, **options)
        texts.append(answer(writer, make_requests(writer, 4)))
    assert texts[0] != texts[1] and texts[2] == texts[3]


def test_text_models_write_where_no_pictures_are_shown(qwen3: Path, qwen3_vl: Path) -> None:
    writer = make_writer(qwen3, batch_size=4)
    requests = make_requests(writer, pictures=False, task="refine_cot")
    assert len(answer(writer, requests)) == 10
    with pytest.raises(ConfigError, match=r"expected a model that reads pictures for caption, got .*qwen3"):
        list(writer.write(make_requests(writer, task="caption")))
    assert answer(make_writer(qwen3_vl), requests)  # a model that sees need not be shown anything


def test_usage_is_counted(qwen3_vl: Path) -> None:
    writer = make_writer(qwen3_vl)
    requests = make_requests(writer, 6)
    answers = {one.key: one for one in writer.write(requests)}
    for request in requests:
        usage = answers[request.key].usage
        text = writer._tokenizer.apply_chat_template([{"role": "user", "content": request.prompt}], add_generation_prompt=True)
        pictures = sum(item.picture is not None for item in request.items)
        assert usage["prompt tokens"] >= len(text["input_ids"]) + 3 * pictures
        assert 0 < usage["answer tokens"] <= 8
        assert ("answers cut off" in usage) <= (usage["answer tokens"] == 8)


def test_out_of_memory_halves_the_batch_and_goes_on(qwen3_vl: Path, crowd: Any, capsys: pytest.CaptureFixture[str]) -> None:
    roomy = make_writer(qwen3_vl, batch_size=8)
    expected = answer(roomy, make_requests(roomy))
    made = crowd(3)
    writer = make_writer(qwen3_vl, batch_size=8)
    assert answer(writer, make_requests(writer)) == expected
    rows = made[0].rows
    assert rows[:3] == [8, 4, 2] and max(rows[2:]) <= 3 and sum(rows[2:]) == 10
    said = capsys.readouterr().err
    assert "out of memory at 8 requests" in said and "out of memory at 4 requests" in said
    # What was learned holds for what comes later.
    assert answer(writer, make_requests(writer)) == expected and max(made[-1].rows) <= 3


def test_shorter_requests_may_still_be_many(qwen3: Path, crowd: Any) -> None:
    writer = make_writer(qwen3, batch_size=8)
    made = crowd(4)
    long = [make_request("refine_cot", f"{row} " + "word " * 200, [], writer.describe()) for row in range(8)]
    list(writer.write(long))
    roomier = crowd(8)
    list(writer.write(make_requests(writer, 8, pictures=False)))
    assert made[0].rows == [8, 4, 4] and roomier[0].rows == [8]


def test_a_request_that_does_not_fit_alone_stays_unanswered(qwen3_vl: Path, crowd: Any) -> None:
    crowd(0)
    writer = make_writer(qwen3_vl)
    (left,) = writer.write(make_requests(writer, 1))
    assert isinstance(left, Unanswered) and left.kind == "out_of_memory" and "does not fit into the memory of cpu" in left.detail


def test_other_errors_are_not_taken_for_memory(qwen3_vl: Path, crowd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    crowd(0, error=RuntimeError)  # as an allocator of the host says it
    writer = make_writer(qwen3_vl)
    assert isinstance(next(writer.write(make_requests(writer, 1))), Unanswered)
    monkeypatch.setattr(Crowded, "generate", lambda *_, **__: torch.ones(2, 3) @ torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        list(writer.write(make_requests(writer, 1)))


def test_requests_are_read_ahead_in_a_bounded_window(qwen3: Path) -> None:
    writer = make_writer(qwen3, batch_size=2, window=4)
    requests = make_requests(writer, 40, pictures=False)
    read = 0

    def list_requests() -> Iterator[Request]:
        nonlocal read
        for request in requests:
            read += 1
            yield request

    for answered, _ in enumerate(writer.write(list_requests())):
        assert read - answered <= 4 + 4 * 2
    assert read == 40


def test_pictures_are_decoded_while_the_model_works(qwen3_vl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, working, beside = threading.Event(), threading.Event(), []
    writer = make_writer(qwen3_vl, batch_size=1)
    last = Picture("f" * 64, lambda: (beside.append(working.is_set()), decoded.set(), Image.new("RGB", (40, 60)))[-1])
    requests = [make_request("caption", prompt, [ShownItem("a", picture=picture)], writer.describe()) for prompt, picture in
                (("a much longer prompt, which comes first", make_picture(0)), ("short", last))]  # fmt: skip
    honest = writer._answer

    def wait(*words: Any) -> Any:
        working.set()
        assert decoded.wait(20)
        return honest(*words)

    monkeypatch.setattr(writer, "_answer", wait)
    assert len(list(writer.write(requests))) == 2 and len(beside) == 1


def test_a_reader_that_stops_leaves_no_thread(qwen3_vl: Path) -> None:
    before = threading.active_count()
    writer = make_writer(qwen3_vl, batch_size=1)
    answers = writer.write(make_requests(writer))
    next(answers)
    answers.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert threading.active_count() == before


def test_a_picture_that_is_gone_stops_the_run_with_its_own_message(qwen3_vl: Path) -> None:
    def vanish() -> Image.Image:
        raise ConfigError("1.jpg: expected the picture that was there when the run began")

    writer = make_writer(qwen3_vl)
    request = make_request("caption", "look", [ShownItem("a", picture=Picture("0" * 64, vanish))], writer.describe())
    with pytest.raises(ConfigError, match="expected the picture that was there"):
        list(writer.write([request]))


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 512), (512, 1), (512, 512)])
def test_pictures_of_any_shape_are_seen(qwen3_vl: Path, size: tuple[int, int]) -> None:
    writer = make_writer(qwen3_vl)
    request = make_request("caption", "look", [ShownItem("a", picture=make_picture(0, size))], writer.describe())
    assert isinstance(next(iter(writer.write([request]))), Written)


def test_keys_hear_of_the_model_and_of_what_decides_a_text_and_of_nothing_else(qwen3_vl: Path, tiny_models: Any, tmp_path: Path) -> None:
    def key(folder: Path, *, task: Task = "caption", **options: Any) -> str:
        return make_request(task, "prompt", [], TransformersWriter(str(folder), TransformersConfig(**options)).describe()).key

    copy = Path(shutil.copytree(qwen3_vl, tmp_path / "copy"))
    (copy / "README.md").write_text("a model")
    wanted = key(qwen3_vl)
    assert key(copy) == wanted
    assert key(qwen3_vl, batch_size=2, window=4, decode_threads=1, attention="eager", seed=5, embed_batch_size=3) == wanted
    assert key(qwen3_vl, max_new_tokens=TokenLimits(refine_cot=7)) == wanted
    other = tiny_models.save_qwen3_vl(tmp_path / "other", seed=1)
    keys = {wanted, key(other), key(qwen3_vl, dtype="float32"), key(qwen3_vl, max_new_tokens=TokenLimits(caption=7))}
    keys |= {key(qwen3_vl, temperature=0.5), key(qwen3_vl, temperature=0.5, seed=1), key(qwen3_vl, temperature=0.5, top_p=0.5)}
    assert len(keys) == 7


def test_weights_are_read_with_the_first_request_and_shared(qwen3_vl: Path, qwen3: Path) -> None:
    pretrained._loaded.clear()
    writer, other, text = make_writer(qwen3_vl), make_writer(qwen3_vl, batch_size=2), make_writer(qwen3)
    assert list(writer.write([])) == [] and not pretrained._loaded
    answer(writer, make_requests(writer, 1))
    held = list(pretrained._loaded.values())
    answer(other, make_requests(other, 1))
    assert len(held) == 1 and next(iter(pretrained._loaded.values())) is held[0]
    answer(text, make_requests(text, 1, pictures=False))
    assert len(pretrained._loaded) == 1 and next(iter(pretrained._loaded.values())) is not held[0]


def spoil(folder: Path, copy: Path, *, remove: str = "", write: dict[str, str] | None = None) -> Path:
    """A copy of a model's folder without some files, or with others."""
    shutil.copytree(folder, copy)
    for path in list(copy.glob(remove)) if remove else []:
        path.unlink()
    for name, text in (write or {}).items():
        (copy / name).write_text(text)
    return copy


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"remove": "*.safetensors", "write": {"pytorch_model.bin": "x"}}, r"expected \*\.safetensors in the model's folder"),
        ({"remove": "config.json"}, "expected config.json in the model's folder"),
        ({"write": {"config.json": "{"}}, "cannot read"),
        (
            {"write": {"config.json": '{"model_type": "made_up", "auto_map": {"AutoConfig": "code.Config"}}', "code.py": "1 / 0"}},
            "cannot read",
        ),
        ({"write": {"config.json": '{"model_type": "clip"}'}}, "expected a model that writes"),
        ({"remove": "chat_template.jinja"}, "expected a model with a chat template"),
    ],
)
def test_a_folder_that_will_not_do_is_refused_at_once(qwen3_vl: Path, tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make_writer(spoil(qwen3_vl, tmp_path / "copy", **changes))


def test_names_that_lead_nowhere_are_refused_at_once(qwen3_vl: Path, tmp_path: Path) -> None:
    for name in (str(tmp_path / "absent"), "nobody/nothing", "a/b/c", "https://example.com/model"):
        with pytest.raises(ConfigError, match=f"preprocess: model: expected a folder with a model, or a hub name .* got '{name}'"):
            TransformersWriter(name, TransformersConfig())
    for device in ("cuda:7", "toaster"):
        with pytest.raises(ConfigError, match=f"preprocess.transformers.device: expected a device of this machine, got '{device}'"):
            TransformersWriter(str(qwen3_vl), TransformersConfig(device=device))


def test_a_file_in_the_hubs_cache_is_known_by_its_name(tmp_path: Path) -> None:
    digest = "ab" * 32
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "blobs" / digest).write_text("weights")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blobs" / digest)
    named = pretrained.identify_model(tmp_path / "snapshot")
    (tmp_path / "blobs" / digest).write_text("not read")
    assert pretrained.identify_model(tmp_path / "snapshot") == named


def test_draws_have_the_distribution_they_should() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    wanted = torch.softmax(logits[0].double() / 0.7, dim=0)
    count = 4000
    uniforms = torch.linspace(0, 1 - 1 / count, count)[:, None]
    prompt = torch.zeros(count, 3, dtype=torch.int64)
    chosen = SeededSampler(uniforms, prompt_length=3, temperature=0.7, top_p=1.0)(prompt, logits.expand(count, -1)).argmax(dim=1)
    np.testing.assert_allclose(torch.bincount(chosen, minlength=4) / count, wanted, atol=1e-3)
    # Cut to 0.7: the likeliest has 0.73 alone; to 0.9: with the next, in their own proportion.
    for top_p, kept in ((0.7, [0]), (0.9, [0, 2])):
        chosen = SeededSampler(uniforms, prompt_length=3, temperature=0.7, top_p=top_p)(prompt, logits.expand(count, -1)).argmax(dim=1)
        np.testing.assert_allclose(torch.bincount(chosen, minlength=4)[kept] / count, wanted[kept] / wanted[kept].sum(), atol=1e-3)


def test_draws_are_a_requests_own() -> None:
    keys = [hash_content(number) for number in (5, 6)]
    drawn = draw_uniforms(keys, 7)
    assert drawn.dtype == torch.float32 and drawn.shape == (2, 7) and not (drawn[0] == drawn[1]).any()
    assert (draw_uniforms(keys[::-1], 7) == drawn.flip(0)).all() and (draw_uniforms(keys, 3) == drawn[:, :3]).all()
