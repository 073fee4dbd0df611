"""The layout that everything else relies on: who may import whom, how large a module may be, what starts fast."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lbc_cli

PACKAGE = Path(lbc_cli.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Each may import from the ranks before it; parts of one package may import one another. `__init__` is free: it loads
# its names only when they are used.
RANKS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("patterns", "schedules"),
    ("packing", "targets", "flops", "transposable"),
    ("methods",),
    ("recipe", "distributed"),
    ("models", "data", "environment", "runs", "locks"),
    ("tasks", "optim", "checkpoint"),
    ("weights", "verifier", "states"),
    ("runtime", "permute"),
    ("engine", "allocation", "distill", "accounting"),
    ("smoke", "paper", "comparing"),
    ("training", "resuming", "trackers", "exports", "oneshot", "accuracy", "bench"),
    ("report",),
    ("sweeps",),
    ("cli",),
    ("__main__",),
)
# flops counts what targets finds; runs writes through checkpoint's atomic files; accuracy measures what exports writes;
# bench names things in graphs as exports does.
BESIDE = {
    ("flops", "targets"),
    ("runs", "checkpoint"),
    ("checkpoint", "packing"),
    ("accuracy", "exports"),
    ("accuracy", "training"),
    ("oneshot", "accuracy"),
    ("oneshot", "training"),
    ("resuming", "training"),
    ("bench", "exports"),
}


def rank(part: str) -> int:
    return next(number for number, parts in enumerate(RANKS) if part in parts)


def part_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(module: Path) -> set[str]:
    """Parts of the package that a module imports when it runs, at its top or inside functions."""
    tree = ast.parse(module.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "lbc_cli":
            found |= {alias.name for alias in node.names if not alias.name.startswith("__")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lbc_cli."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lbc_cli.")}
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(module: Path) -> None:
    part = part_of(module)
    if part == "__init__":
        return
    for other in imports(module) - {part}:
        assert rank(other) < rank(part) or (part, other) in BESIDE, f"{module.name} imports {other}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_stay_readable(module: Path) -> None:
    text = module.read_text()
    assert len(text.splitlines()) <= 500
    assert ast.get_docstring(ast.parse(text)), "every module says what it is for"


def test_only_report_knows_rich_and_only_models_and_data_make_timm_things() -> None:
    for module in MODULES:
        text = module.read_text()
        if part_of(module) != "report":
            assert "import rich" not in text
            assert "from rich" not in text
        if part_of(module) != "models":
            assert "timm.create_model(" not in text.replace("`timm.create_model", "")


def test_the_public_names_are_these() -> None:
    assert sorted(lbc_cli.__all__) == ["LbcError", "__version__", "attach", "load", "save", "verify"]
    for name in lbc_cli.__all__:
        assert getattr(lbc_cli, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lbc_cli.nothing  # noqa: B018


def test_help_starts_fast_and_without_torch() -> None:
    code = (
        "import sys\n"
        "from lbc_cli.cli import main\n"
        "sys.argv = ['lbc', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "loaded = {'torch', 'torchvision', 'timm', 'numpy', 'matplotlib', 'safetensors'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert "train" in done.stdout
    assert min(seconds) <= 0.3
