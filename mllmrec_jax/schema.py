"""What configuration classes are made of: field types, and the decorator that makes unknown keys errors."""

from __future__ import annotations

import dataclasses
from typing import Annotated, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
ConfigT = TypeVar("ConfigT")


@dataclass_transform(frozen_default=True)
def config_class(cls: type[ConfigT]) -> type[ConfigT]:
    """A frozen dataclass whose unknown keys are errors (pydantic's default is to drop them)."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    cls.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return cls
