from __future__ import annotations

import pytest

from mllmrec_jax.preprocess.backends.reasoning import strip_reasoning


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Step 1: a\nStep 2: b", "Step 1: a\nStep 2: b"),
        ("<think>\nStep 1: no\n</think>\n\nStep 1: a", "Step 1: a"),
        ("<think></think>a", "a"),
        ("thought, opened by the template</think>\na", "a"),
        ("<think>one</think>a<think>two</think> b", "a b"),
        ("<think>outer <think>inner</think> still</think>a", "a"),
        ("<think>never ends", ""),
        ("a <think>cut off", "a"),
        ("<Thinking>x</Thinking>a", "a"),
        ("I think: a < b and b > c", "I think: a < b and b > c"),
        ("", ""),
    ],
)
def test_blocks_are_removed_and_the_answer_is_kept(text: str, answer: str) -> None:
    assert strip_reasoning(text) == answer
