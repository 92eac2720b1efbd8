"""A recipe seen from outside: as YAML, as parameters, as a digest, as a JSON schema, and against another."""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import yaml

from metaloom.recipe.extending import EXTENDS
from metaloom.recipe.reading import RESOLVERS
from metaloom.recipe.schema import Recipe


class _Dumper(yaml.SafeDumper):
    """Quotes text that the reader of recipes, or another reader of YAML, would take for something else."""


for _tag, _pattern, _first in RESOLVERS:
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default spelled out; reading it gives an equal recipe."""
    return yaml.dump(plain_recipe(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 (hexadecimal) of the recipe's canonical JSON: equal recipes, however written, have the same."""
    canonical = json.dumps(plain_recipe(recipe), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def flatten_recipe(recipe: Recipe) -> dict[str, str]:
    """Every value under its dotted path, as text: `{"outer.optimizer.lr": "0.001", ...}`."""
    flat: dict[str, str] = {}

    def add(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{path}.{key}" if path else key, inner)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for row, inner in enumerate(value):
                add(f"{path}.{row}", inner)
        else:
            flat[path] = value if isinstance(value, str) else json.dumps(value)

    add("", plain_recipe(recipe))
    return flat


_EXTENDS = {
    "type": "string",
    "description": "another recipe's file, beside this one, of which this one says what is changed: sections "
    "key by key, and a section of another kind as a whole",
}


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors; every property has a description."""
    schema = Recipe.model_json_schema()
    schema["properties"] = {EXTENDS: _EXTENDS} | schema["properties"]
    for section in (schema, *schema["$defs"].values()):
        for field in section["properties"].values():
            if "discriminator" in field:
                # A section may be given by its kind alone, and without a kind where there is a default.
                kinds = list(field.pop("discriminator")["mapping"])
                field["anyOf"] = [*field.pop("oneOf"), {"type": "string", "enum": kinds}]
    return schema


@dataclass(frozen=True)
class Difference:
    """One value that two recipes do not share.

    Attributes:
        path: dotted path of the value.
        old: the value before, as text; "absent" where the recipe has no such key.
        new: the value after, likewise.
        harmful: whether a run that goes on with the new value is not the same run any more.
    """

    path: str
    old: str
    new: str
    harmful: bool


# Where data lie: that they are the same is seen from their digest.
_DATA_URL = re.compile(r"(data(\.parts\.\d+\.data)?|adaptation\.rehearsal\.data)\.url")
HARMLESS: tuple[str, ...] = (
    "name",
    "loading",
    "memory",
    "outer.micro_batch",
    "sharding",
    "launcher",
    "validation.every_steps",
    "validation.early_stopping",
    "evaluation",
    "checkpoint",
    "tracking",
)


def differences(old: Recipe, new: Recipe) -> list[Difference]:
    """What differs between the recipe of a run and the one to resume it with, in the order of the recipe.

    The number of outer steps shapes the run only where the learning rate decays towards the end.
    """
    before, after = flatten_recipe(old), flatten_recipe(new)
    harmless = HARMLESS
    if old.outer.schedule.decay == new.outer.schedule.decay == "constant":
        harmless = (*HARMLESS, "outer.num_steps")
    return [
        Difference(
            path, before.get(path, "absent"), after.get(path, "absent"), harmful=not _within(path, harmless)
        )
        for path in dict.fromkeys((*before, *after))
        if before.get(path) != after.get(path)
    ]


def _within(path: str, sections: tuple[str, ...]) -> bool:
    return _DATA_URL.fullmatch(path) is not None or any(
        path == section or path.startswith(f"{section}.") for section in sections
    )


def plain_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain JSON values, defaults spelled out."""
    return recipe.model_dump(mode="json")
