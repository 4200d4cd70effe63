"""Backend `local` as a rater: it counts words. It measures the form of a trace and says nothing about its sense.

Each dimension is a share from 0 to 1, mapped to the scale in equal steps (five: below 0.2 is 1, from 0.8 on 5). "Words" are those of
`words.list_words`; the history's words are those of its titles and captions.

| dimension | share |
|---|---|
| faithfulness | of the trace's words, those that the history has |
| visual_detail | of an item's caption words, those that the trace has; mean over items with a caption |
| coherence | of a step's words, those that an earlier step has; mean over steps 2 to 4 |
| sequence | of step 3's words that captions have, those that only the newer half of the history has, or only the older |
| specificity | distinct words of step 4, of eight |

The evidence is the step that was counted most on.
"""

from __future__ import annotations

import json
import re

from mllmrec_jax.preprocess.backends.protocol import Request
from mllmrec_jax.preprocess.backends.words import list_words
from mllmrec_jax.preprocess.templates import sanitise_lines

_ENOUGH_WORDS = 8
_LABEL = re.compile(r"^Step [1-4]:\s*")


def _share(part: set[str], whole: set[str]) -> float:
    return len(part & whole) / len(whole) if whole else 0.0


def measure_form(request: Request) -> dict[str, tuple[float, str]]:
    """Share (0 to 1) and evidence by dimension, of the trace in `request.draft`."""
    lines = sanitise_lines(request.draft).splitlines()
    steps = [set(list_words(_LABEL.sub("", line))) for line in lines]
    captions = [set(list_words(item.caption)) for item in request.items]
    history = {word for item in request.items for word in list_words(f"{item.title} {item.caption}")}
    trace = set().union(*steps)
    half = len(captions) // 2
    older, newer = set().union(*captions[:half]), set().union(*captions[half:])
    said = steps[2] & (older | newer)
    earlier = [set().union(*steps[:place]) for place in range(len(steps))]
    seen = [_share(trace, caption) for caption in captions if caption]
    shares = {
        "faithfulness": (_share(history, trace), 0),
        "visual_detail": (sum(seen) / len(seen) if seen else 0.0, 0),
        "coherence": (sum(map(_share, earlier[1:], steps[1:])) / (len(steps) - 1), 1),
        "sequence": (_share(older ^ newer, said), 2),
        "specificity": (min(1.0, len(steps[3]) / _ENOUGH_WORDS), 3),
    }
    return {name: (share, lines[place]) for name, (share, place) in shares.items()}


def rate_form(request: Request) -> str:
    """The answer to a request of task `quality`."""
    scale = request.scale
    measured = measure_form(request)
    rated = {name: (scale[min(len(scale) - 1, int(share * len(scale)))], line) for name, (share, line) in measured.items()}
    return json.dumps({name: {"score": score, "evidence": line} for name, (score, line) in rated.items()}, ensure_ascii=False)
