"""Recipes: what a run is made of, as TOML files that extend one another and a command line over them.

schema.py    tables, keys, types, defaults
find.py      shipped recipes, and which one a run gets that names none
lines.py     TOML keys and their lines
layers.py    values with origins, and how layers merge
files.py     a recipe file and what it extends
command.py   flags and --set
rules.py     rules between values
check.py     merged values -> Recipe, or every problem
emit.py      TOML out
publish.py   JSON schema for editors
origins.py   reading the origins back from a run folder
load.py      resolve(): all of it
"""

from lbc_cli.recipe.find import find_recipe, find_sweep, recipe_for, shipped_recipes, shipped_sweeps
from lbc_cli.recipe.load import ResolvedRecipe, resolve, to_toml
from lbc_cli.recipe.publish import json_schema
from lbc_cli.recipe.schema import Recipe

__all__ = [
    "Recipe",
    "ResolvedRecipe",
    "find_recipe",
    "find_sweep",
    "json_schema",
    "recipe_for",
    "resolve",
    "shipped_recipes",
    "shipped_sweeps",
    "to_toml",
]
