"""What language models are asked in the three writing stages. Titles and captions are catalogue text and are sanitised like a prompt's."""

from __future__ import annotations

from collections.abc import Sequence

from mllmrec_jax.preprocess.backends.protocol import ShownItem
from mllmrec_jax.prompts import sanitise_text

_TITLE_CHARS = 200
_STEPS = (
    "Step 1: what each {noun} of the history shows.\n"
    "Step 2: what they have in common.\n"
    "Step 3: how the choices changed from the oldest to the newest.\n"
    "Step 4: the profile of the {noun} this user will like next: genre, mood, colours, composition."
)
_RULES = (
    "Write exactly four lines, `Step 1:` to `Step 4:`, and nothing else. Name no {noun} by its title or number, and do not guess which "
    "{noun} comes next."
)


def list_history(items: Sequence[ShownItem]) -> str:
    """A history as numbered lines: title and, where it is shown, caption."""
    lines = []
    for number, item in enumerate(items, start=1):
        caption = f" | {sanitise_text(item.caption)}" if item.caption else ""
        lines.append(f"{number}. {sanitise_text(item.title, _TITLE_CHARS)}{caption}")
    return "\n".join(lines)


def render_caption(title: str, *, noun: str, max_words: int) -> str:
    """Asks for a caption of one picture."""
    return (
        f"The picture belongs to a {noun} titled: {sanitise_text(title, _TITLE_CHARS)}\n\n"
        f"Describe what can be seen in it, in at most {max_words} words: people, objects, setting, colours, light, composition, mood. "
        "Write only what the picture shows. Do not repeat the title and do not describe lettering. Reply with the description alone."
    )


def render_pseudo_cot(items: Sequence[ShownItem], *, noun: str) -> str:
    """Asks for a first trace from titles and pictures; the pictures are attached in the order of the list, where an item has one."""
    pictured = ", ".join(str(number) for number, item in enumerate(items, start=1) if item.picture is not None) or "none"
    return (
        f"One user chose these {noun}s, oldest first:\n{list_history(items)}\n\n"
        f"The attached pictures belong, in order, to numbers: {pictured}.\n\n"
        f"Reason about this user's taste from titles and pictures.\n{_STEPS.format(noun=noun)}\n\n{_RULES.format(noun=noun)}"
    )


def render_refine_cot(items: Sequence[ShownItem], draft: str, *, noun: str) -> str:
    """Asks for the refined trace from titles, captions (where shown) and the draft (where there is one)."""
    drafted = f"A draft of the reasoning, which may be wrong:\n{sanitise_lines(draft)}\n\n" if draft else ""
    return (
        f"One user chose these {noun}s, oldest first, with descriptions of their pictures:\n{list_history(items)}\n\n{drafted}"
        f"Reason about this user's taste, keep what the descriptions support and drop the rest.\n{_STEPS.format(noun=noun)}\n\n"
        f"{_RULES.format(noun=noun)}"
    )


def sanitise_lines(text: str) -> str:
    """Each line sanitised by itself, empty ones left out."""
    return "\n".join(line for line in map(sanitise_text, text.splitlines()) if line)
