"""Which recipes there are, and which one a run gets that names none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from lbc_cli.errors import RecipeError, did_you_mean

SUFFIX = ".toml"
SWEEPS = "sweeps/"

# Trained for these models and data; everything else gets the default of its family.
_FOR_DATA = {"digits": "digits"}
_FOR_MODEL = {
    "resnet18": "imagenet-resnet18",
    "resnet50": "imagenet-resnet50",
    "deit_small_patch16_224": "imagenet-deit-small",
}
_FOR_TRANSFORMERS = "imagenet-deit-small"
_FOR_CONVOLUTIONS = "imagenet-resnet50"

# timm families that are trained with AdamW and strong augmentation, attention or not; matched as prefixes.
_TRANSFORMERS = (
    *("deit", "vit", "flexivit", "swin", "beit", "eva", "cait", "xcit", "mixer", "gmixer", "gmlp", "resmlp", "pit_"),
    *("twins", "crossvit", "visformer", "coat", "convit", "convnext", "convmixer", "levit", "mvitv2", "maxvit"),
    *("maxxvit", "poolformer", "metaformer", "caformer", "convformer", "volo", "tnt", "pvt", "gcvit", "davit", "hiera"),
    *("edgenext", "mobilevit", "fastvit", "efficientformer", "efficientvit", "nest", "sequencer", "focalnet", "naflex"),
    *("tiny_vit", "repvit", "samvit", "test_vit"),
)


def recipe_folder() -> Path:
    """Where the shipped recipes lie: inside an installed package, beside it in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with `lbc`, by name, in alphabetical order; a folder is part of the name ("paper/x")."""
    return {name: path for name, path in _shipped().items() if not name.startswith(SWEEPS)}


def shipped_sweeps() -> dict[str, Path]:
    """The tables of runs that come with `lbc`, likewise ("sweeps/x")."""
    return {name: path for name, path in _shipped().items() if name.startswith(SWEEPS)}


def _shipped() -> dict[str, Path]:
    folder = recipe_folder()
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob(f"*{SUFFIX}")}
    return dict(sorted(files.items()))


def find_recipe(reference: str | Path, *, beside: Path | None = None) -> Path:
    """The file of a recipe.

    Args:
        reference: a path (relative to `beside`), or the name of a shipped recipe.
        beside: folder that paths are relative to; None: the current one.

    Returns:
        An existing file.

    Raises:
        RecipeError: if there is neither such a file nor such a recipe.
    """
    return _find(reference, beside, shipped_recipes())


def find_sweep(reference: str | Path) -> Path:
    """The file of a sweep: a path, or the name of a shipped one.

    Raises:
        RecipeError: if there is neither.
    """
    return _find(reference, None, shipped_sweeps())


def _find(reference: str | Path, beside: Path | None, shipped: dict[str, Path]) -> Path:
    path = (beside or Path()) / Path(reference)
    if path.is_file():
        return path
    name = str(reference)
    if name in shipped:
        return shipped[name]
    if name in _shipped():
        other = f"a sweep: lbc sweep {name}" if name.startswith(SWEEPS) else f"a recipe: lbc train --recipe {name}"
        raise RecipeError([f"{name} is {other}"])
    raise RecipeError([_missing(name, path, shipped)])


def _missing(name: str, path: Path, shipped: dict[str, Path]) -> str:
    known = _listed(shipped) or "none, the installation is incomplete"
    hint = did_you_mean(Path(name).name.removesuffix(SUFFIX), shipped)
    if name.endswith(SUFFIX) or path.is_dir():
        return f"no recipe file {str(path)!r}; shipped recipes go by name: {known}.{hint}"
    return f"no recipe {name!r}: give the path of a .toml file or a shipped name: {known}.{hint}"


def _listed(names: Iterable[str]) -> str:
    """The names, those in folders only by number."""
    top = [name for name in names if "/" not in name]
    folders = Counter(name.rpartition("/")[0] for name in names if "/" in name)
    listed = [*top, *(f"{count} in {folder}/ (lbc recipe list)" for folder, count in folders.items())]
    return " and ".join([", ".join(listed[:-1]), listed[-1]] if listed[1:] else listed)


def recipe_for(model: str, data: str) -> tuple[str, str]:
    """The shipped recipe of a run that names none.

    Args:
        model: timm model name, with or without a pretrained tag; may be empty where the data's recipe has a model.
        data: what the run is to be trained on.

    Returns:
        Name of the recipe, and a sentence that says why it was taken.

    Raises:
        RecipeError: if there is neither a model nor data with a recipe of its own.
    """
    if data in _FOR_DATA:
        name = _FOR_DATA[data]
        return name, f"recipe {name}: made for the data set {data}"
    architecture = model.partition(".")[0]
    if not architecture:
        raise RecipeError(["no model: name one (lbc train resnet50 ...) or give a --recipe that has a model.name"])
    if architecture in _FOR_MODEL:
        name = _FOR_MODEL[architecture]
        return name, f"recipe {name}: made for {architecture}"
    if architecture.startswith(_TRANSFORMERS):
        name, family = _FOR_TRANSFORMERS, "transformers and models trained like them"
    else:
        name, family = _FOR_CONVOLUTIONS, "convolutional networks"
    return name, f"recipe {name}: no recipe is made for {architecture}, this is the default for {family}"
