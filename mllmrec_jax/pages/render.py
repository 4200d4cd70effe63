"""A template filled in: all text is escaped, and the page's own policy forbids scripts and any request."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup


def _read(package: str, name: str) -> str:
    """A file of `package`, or of this one where it has none of that name."""
    own = importlib.resources.files(package) / name
    return (own if own.is_file() else importlib.resources.files("mllmrec_jax.pages") / name).read_text(encoding="utf-8")


def render_template(package: str, template: str, /, *, styles: Sequence[str] = (), **values: Any) -> str:
    """The file `template` of `package` with `values`; an unknown value in it is an error.

    It may extend `base.html.jinja` and import from `macros.jinja`, both of this package. `style` is the shared style sheet and behind it
    `styles`, files of `package`; `<` cannot occur in them, so they cannot end their element.
    """
    import jinja2  # here: the command line starts without it

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: _read(package, name)),
    )
    style = Markup("\n".join(_read(package, name) for name in ("style.css", *styles)))
    return environment.get_template(template).render(style=style, **values)
