"""From the merged values of a recipe to a `Recipe`, or to everything that is wrong with them."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lbc_cli.errors import did_you_mean
from lbc_cli.recipe.emit import toml_value
from lbc_cli.recipe.layers import Layer, Problem, takes_pattern
from lbc_cli.recipe.lines import KeyPath, dotted
from lbc_cli.recipe.rules import broken_rules
from lbc_cli.recipe.schema import Recipe, Sparsity

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from lbc_cli.methods import MethodInfo

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string in quotes",
    "list_type": "an array",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}
_KINDS = ((bool, "a boolean"), (int, "an integer"), (float, "a number"), (str, "a string"), (list, "an array"))


def validate(layer: Layer) -> tuple[Recipe, list[Problem]]:
    """Check values against the schema, the method's options and the rules between values.

    Args:
        layer: all layers of a recipe, merged.

    Returns:
        The recipe with the method's options filled in (sound only if there are no problems), and every problem, in
        the order in which the values were written.
    """
    recipe, errors = _check_types(layer.values)
    options, more = _check_method(recipe.method)
    errors |= more
    recipe = recipe.model_copy(update={"method": options, "sparsity": _without_pattern(recipe, layer)})
    problems = [Problem(layer.origin_of(path), dotted(path), text) for path, text in errors.items()]
    problems += _check_rules(recipe, layer, errors)
    return recipe, sorted(problems, key=lambda problem: problem.order)


def _check_types(values: Mapping[str, Any]) -> tuple[Recipe, dict[KeyPath, str]]:
    """A recipe with its default wherever a value is unsound, and what is wrong with each of those."""
    sound = copy.deepcopy(dict(values))
    found: dict[KeyPath, str] = {}
    while True:
        try:
            return Recipe.model_validate(sound), found
        except ValidationError as error:
            for details in error.errors():
                path = tuple(part for part in details["loc"] if isinstance(part, str))
                if details["type"] == "extra_forbidden":
                    found[path] = _unknown(path, _keys_at(path[:-1]), _owners(path))
                else:
                    found[path] = _describe(details, path, _field(Recipe, path))
                _drop(sound, path)


def _drop(values: dict[str, Any], path: KeyPath) -> None:
    table: Any = values
    for name in path[:-1]:
        table = table.get(name, {})
    table.pop(path[-1], None)


def _check_method(method: Mapping[str, Any]) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """The method's table with every option, and what is wrong with it."""
    from lbc_cli.methods import METHODS  # loads torch

    name = method.get("name", Recipe().method["name"])
    if not isinstance(name, str) or name not in METHODS:
        known = f"one of {', '.join(METHODS)}"
        near = did_you_mean(name, METHODS) if isinstance(name, str) else ""
        return {**method}, {("method", "name"): f"{_shown(name)} is no method: {known}.{near}"}
    given = {key: value for key, value in method.items() if key != "name"}
    model = METHODS[name].options
    try:
        return {"name": name, **model.model_validate(given).model_dump()}, {}
    except ValidationError as error:
        return {"name": name, **given}, dict(_option_errors(error, name, METHODS))


def _without_pattern(recipe: Recipe, layer: Layer) -> Sparsity:
    """The sparsity table; no default pattern for a method that has none."""
    given = layer.values.get("sparsity")
    if takes_pattern(recipe.method.get("name")) or (isinstance(given, dict) and "pattern" in given):
        return recipe.sparsity
    return recipe.sparsity.model_copy(update={"pattern": ""})


def _option_errors(
    error: ValidationError, name: str, methods: Mapping[str, MethodInfo]
) -> Iterator[tuple[KeyPath, str]]:
    fields = methods[name].options.model_fields
    for details in error.errors():
        path = ("method", *map(str, details["loc"][:1]))
        if details["type"] != "extra_forbidden":
            yield path, _describe(details, path, fields.get(path[-1]))
            continue
        others = [f"method {other!r}" for other, info in methods.items() if path[-1] in info.options.model_fields]
        text = _unknown(path, list(fields), [*others, *_owners(path)])
        yield path, f"method {name!r} has no such option: {text}"


