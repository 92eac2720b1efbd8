"""What the sections of a recipe are made of."""

import json
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, WithJsonSchema

type_checked = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
FloatOrZero = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
# A function, or a class, of one's own.
ImportPath = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]

V = TypeVar("V")


class Keys(dict[str, V]):
    """Keys and values that are not the recipe's own, hashable as the rest of it."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


# Of any names and values, which something else is given as they are.
Options = Annotated[dict[str, JsonValue], AfterValidator(Keys), WithJsonSchema({"type": "object"})]


class Section(BaseModel):
    """A part of a recipe: immutable, without unknown keys, without silent conversions."""

    model_config = type_checked
