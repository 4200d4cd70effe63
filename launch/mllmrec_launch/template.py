"""Renders the templates that lie beside the modules, in a clone and in a wheel."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import jinja2

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    autoescape=False,  # shell and YAML; values pass `words`, `word` or `quoted`, or are checked to be one line
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters["words"] = shlex.join
_ENVIRONMENT.filters["word"] = shlex.quote
# Every JSON value is a YAML value.
_ENVIRONMENT.filters["quoted"] = lambda value: json.dumps(value, ensure_ascii=False)


def render_template(name: str, **values: Any) -> str:
    """The template `name` with `values`; a value that is missing is an error."""
    return _ENVIRONMENT.get_template(name).render(**values)