def _check_rules(recipe: Recipe, layer: Layer, unsound: Collection[KeyPath]) -> Iterator[Problem]:
    """Broken rules among sound values; a problem stands where the last of its values was written."""
    for finding in broken_rules(recipe):
        if any(path[: len(bad)] == bad for path in finding.paths for bad in unsound):
            continue
        origins = {path: layer.origin_of(path) for path in finding.paths}
        path = max(
            finding.paths, key=lambda path: (origin.layer, origin.line) if (origin := origins[path]) else (-1, -1)
        )
        yield Problem(origins[path], dotted(path), finding.text)


# Words


def _describe(details: ErrorDetails, path: KeyPath, field: FieldInfo | None) -> str:
    """What is wrong with the value of a known key, the rule and a remedy."""
    kind, given = details["type"], details["input"]
    message = details["msg"].removeprefix("Value error, ")
    message = re.sub(r"^(Input|List) should", "must", message).replace(" after validation", "")
    if kind == "value_error":
        return message
    text = f"{_shown(given)} {message[:1].lower()}{message[1:]}"
    if kind in _EXPECTED:
        text = f"{_shown(given)} is {_kind(given)}, but {_EXPECTED[kind]} is expected"
    near = did_you_mean(given, _choices(details)) if isinstance(given, str) else ""
    return text + _purpose(field) + (f".{near}" if near else _example(path, field))


def _choices(details: ErrorDetails) -> list[str]:
    return re.findall(r"'([^']*)'", str(details.get("ctx", {}).get("expected", "")))


def _unknown(path: KeyPath, siblings: list[str], owners: list[str]) -> str:
    if path == ("sweep",):
        return "a table of many runs: carry them out with lbc sweep FILE"
    what = "unknown key" if len(path) > 1 else "unknown key or table"
    if owners:
        return f"{what}: {path[-1]} belongs to {' or '.join(owners)}"
    near = did_you_mean(path[-1], siblings) or did_you_mean(path[-1], _all_keys())
    return f"{what}.{near}" if near else f"{what}: known are {', '.join(siblings) or 'none'}"


def _shown(value: Any) -> str:
    try:
        text = toml_value(value)
    except TypeError:
        text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: Any) -> str:
    return next(
        (name for kind, name in _KINDS if isinstance(value, kind)), "a table" if isinstance(value, dict) else "a date"
    )


def _purpose(field: FieldInfo | None) -> str:
    return f" ({field.description})" if field is not None and field.description else ""


def _example(path: KeyPath, field: FieldInfo | None) -> str:
    default = field.get_default(call_default_factory=True, validated_data={}) if field is not None else None
    if default is None or isinstance(default, dict | BaseModel) or default in ("", []):
        return ""
    return f"; for example {path[-1]} = {toml_value(default)}"


# The schema


def _field(model: type[BaseModel], path: KeyPath) -> FieldInfo | None:
    """What the schema says of a key; None for keys that are free, or unknown."""
    field = model.model_fields.get(path[0]) if path else None
    if field is None or len(path) == 1:
        return field
    below = field.annotation
    return _field(below, path[1:]) if isinstance(below, type) and issubclass(below, BaseModel) else None


def _tables() -> dict[str, list[str]]:
    """Table -> its keys; "" for those outside tables."""
    return {"": [*Recipe.model_fields, "extends"], **dict(_tables_below(Recipe, ()))}


def _tables_below(model: type[BaseModel], path: KeyPath) -> Iterator[tuple[str, list[str]]]:
    for name, field in model.model_fields.items():
        below = field.annotation
        if isinstance(below, type) and issubclass(below, BaseModel):
            yield dotted((*path, name)), list(below.model_fields)
            yield from _tables_below(below, (*path, name))


def _keys_at(path: KeyPath) -> list[str]:
    return _tables().get(dotted(path), [])


def _all_keys() -> list[str]:
    return sorted({dotted((table, key)) if table else key for table, keys in _tables().items() for key in keys})


def _owners(path: KeyPath) -> list[str]:
    """The tables that a misplaced key belongs to."""
    tables = _tables()
    if len(path) > 1 and path[-1] in tables[""]:
        return ["the top of the file"]
    return [f"[{table}]" for table, keys in tables.items() if table and path[-1] in keys]
