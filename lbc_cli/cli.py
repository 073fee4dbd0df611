"""The command line: parse, call, render, exit code. Torch is loaded only once a command really needs it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lbc_cli import __version__
from lbc_cli.errors import LbcError, UsageError

if TYPE_CHECKING:
    from lbc_cli.recipe import ResolvedRecipe
    from lbc_cli.report import Console
    from lbc_cli.runs import RunFolder
    from lbc_cli.training import Job

app = typer.Typer(
    name="lbc",
    help="N:M sparse vision models: train, verify and measure them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes = typer.Typer(name="recipe", help="Look at recipes.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipes)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only results, warnings and errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RecipeName = Annotated[str | None, typer.Option("--recipe", help="A recipe file, or the name of a shipped recipe.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the recipe.")]
PatternText = Annotated[str | None, typer.Option("--pattern", metavar="N:M", help="Keep N of M input channels.")]
Vector = Annotated[int | None, typer.Option("--vector", metavar="V", help="V output channels share a mask.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:N; cuda where there is one.")]


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors of a command into a line on stderr and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except LbcError as error:
            _fail(error, error.exit_code, debug)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            _fail(LbcError("interrupted"), 130, debug)
        except BrokenPipeError:
            sys.stderr.close()
            raise typer.Exit(1) from None
        except Exception as error:
            _fail(error, 1, debug)

    # Typer reads the signature: it must hold the options themselves, not their names, and --debug with them.
    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    parameters = [*signature.parameters.values(), option]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def _fail(error: BaseException, code: int, debug: bool) -> None:
    from lbc_cli.report import print_error

    print_error(error, debug)
    raise typer.Exit(code) from None


def _console(quiet: bool = False, verbose: bool = False) -> Console:
    from lbc_cli.report import Console, Verbosity

    if quiet and verbose:
        raise UsageError("--quiet and --verbose contradict each other: give one of them")
    return Console(Verbosity.QUIET if quiet else Verbosity.VERBOSE if verbose else Verbosity.NORMAL)


def _version(value: bool) -> None:
    if value:
        print(f"lbc {__version__}")
        raise typer.Exit


@app.callback()
def _lbc(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """N:M sparse vision models: train, verify and measure them."""


@app.command()
@_reported
def train(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="timm model name.")] = None,
    *,
    pattern: PatternText = None,
    vector: Vector = None,
    data: Annotated[
        str | None, typer.Option("--data", help="digits (bundled), a folder, a tar, torch/NAME, hfds/NAME, wds/NAME.")
    ] = None,
    recipe: RecipeName = None,
    override: Overrides = None,
    method: Annotated[str | None, typer.Option("--method", help="lbc, or dense for the baseline.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", metavar="N", help="Passes over the data.")] = None,
    pretrained: Annotated[bool | None, typer.Option("--pretrained", help="Start from timm's weights.")] = None,
    init: Annotated[Path | None, typer.Option("--init", metavar="FILE", help="Start from this weight file.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="S", help="Of weights, order, augmentation.")] = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Run folder; must be new.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="DIR", help="Go on with an earlier run.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Seconds on generated images, through every phase.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a model to N:M sparsity, save it packed, and verify what was saved."""
    console = _console(quiet, verbose)
    flags = {
        "model.name": model,
        "sparsity.pattern": pattern,
        "sparsity.vector": vector,
        "data.source": data,
        "method.name": method,
        "train.epochs": epochs,
        "model.pretrained": pretrained,
        "model.init": init,
        "train.seed": seed,
        "train.device": device,
    }
    if resume is not None:
        others = {"--recipe": recipe, "--set": override, "--out": out, "--smoke": smoke, "--dry-run": dry_run}
        given = [key for key, value in flags.items() if value is not None] + [key for key in others if others[key]]
        _refuse_with_resume(resume, given)
        _resume(resume, console, as_json)
        return
    if out is not None and not dry_run:
        from lbc_cli.runs import check_free

        check_free(out)
    resolved = _resolve(recipe, override or [], flags, smoke, console)
    _train(resolved, out, dry_run, console, as_json)


def _refuse_with_resume(folder: Path, given: list[str]) -> None:
    if given:
        raise UsageError(
            f"--resume {folder} takes every setting from that run: drop {', '.join(given)}, or start a new run with "
            f"--recipe {folder / 'recipe.toml'}"
        )


def _resolve(
    recipe: str | None, overrides: list[str], flags: dict[str, Any], smoke: bool, console: Console
) -> ResolvedRecipe:
    """The recipe that was named, or the shipped one that fits model and data."""
    from lbc_cli.recipe import recipe_for, resolve

    if recipe is None:
        recipe, why = recipe_for(flags["model.name"] or "", flags["data.source"] or "")
        console.info(why)
    resolved = resolve(recipe, overrides=overrides, flags=flags)
    if not smoke:
        return resolved
    from lbc_cli.training import smoke as smoked

    console.info("smoke run: a few epochs on generated images, whatever the data")
    return smoked(resolved)


def _train(resolved: ResolvedRecipe, out: Path | None, dry_run: bool, console: Console, as_json: bool) -> None:
    from lbc_cli.report import print_plan, task
    from lbc_cli.report.describe import plan_view
    from lbc_cli.runs import RunFolder, unique
    from lbc_cli.training import prepare

    with task(console, "preparing, images checked") as advance:
        job = prepare(resolved, advance)
    _announce(job, console)
    if dry_run:
        plan = plan_view(job, str(out or unique(job.default_folder)))
        console.json(plan) if as_json else print_plan(console, plan)
        return
    folder = RunFolder.create(out) if out is not None else RunFolder.create_unique(job.default_folder)
    console.info(f"run folder {folder.path}")
    _run(job, folder, console, as_json, resuming=False)


