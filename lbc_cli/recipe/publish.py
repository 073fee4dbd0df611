"""The JSON schema of recipes, for editors.

`lbc recipe schema > lbc-recipe.schema.json`, and `#:schema ./lbc-recipe.schema.json` as the first line of a recipe
beside it, gives completion and checks while typing in editors that speak TOML (taplo and what builds on it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lbc_cli.recipe.layers import default_method
from lbc_cli.recipe.schema import Recipe

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The schema of a recipe file: every table, and `method` as one of the methods with its own options.

    Returns:
        JSON Schema, draft 2020-12, of JSON types only.
    """
    from lbc_cli.methods import METHODS  # loads torch

    schema = Recipe.model_json_schema()
    definitions = schema.pop("$defs")
    methods = []
    for name, info in METHODS.items():
        options = info.options.model_json_schema()
        definitions.update(options.pop("$defs", {}))
        methods.append(_method(name, info.description, options))
    schema["properties"]["method"] = {"oneOf": methods, "description": "the method and its own options"}
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "shipped recipe, or path relative to this file, whose values hold where this one has none",
    }
    document = {"$schema": DIALECT, **schema, "title": "lbc recipe", "$defs": definitions}
    return {key: _plain(value) for key, value in document.items()}


def _method(name: str, description: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """One alternative of `method`; only the default method may go unnamed."""
    return {
        "type": "object",
        "title": name,
        "description": description,
        "properties": {"name": {"const": name}, **options.get("properties", {})},
        "required": [*([] if name == default_method() else ["name"]), *options.get("required", [])],
        "additionalProperties": False,
    }


def _plain(value: Any) -> Any:
    """Without defaults that JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _plain(below) for key, below in value.items() if not _endless(below)}
    return [_plain(below) for below in value] if isinstance(value, list) else value


def _endless(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
