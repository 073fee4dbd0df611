"""Reading a recipe file and everything that it extends."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

from lbc_cli.errors import RecipeError
from lbc_cli.recipe.find import find_recipe, recipe_folder
from lbc_cli.recipe.layers import Layer, Origin, Problem, merge
from lbc_cli.recipe.lines import key_lines

_POSITION = re.compile(r" \(at line (\d+), column (\d+)\)")


@dataclass(slots=True)
class Chain:
    """A recipe file and what it extends, the recipe itself first.

    Attributes:
        files: labels of the files, for people.
        layers: their content in the same order.
        problems: why a file could not be read or a parent not be found.
    """

    files: list[str] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def merged(self) -> Layer:
        """All layers in one, parents below their children."""
        result = Layer()
        for place, layer in enumerate(reversed(self.layers)):
            result.values.pop("description", None)  # says what the parent is for, not the child
            result.origins.pop(("description",), None)
            origins = {path: replace(origin, layer=place) for path, origin in layer.origins.items()}
            result = merge(result, Layer(layer.values, origins))
        return result


def read_chain(recipe: str | Path) -> Chain:
    """Read a recipe and everything it extends.

    Raises:
        RecipeError: if the recipe itself cannot be found; what is wrong with its parents is in `problems`.
    """
    chain = Chain()
    seen: list[Path] = []
    path: Path | None = find_recipe(recipe)
    while path is not None:
        seen.append(path.resolve())
        chain.files.append(_label(path))
        try:
            layer = read_layer(path)
        except RecipeError as error:
            chain.problems.extend(Problem(None, "", text) for text in error.problems)
            break
        chain.layers.append(layer)
        path = _parent(layer, path, seen, chain)
    return chain


def _parent(layer: Layer, path: Path, seen: list[Path], chain: Chain) -> Path | None:
    """The file that a recipe extends; takes `extends` out of the layer, and notes what is wrong with it."""
    reference = layer.values.pop("extends", None)
    origin = layer.origins.pop(("extends",), None)
    if reference is None:
        return None
    if not isinstance(reference, str):
        text = f"{reference!r} is no name: extends takes one string, a shipped recipe or a path relative to this file"
        chain.problems.append(Problem(origin, "extends", text))
        return None
    try:
        parent = find_recipe(reference, beside=path.parent)
    except RecipeError as error:
        chain.problems.extend(Problem(origin, "extends", text) for text in error.problems)
        return None
    if parent.resolve() in seen:
        circle = " -> ".join([*chain.files[seen.index(parent.resolve()) :], _label(parent)])
        chain.problems.append(Problem(origin, "extends", f"the recipes extend one another in a circle: {circle}"))
        return None
    return parent


def read_layer(path: Path) -> Layer:
    """Read one recipe file, without what it extends.

    Raises:
        RecipeError: if it cannot be read or is not TOML, with line and column.
    """
    label = _label(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        values = tomllib.loads(text)
    except OSError as error:
        raise RecipeError([f"{label}: cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RecipeError([f"{label}:{line}: is not UTF-8: save the recipe in that encoding"]) from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError([_syntax(label, text, str(error))]) from None
    short = short_label(label)
    lines = key_lines(text)
    return Layer(values, {path: Origin(0, line, f"{label}:{line}", f"{short}:{line}") for path, line in lines.items()})


def _syntax(label: str, text: str, message: str) -> str:
    match = _POSITION.search(message)
    if match is None:  # tomllib says "at end of document"
        return f"{label}:{text.count(chr(10)) + 1}: is not valid TOML: {message}"
    line, column = map(int, match.groups())
    source = "".join(text.split("\n")[line - 1 : line]).strip()
    return f"{label}:{line}:{column}: is not valid TOML: {_POSITION.sub('', message)}: {source}"


def short_label(label: str) -> str:
    """A label fit to travel with a checkpoint: no folders outside the current one."""
    path = Path(label)
    return path.name if path.is_absolute() or ".." in path.parts else label


def _label(path: Path) -> str:
    """How a file is called in messages: shipped recipes by their name, others relative to the current folder."""
    full = path.resolve()
    for folder, prefix in ((recipe_folder(), Path("recipes")), (Path.cwd(), Path())):
        if full.is_relative_to(folder):
            return (prefix / full.relative_to(folder)).as_posix()
    return str(path)