def _resume(path: Path, console: Console, as_json: bool) -> None:
    from lbc_cli import training
    from lbc_cli.report import task
    from lbc_cli.runs import RunFolder

    folder = RunFolder.open(path)
    with task(console, "preparing, images checked") as advance:
        job = training.resume(folder, advance)
    _announce(job, console)
    _run(job, folder, console, as_json, resuming=True)


def _announce(job: Job, console: Console) -> None:
    targets, skipped = len(job.pruner.targets), len(job.pruner.skipped)
    console.info(
        f"{job.title} on {job.source.name}, device {job.device}: {targets} sparse layers, {skipped} left dense"
    )
    for image in job.source.dropped:
        console.warning(f"unreadable image left out: {image}")


def _run(job: Job, folder: RunFolder, console: Console, as_json: bool, *, resuming: bool) -> None:
    from lbc_cli import training
    from lbc_cli.engine import StopOnSignal
    from lbc_cli.report import TrainingProgress, print_summary
    from lbc_cli.report.describe import summary_view

    with _curves_at_the_end(job, folder), StopOnSignal() as stop:
        outcome = training.run(job, folder, resuming=resuming, reporter=TrainingProgress(console), stop=stop)
    if as_json:
        console.json(training.summary(job, outcome))
    else:
        print_summary(console, summary_view(job, outcome, folder))


@contextlib.contextmanager
def _curves_at_the_end(job: Job, folder: RunFolder) -> Iterator[None]:
    """Draw the curves of what was trained, also of a run that was interrupted or failed."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(LbcError):  # what ended the run is what the user must hear of
            _draw_curves(job, folder)
        raise
    _draw_curves(job, folder)


def _draw_curves(job: Job, folder: RunFolder) -> None:
    from lbc_cli.report import curves
    from lbc_cli.report.describe import versions
    from lbc_cli.runs import read_epochs

    records = read_epochs(folder.metrics_jsonl)
    if records:
        footnote = f"{versions()}, seed {job.settings.seed}, {job.device}"
        curves(records, folder.curves, title=f"{job.title} on {job.source.name}", footnote=footnote)


@app.command()
@_reported
def verify(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or any safetensors file.")],
    *,
    pattern: PatternText = None,
    as_json: AsJson = False,
) -> None:
    """Check that a file holds its N:M pattern and is undamaged. Exit code 3 if not."""
    from lbc_cli.report import print_verify
    from lbc_cli.report.describe import verify_view
    from lbc_cli.verifier import verify as run

    console = _console()
    report = run(path, pattern=pattern)
    console.json(report.as_dict()) if as_json else print_verify(console, verify_view(report))
    if not report.ok:
        raise typer.Exit(3)


@app.command()
@_reported
def bench(
    model: Annotated[str, typer.Argument(help="timm model name.")],
    *,
    train: Annotated[bool, typer.Option("--train", help="Measure training steps, dense beside the method's.")] = False,
    pattern: PatternText = None,
    vector: Vector = None,
    method: Annotated[str, typer.Option("--method", help="What to measure beside dense.")] = "lbc",
    device: Device = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images per step.")] = 16,
    image_size: Annotated[int, typer.Option("--image-size", min=0, help="Pixels; 0: the model's own.")] = 0,
    amp: Annotated[str, typer.Option("--amp", help="off, bfloat16 or float16 autocast.")] = "off",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="NHWC memory format.")] = False,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps of each kind.")] = 10,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps before them.")] = 2,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure what a method adds to a training step, interleaved with dense steps."""
    if not train:
        raise UsageError("lbc bench measures training steps: add --train")
    from lbc_cli import training
    from lbc_cli.bench import StepSetup, train_bench
    from lbc_cli.patterns import Pattern
    from lbc_cli.report import print_train_bench, train_bench_record
    from lbc_cli.report.describe import train_bench_view

    console = _console(quiet)
    setup = StepSetup(
        model=model,
        pattern=str(Pattern.parse(pattern or "2:4", vector or 1)),
        method=method,
        device=training.choose_device(device or "auto"),
        batch=batch,
        image_size=image_size,
        amp=amp,
        channels_last=channels_last,
        steps=steps,
        warmup=warmup,
    )
    view = train_bench_view(train_bench(setup, progress=console.info))
    console.json(train_bench_record(view)) if as_json else print_train_bench(console, view)


@recipes.command("list")
@_reported
def list_recipes(*, as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    from lbc_cli.recipe import resolve, shipped_recipes
    from lbc_cli.report import table

    console = _console()
    found = {name: resolve(name).recipe.description for name in shipped_recipes()}
    if as_json:
        console.json(found)
    else:
        rows = [list(item) for item in found.items()]
        console.result(table("Shipped recipes", {"recipe": "left", "for": "left"}, rows))


@recipes.command("show")
@_reported
def show_recipe(
    name: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")],
    *,
    override: Overrides = None,
) -> None:
    """Print a recipe as resolved, with the origin of every value."""
    from lbc_cli.recipe import resolve

    print(resolve(name, overrides=override or []).text, end="")


@recipes.command("schema")
@_reported
def recipe_schema() -> None:
    """Print the JSON schema of recipes, for editors.

    Write it to lbc-recipe.schema.json and begin a recipe of your own with the line
    "#:schema ./lbc-recipe.schema.json".
    """
    from lbc_cli.recipe import json_schema

    _console().json(json_schema())


def main() -> None:
    """Entry point of the `lbc` command."""
    app()


if __name__ == "__main__":
    main()
