import dataclasses
import datetime
import json
import math
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbc_cli.errors import RecipeError
from lbc_cli.methods import METHODS
from lbc_cli.recipe import (
    Recipe,
    ResolvedRecipe,
    find,
    find_recipe,
    json_schema,
    recipe_for,
    resolve,
    shipped_recipes,
    to_toml,
)
from lbc_cli.recipe.command import parse_override
from lbc_cli.recipe.emit import toml_text, toml_value
from lbc_cli.recipe.lines import dotted, key_lines, parse_key

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a recipe into the current folder, an empty one."""
    monkeypatch.chdir(tmp_path)

    def write_recipe(text: str, name: str = "mine.toml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_recipe


def problems_of(
    recipe: str | Path | None = None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        resolve(recipe, overrides=overrides, flags=flags)
    problems = caught.value.problems
    assert caught.value.exit_code == 2
    assert all("\n" not in problem for problem in problems)
    return list(problems)


def only_problem(*args: Any, **kwargs: Any) -> str:
    (problem,) = problems_of(*args, **kwargs)
    return problem


# Lines


EVERY_KIND_OF_KEY = '''\
# comment = 1
top = 1
"quoted.top" = [ # a comment with ] and "
  1, "]",
  { inner = 2 },
]

[a] # [not.a.table]
plain = """
fake = 1
\\""" still = 2"""
dotted.key."with.dot" = 'it = "x"'
inline = { one = 1, two = { three = "}" },
  four = 4 }
after = 2021-01-01

 [ "a b" . c ]
  last = ''
[[list]]
x = """ends with quotes"""""
[[list]]
x = 3
'''


def test_lines_of_every_kind_of_key() -> None:
    text = EVERY_KIND_OF_KEY.replace("},\n  four", "}, four")  # inline tables stay on one line before TOML 1.1
    tomllib.loads(text)
    assert key_lines(text) == {
        ("top",): 2,
        ("quoted.top",): 3,
        ("quoted.top", "inner"): 5,
        ("a",): 8,
        ("a", "plain"): 9,
        ("a", "dotted"): 12,
        ("a", "dotted", "key"): 12,
        ("a", "dotted", "key", "with.dot"): 12,
        ("a", "inline"): 13,
        ("a", "inline", "one"): 13,
        ("a", "inline", "two"): 13,
        ("a", "inline", "two", "three"): 13,
        ("a", "inline", "four"): 13,
        ("a", "after"): 14,
        ("a b",): 16,
        ("a b", "c"): 16,
        ("a b", "c", "last"): 17,
        ("list",): 18,
        ("list", "x"): 19,
    }


def test_inline_tables_over_several_lines_have_lines_too() -> None:
    lines = key_lines(EVERY_KIND_OF_KEY)
    assert lines["a", "inline", "four"] == 14
    assert lines["list", "x"] == 20


def test_lines_with_windows_line_ends() -> None:
    assert key_lines("a = 1\r\n[b]\r\nc = 2\r\n") == {("a",): 1, ("b",): 2, ("b", "c"): 3}


KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_emitted_toml_reads_back(values: dict[str, Any]) -> None:
    text = toml_text(values, {})
    again = tomllib.loads(text)
    assert again == values
    assert repr(sorted_tables(again)) == repr(sorted_tables(values))  # types too, -0.0 and True apart from 0 and 1
    assert {path[0] for path in key_lines(text)} == set(values)


def sorted_tables(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: sorted_tables(value[key]) for key in sorted(value)}
    return [sorted_tables(item) for item in value] if isinstance(value, list) else value


@given(st.lists(KEYS, min_size=1, max_size=4))
def test_dotted_keys_read_back(path: list[str]) -> None:
    text = dotted(path)
    assert parse_key(text) == (tuple(path), len(text))


@pytest.mark.parametrize("value", [None, object(), datetime.date(2022, 1, 1)])
def test_what_toml_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be written"):
        toml_value(value)


# Files that extend one another


def test_no_recipe_is_the_defaults_and_says_so() -> None:
    resolved = resolve()
    expected = Recipe()
    assert resolved.recipe.model_dump(exclude={"method"}) == expected.model_dump(exclude={"method"})
    assert resolved.recipe.method == {"name": "lbc", **METHODS["lbc"].options().model_dump()}
    assert set(resolved.provenance.values()) == {"default"}
    assert (resolved.name, resolved.extends) == ("", ())


def test_tables_merge_arrays_replace_and_every_value_says_where_it_is_from(write: Write) -> None:
    write('description = "parent"\n[train]\nepochs = 7\nseed = 3\n[augment]\nscale = [0.1, 1.0]\n', "base/parent.toml")
    write('extends = "../base/parent.toml"\n[augment]\nscale = [0.5, 0.6]\n[train]\nseed = 4\n', "sub/child.toml")
    resolved = resolve("sub/child.toml", overrides=["optimizer.lr=1"], flags={"data.workers": 2, "train.device": None})
    recipe = resolved.recipe
    assert (recipe.train.epochs, recipe.train.seed, recipe.augment.scale) == (7, 4, [0.5, 0.6])
    assert (recipe.optimizer.lr, recipe.data.workers, recipe.train.device) == (1.0, 2, "auto")
    assert isinstance(recipe.optimizer.lr, float)
    assert recipe.description == "", "what the parent is for is not what the child is for"
    assert resolved.name == "child"
    assert resolved.extends == ("sub/child.toml", "base/parent.toml")
    expected = {
        "train.epochs": "base/parent.toml:3",
        "train.seed": "sub/child.toml:5",
        "augment.scale": "sub/child.toml:3",
        "optimizer.lr": "--set",
        "data.workers": "--workers",
        "train.device": "default",
        "description": "default",
        "method.name": "default",
    }
    assert {key: resolved.provenance[key] for key in expected} == expected


def test_a_shipped_recipe_can_be_extended_by_name(write: Write) -> None:
    path = write('extends = "digits"\n[train]\nepochs = 4\n')
    resolved = resolve(path)
    assert resolved.recipe.train.epochs == 4
    assert resolved.recipe.data == resolve("digits").recipe.data
    assert resolved.provenance["data.source"].startswith("recipes/digits.toml:")


def test_provenance_holds_no_folders_outside_the_current_one(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("[train]\nepochs = 20\nseed = -1\n", "outside/private.toml")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert only_problem(path).startswith(f"{path}:3: train.seed")
    path.write_text("[train]\nepochs = 20\n")
    assert resolve(path).provenance["train.epochs"] == "private.toml:2"
    for reference in (path, "../outside/private.toml"):
        assert "outside" not in to_toml(resolve(reference))


def test_another_method_starts_its_options_afresh(write: Write) -> None:
    write('[method]\nname = "lbc"\nt_i = 3\n', "parent.toml")
    assert resolve(write('extends = "parent.toml"\n[method]\nt_f = 9\n')).recipe.method["t_i"] == 3
    other = resolve(write('extends = "parent.toml"\n[method]\nname = "dense"\n'))
    assert other.recipe.method == {"name": "dense"}
    assert resolve("parent.toml", flags={"method.name": "dense"}).recipe.method == {"name": "dense"}
    assert resolve("parent.toml", flags={"method.name": "lbc"}).recipe.method["t_i"] == 3
    both = resolve("parent.toml", overrides=["method.rounding=removals"], flags={"method.name": "lbc"})
    assert (both.recipe.method["t_i"], both.recipe.method["rounding"]) == (3, "removals")


def test_the_default_method_counts_as_a_name_when_methods_change(write: Write) -> None:
    write("[method]\nt_i = 3\n", "parent.toml")
    assert resolve("parent.toml").recipe.method["t_i"] == 3
    assert resolve(write('extends = "parent.toml"\n[method]\nname = "dense"\n')).recipe.method == {"name": "dense"}


def test_a_glob_set_anew_is_the_last_one(write: Write) -> None:
    write('[sparsity.layers]\n"a.*" = "1:4"\n"b.*" = "dense"\n', "parent.toml")
    path = write('extends = "parent.toml"\n[sparsity]\nlayers."a.*" = "2:8"\n')
    resolved = resolve(path)
    assert list(resolved.recipe.sparsity.layers.items()) == [("b.*", "dense"), ("a.*", "2:8")]
    assert list(tomllib.loads(to_toml(resolved))["sparsity"]["layers"]) == ["b.*", "a.*"]
    assert resolved.provenance['sparsity.layers."a.*"'] == "mine.toml:3"


def test_an_empty_table_of_globs_clears_and_an_empty_heading_does_not(write: Write) -> None:
    write('[sparsity]\nvector = 4\n[sparsity.layers]\n"a.*" = "1:4"\n', "parent.toml")
    assert resolve(write('extends = "parent.toml"\n[sparsity]\nlayers = {}\n')).recipe.sparsity.layers == {}
    kept = resolve(write('extends = "parent.toml"\n[sparsity]\n')).recipe.sparsity
    assert (kept.vector, kept.layers) == (4, {"a.*": "1:4"})


def test_a_circle_is_refused_and_named(write: Write) -> None:
    write('extends = "b.toml"\n', "a.toml")
    write('\nextends = "sub/c.toml"\n', "b.toml")
    write('extends = "../b.toml"\n', "sub/c.toml")
    problem = only_problem("a.toml")
    assert problem == (
        "sub/c.toml:1: extends: the recipes extend one another in a circle: b.toml -> sub/c.toml -> b.toml"
    )


def test_a_recipe_that_extends_itself(write: Write) -> None:
    assert "mine.toml -> mine.toml" in only_problem(write('extends = "mine.toml"\n'))


def test_a_missing_parent_is_reported_with_everything_else(write: Write) -> None:
    path = write('# mine\nextends = "imagenet-resnet5"\n[train]\nepoch = 3\n')
    missing, unknown = problems_of(path)
    assert missing.startswith("mine.toml:2: extends: no recipe 'imagenet-resnet5'")
    assert "Did you mean 'imagenet-resnet50'" in missing
    assert unknown == "mine.toml:4: train.epoch: unknown key. Did you mean 'epochs'?"


def test_extends_must_be_one_name(write: Write) -> None:
    assert "extends takes one string" in only_problem(write('extends = ["digits"]\n'))


def test_extends_in_a_table_is_told_where_it_belongs(write: Write) -> None:
    problem = only_problem(write('[train]\nextends = "digits"\n'))
    assert problem == "mine.toml:2: train.extends: unknown key: extends belongs to the top of the file"


def test_an_unknown_recipe_lists_those_that_exist(write: Write) -> None:
    problem = only_problem("digit")
    assert "no recipe 'digit'" in problem
    assert "imagenet-deit-small" in problem
    assert problem.endswith("Did you mean 'digits'?")
    assert "no recipe file 'digits.toml'" in only_problem("digits.toml")
    assert "shipped recipes go by name" in only_problem("digits.toml")


def test_a_path_wins_over_a_name_and_a_folder_does_not(write: Write, tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    assert find_recipe("digits") == shipped_recipes()["digits"]
    assert find_recipe(write("", "sub/digits")) == tmp_path / "sub/digits"
    assert find_recipe("digits", beside=tmp_path / "sub") == tmp_path / "sub/digits"


# Files that cannot be read


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[train]\nepochs 3\n", "mine.toml:2:8: is not valid TOML: "),
        ("a = [1,\n", "mine.toml:2: is not valid TOML: "),
        ("a = 1\na = 2\n", "mine.toml:2:"),
        ("a = 1\n[train\n", "mine.toml:2:7: "),
    ],
)
def test_a_syntax_error_has_line_and_column(write: Write, text: str, place: str) -> None:
    assert only_problem(write(text)).startswith(place)


def test_a_syntax_error_of_a_parent_names_the_parent(write: Write) -> None:
    write("x = = 1\n", "parent.toml")
    problem = only_problem(write('extends = "parent.toml"\n'))
    assert problem.startswith("parent.toml:1:5: is not valid TOML")
    assert problem.endswith("x = = 1")


def test_a_file_in_another_encoding(write: Write) -> None:
    path = write("")
    path.write_bytes(b'[train]\ndevice = "\xff"\n')
    assert only_problem(path) == "mine.toml:2: is not UTF-8: save the recipe in that encoding"


def test_a_byte_order_mark_is_no_error(write: Write) -> None:
    path = write("")
    path.write_bytes(b"\xef\xbb\xbf[train]\r\nepochs = 9\r\n")
    assert resolve(path).provenance["train.epochs"] == "mine.toml:2"


# Wrong keys and values


def test_everything_wrong_is_reported_at_once_in_the_order_of_the_file(write: Write) -> None:
    path = write(
        "epochs = 3\n[optim]\nx = 1\n[train]\nepoch = 10\nlr = 0.1\nepochs = 'ten'\nseed = -1\nema = 1\n"
        "[sparsity]\npattern = '4:2'\n[sparsity.layers]\n'a.*' = 'dense'\n'b.*' = '1:64'\n"
        "[method]\nt_ff = 3\nt_i = 1.5\n[augment]\nscale = [1]\nsmoothing = true\nremode = 'const2'"
        "\n[data]\nnonsense = 1"
    )
    problems = problems_of(path, overrides=["model.drop=1", "nonsense"], flags={"train.amp": "half"})
    starts = [
        "--set nonsense: must be KEY=VALUE, such as train.epochs=10",
        "mine.toml:1: epochs: unknown key or table: epochs belongs to [train]",
        "mine.toml:2: optim: unknown key or table. Did you mean 'optimizer'?",
        "mine.toml:5: train.epoch: unknown key. Did you mean 'epochs'?",
        "mine.toml:6: train.lr: unknown key: lr belongs to [optimizer]",
        'mine.toml:7: train.epochs: "ten" is a string, but an integer is expected (passes over the training data',
        "mine.toml:8: train.seed: -1 must be greater than or equal to 0 (",
        "mine.toml:9: train.ema: 1 is an integer, but true or false is expected (",
        "mine.toml:11: sparsity.pattern: pattern 4:2 keeps 4 of 2 weights",
        'mine.toml:14: sparsity.layers."b.*": pattern 1:64 has groups of 64 weights: M may be 32 at the most',
        "mine.toml:16: method.t_ff: method 'lbc' has no such option: unknown key. Did you mean 't_f'",
        "mine.toml:17: method.t_i: 1.5 is a number, but an integer is expected (",
        "mine.toml:19: augment.scale: [1] must have at least 2 items, not 1 (",
        "mine.toml:20: augment.smoothing: true is a boolean, but a number is expected (",
        "mine.toml:21: augment.remode: \"const2\" must be 'const', 'rand' or 'pixel' (",
        "mine.toml:23: data.nonsense: unknown key: known are source, root,",
        "--amp half: train.amp: \"half\" must be 'off', 'bfloat16' or 'float16' (",
        "--set model.drop=1: model.drop: unknown key. Did you mean 'drop_rate'",
    ]
    assert len(problems) == len(starts)
    for problem, start in zip(problems, starts, strict=True):
        assert problem.startswith(start)
    assert problems[5].endswith("; for example epochs = 120")
    assert problems[14].endswith("Did you mean 'const'?")


def test_problems_of_parents_stand_in_the_parents(write: Write) -> None:
    write("\n[train]\nsead = 1\nepochs = 0\n", "parent.toml")
    first, second, third = problems_of(write('extends = "parent.toml"\n[data]\nworkers = -1\n'))
    assert first.startswith("parent.toml:3: train.sead")
    assert second.startswith("parent.toml:4: train.epochs: 0 must be greater than 0")
    assert third.startswith("mine.toml:3: data.workers")


def test_a_value_that_a_child_corrects_is_no_problem(write: Write) -> None:
    write("[train]\nepochs = 0\n", "parent.toml")
    assert resolve(write('extends = "parent.toml"\n[train]\nepochs = 10\n')).recipe.train.epochs == 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train = 3", "mine.toml:1: train: 3 is an integer, but a table is expected"),
        ("method = 'lbc'", 'mine.toml:1: method: "lbc" is a string, but a table is expected'),
        ("[data]\nmean = [0.5, '1']", 'mine.toml:2: data.mean: "1" is a string, but a number is expected'),
        ("[train]\nseed = 1.0", "train.seed: 1.0 is a number, but an integer is expected"),
        ("[train]\nepochs = true", "train.epochs: true is a boolean, but an integer is expected"),
        ("[optimizer]\nlr = inf", "optimizer.lr: inf must be a finite number"),
        ("[optimizer]\nlr = nan", "optimizer.lr: nan must be a finite number"),
        ("[train]\nema_decay = 0.9", "mine.toml:2: train.ema_decay: no average is taken to which ema_decay applies"),
        ("[train]\nema_decay = 1.5", "train.ema_decay: 1.5 must be less than or equal to 1"),
        ("[train]\ndevice = 2022-01-01", "train.device: 2022-01-01 is a date, but a string in quotes is expected"),
        ("[sparsity]\nlayers = {'x' = 4}", "mine.toml:2: sparsity.layers.x: 4 is an integer, but a string"),
        ("[model]\npretrained = true\ninit = 'w'", "mine.toml:1: model: pretrained and init exclude each other"),
        ("[model.kwargs]\nwhen = 2022-01-01", "mine.toml:2: model.kwargs.when: 2022-01-01 is a date or time"),
        ("[model.kwargs]\nx = [{ when = 07:32:00 }]", "mine.toml:2: model.kwargs.x: 07:32:00 is a date or time"),
        ("[sparsity]\npattern = '2-4'", "sparsity.pattern: '2-4' is not a pattern: write N:M"),
        ("[sparsity]\npattern = '4:4'", "sparsity.pattern: pattern 4:4 keeps 4 of 4 weights"),
        ("[sparsity]\npattern = '2:4/0'", "sparsity.pattern: vector length 0 is not positive"),
        ("[sparsity]\nlayers.x = 'sparse'", "sparsity.layers.x: 'sparse' is not a pattern"),
        ("[sparsity]\nvector = 8\npattern = '2:4/16'", "mine.toml:3: sparsity.pattern: pattern '2:4/16' and vector 8"),
        ("[method]\nname = 'lbcc'", 'mine.toml:2: method.name: "lbcc" is no method: one of lbc, dense'),
        ("[method]\nname = 3", "mine.toml:2: method.name: 3 is no method: one of lbc"),
        (
            "[method]\nepochs = 3",
            "mine.toml:2: method.epochs: method 'lbc' has no such option: unknown key: epochs belongs",
        ),
        (
            "[method]\nname = 'dense'\nt_i = 1",
            "mine.toml:3: method.t_i: method 'dense' has no such option: unknown key: t_i",
        ),
        ("[method]\nt_i = -1", "mine.toml:2: method.t_i: -1 must be greater than or equal to 0"),
        ("[schedule]\nname = 'multistep'", "schedule.decay_milestones: multistep needs the epochs"),
        (
            "[schedule]\nname = 'multistep'\ndecay_milestones = [0, 2]",
            "mine.toml:3: schedule.decay_milestones: [0, 2]: in",
        ),
        (
            "[schedule]\nname = 'multistep'\ndecay_milestones = [120]",
            "in a run of 120 epochs the rate can fall at epochs 1 to 119",
        ),
        ("[augment]\nmixup = 0.8\n[data]\nbatch_size = 7", "mine.toml:4: data.batch_size: mixup mixes pairs"),
        ("[augment]\ncutmix = 0.8\n[data]\nbatch_size = 7", "mine.toml:4: data.batch_size: cutmix mixes pairs"),
        ("[augment]\nscale = [0.5, 1.5]", "augment.scale: [0.5, 1.5] must be [low, high] with 0 < low <= high <= 1"),
        ("[augment]\nratio = [2, 1]", "augment.ratio: [2.0, 1.0] must be [low, high]"),
        ("[augment]\ncolor_jitter = 0.3\nauto_augment = 'rand-m9'", "mine.toml:3: augment.auto_augment: timm leaves"),
    ],
)
def test_one_wrong_value(write: Write, text: str, said: str) -> None:
    assert said in only_problem(write(text))


def test_an_odd_batch_without_mixing_is_fine(write: Write) -> None:
    assert resolve(write("[data]\nbatch_size = 7\n")).recipe.data.batch_size == 7


def test_integers_do_where_numbers_are_expected(write: Write) -> None:
    recipe = resolve(write("[optimizer]\nlr = 1\n[augment]\nscale = [1, 1]\n")).recipe
    assert (recipe.optimizer.lr, recipe.augment.scale) == (1.0, [1.0, 1.0])
    assert all(isinstance(value, float) for value in [recipe.optimizer.lr, *recipe.augment.scale])


def test_fewer_epochs_than_the_warm_up_says_so_with_the_remedy() -> None:
    problem = only_problem("imagenet-resnet50", flags={"train.epochs": 3})
    assert problem.startswith("--epochs 3: train.epochs: the warm-up of 5 epochs must end before the run of 3 does")
    assert problem.endswith("train for 6 epochs or more, or --set schedule.warmup_epochs=2 or less")
    assert "the run of 5" in only_problem("imagenet-resnet50", flags={"train.epochs": 5})
    resolve("imagenet-resnet50", flags={"train.epochs": 6})
    resolve("imagenet-resnet50", overrides=["schedule.warmup_epochs=2"], flags={"train.epochs": 3})


def test_a_rule_is_not_judged_on_values_that_are_wrong_themselves(write: Write) -> None:
    only_problem(write("[train]\nepochs = 'two'\n[schedule]\nwarmup_epochs = 200\n"))


# The command line


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("train.epochs=10", ("train", "epochs"), 10),
        ("optimizer.lr = 1e-3", ("optimizer", "lr"), 1e-3),
        ("optimizer.lr=-inf", ("optimizer", "lr"), -math.inf),
        ("sparsity.pattern=2:4", ("sparsity", "pattern"), "2:4"),
        ("sparsity.pattern=16:32", ("sparsity", "pattern"), "16:32"),
        ("sparsity.pattern=12:30:00", ("sparsity", "pattern"), "12:30:00"),
        ("data.source=/a=b", ("data", "source"), "/a=b"),
        ('sparsity.layers."layer4.*"="1:4"', ("sparsity", "layers", "layer4.*"), "1:4"),
        ('sparsity.layers."a=b"=1:4', ("sparsity", "layers", "a=b"), "1:4"),
        ("augment.scale=[0.5, 1]", ("augment", "scale"), [0.5, 1]),
        ("model.kwargs={depth=3}", ("model", "kwargs"), {"depth": 3}),
        ("train.ema=true", ("train", "ema"), True),
        ("train.ema=True", ("train", "ema"), "True"),
        ("model.init=", ("model", "init"), ""),
        ("train.device=cuda\nx = 1", ("train", "device"), "cuda\nx = 1"),
        ("train.epochs=1\nx = 1", ("train", "epochs"), "1\nx = 1"),
    ],
)
def test_overrides_are_toml_or_else_strings(text: str, path: tuple[str, ...], value: Any) -> None:
    found_path, found = parse_override(text)
    assert (found_path, found, type(found)) == (path, value, type(value))


@pytest.mark.parametrize("text", ["", "=", "a", "a.=1", ".a=1", "a b=1", "extends=digits", '"a=1'])
def test_overrides_without_a_key_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"KEY=VALUE|--recipe"):
        parse_override(text)


def test_overrides_reach_globs() -> None:
    resolved = resolve("digits", overrides=['sparsity.layers."layer4.*"="1:4"', "sparsity.layers.fc=dense"])
    assert resolved.recipe.sparsity.layers == {"layer4.*": "1:4", "fc": "dense"}
    assert resolved.provenance['sparsity.layers."layer4.*"'] == "--set"


def test_a_flag_wins_over_the_recipe_and_says_so() -> None:
    flags = {"sparsity.pattern": "1:4", "model.name": "vit_tiny", "data.source": Path("/imagenet"), "train.ema": True}
    resolved = resolve("digits", flags={**flags, "train.seed": None})
    recipe = resolved.recipe
    assert (recipe.sparsity.pattern, recipe.model.name, recipe.data.source) == ("1:4", "vit_tiny", "/imagenet")
    origins = [resolved.provenance[key] for key in flags]
    assert origins == ["--pattern", "MODEL", "--data", "--ema"]
    assert resolved.provenance["train.seed"] == "default"


def test_a_flag_and_an_override_may_agree_but_not_disagree() -> None:
    assert resolve(overrides=["train.epochs=30"], flags={"train.epochs": 30}).recipe.train.epochs == 30
    problem = only_problem(overrides=["train.epochs=20"], flags={"train.epochs": 10})
    assert problem == "train.epochs: --epochs 10 and --set train.epochs=20 disagree: give one of them"
    assert "disagree" in only_problem(overrides=["model.name=a"], flags={"model.name": "b"})
    assert "disagree" in only_problem(overrides=["train={epochs=20}"], flags={"train.epochs": 10})
    assert "disagree" in only_problem(overrides=["train=3"], flags={"train.epochs": 10})


def test_two_overrides_of_one_key_disagree_too() -> None:
    assert "--set train.seed=1 and --set train.seed=2 disagree" in only_problem(
        overrides=["train.seed=1", "train.seed=2"]
    )
    assert "disagree" in only_problem(overrides=["train.ema=true", "train.ema=1"])
    assert resolve(overrides=["optimizer.lr=1", "optimizer.lr=1.0"]).recipe.optimizer.lr == 1.0


def test_bytes_that_are_no_text_are_refused() -> None:
    assert "is not valid UTF-8" in only_problem(flags={"data.source": "/data/\udcff"})


# TOML out and in


def same(resolved: ResolvedRecipe, tmp_path: Path) -> ResolvedRecipe:
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(resolved), encoding="utf-8")
    return resolve(path)


@pytest.mark.parametrize("name", [None, *shipped_recipes()])
def test_a_resolved_recipe_reads_back_as_itself(name: str | None, tmp_path: Path) -> None:
    resolved = resolve(name, overrides=['sparsity.layers."a b"="dense"'])
    again = same(resolved, tmp_path)
    assert again.recipe == resolved.recipe
    assert resolved.text == to_toml(resolved)
    tables = {"method": resolved.recipe.method, "model": resolved.recipe.model.model_dump()}
    unset = {f"{table}.{key}" for table, values in tables.items() for key, value in values.items() if value is None}
    defaults = {key for key, origin in again.provenance.items() if origin == "default"}
    assert defaults == unset


def test_the_provenance_stands_behind_each_value() -> None:
    text = to_toml(resolve("digits", overrides=["train.seed=5"], flags={"train.epochs": 9}))
    lines = text.splitlines()
    assert "seed = 5  # --set" in lines
    assert "epochs = 9  # --epochs" in lines
    assert "vector = 1  # default" in lines
    assert "# t_f: not set  # default" in lines
    source = next(line for line in lines if line.startswith("source = "))
    number = int(source.rpartition(":")[2])
    assert shipped_recipes()["digits"].read_text().splitlines()[number - 1] == 'source = "digits"'
    assert lines[0] == "# Recipe as resolved: recipes/digits.toml"


@settings(max_examples=60, deadline=None)
@given(
    layers=st.dictionaries(KEYS, st.sampled_from(["1:4", "2:4/8", "dense"]), max_size=4),
    kwargs=st.dictionaries(KEYS, VALUES, max_size=3),
    name=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    lr=st.floats(0, 1e300),
    memory=st.sampled_from([math.inf, 1.0, 5e-324]),
)
def test_any_recipe_reads_back_as_itself(
    tmp_path_factory: pytest.TempPathFactory,
    layers: dict[str, str],
    kwargs: dict[str, Any],
    name: str,
    lr: float,
    memory: float,
) -> None:
    flags = {"sparsity.layers": layers, "model.kwargs": kwargs, "model.name": name, "optimizer.lr": lr}
    resolved = resolve(flags={**flags, "method.score_memory": memory})
    again = same(resolved, tmp_path_factory.mktemp("recipe"))
    assert again.recipe == resolved.recipe
    assert list(again.recipe.sparsity.layers) == list(layers)


def test_a_file_name_cannot_break_out_of_its_comment(write: Write) -> None:
    path = write("[train]\nepochs = 9\n", "a\nseed = 5\n.toml")
    resolved = resolve(path)
    assert tomllib.loads(to_toml(resolved))["train"]["seed"] == 0


def test_a_resolved_recipe_cannot_be_changed() -> None:
    resolved = resolve()
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved.name = "other"
    with pytest.raises(ValueError, match="frozen"):
        resolved.recipe.train.epochs = 3


# Shipped recipes


def test_these_recipes_are_shipped() -> None:
    assert {"digits", "imagenet-resnet18", "imagenet-resnet50", "imagenet-deit-small"} <= set(shipped_recipes())


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_resolves_and_says_what_it_is_for(name: str) -> None:
    resolved = resolve(name)
    recipe = resolved.recipe
    assert recipe.description
    assert recipe.model.name
    if METHODS[recipe.method["name"]].structured:
        assert resolve(name, flags={"sparsity.pattern": "1:16"}).recipe.sparsity.pattern == "1:16"
    assert all(origin == "default" or origin.startswith("recipes/") for origin in resolved.provenance.values())


@pytest.mark.parametrize("name", ["imagenet-resnet18", "imagenet-resnet50"])
def test_the_residual_networks_have_the_settings_of_the_paper(name: str) -> None:
    recipe = resolve(name).recipe
    assert (recipe.train.epochs, recipe.data.batch_size, recipe.augment.smoothing) == (120, 256, 0.1)
    optimizer, schedule = recipe.optimizer, recipe.schedule
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("sgd", 0.1, 0.9, 5e-4)
    assert (schedule.name, schedule.warmup_epochs, schedule.warmup_lr, schedule.min_lr) == ("cosine", 5, 0.0, 0.0)
    assert recipe.model.name == name.removeprefix("imagenet-")
    assert (recipe.method["name"], recipe.method["t_i"], recipe.method["t_f"]) == ("lbc", 0, None)


def test_deit_has_its_published_settings() -> None:
    recipe = resolve("imagenet-deit-small").recipe
    assert (recipe.train.epochs, recipe.data.batch_size, recipe.optimizer.name) == (300, 1024, "adamw")
    assert recipe.optimizer.lr == 5e-4 * recipe.data.batch_size / 512
    assert (recipe.augment.mixup, recipe.augment.cutmix, recipe.augment.reprob) == (0.8, 1.0, 0.25)
    assert (recipe.augment.aug_repeats, recipe.model.drop_path_rate, recipe.train.ema_decay) == (3, 0.1, 0.99996)


@pytest.mark.parametrize(
    ("model", "data", "name"),
    [
        ("resnet18", "digits", "digits"),
        ("", "digits", "digits"),
        ("deit_tiny_patch16_224", "digits", "digits"),
        ("resnet18", "/imagenet", "imagenet-resnet18"),
        ("resnet18.a1_in1k", "/imagenet", "imagenet-resnet18"),
        ("resnet50", "torch/cifar10", "imagenet-resnet50"),
        ("deit_small_patch16_224", "/imagenet", "imagenet-deit-small"),
        ("vit_base_patch16_224.augreg_in21k", "/imagenet", "imagenet-deit-small"),
        ("swin_tiny_patch4_window7_224", "/imagenet", "imagenet-deit-small"),
        ("convnext_tiny", "/imagenet", "imagenet-deit-small"),
        ("regnety_032", "/imagenet", "imagenet-resnet50"),
        ("resnetv2_50", "/imagenet", "imagenet-resnet50"),
        ("resnet101", "/imagenet", "imagenet-resnet50"),
    ],
)
def test_the_recipe_of_a_run_that_names_none(model: str, data: str, name: str) -> None:
    found, reason = recipe_for(model, data)
    assert found == name
    assert found in shipped_recipes()
    assert f"recipe {name}" in reason


def test_a_default_is_called_one() -> None:
    assert "default for convolutional networks" in recipe_for("resnet101", "/imagenet")[1]
    assert "default for transformers" in recipe_for("swin_tiny_patch4_window7_224", "/imagenet")[1]
    assert "made for resnet50" in recipe_for("resnet50.a1_in1k", "/imagenet")[1]


def test_neither_model_nor_recipe() -> None:
    with pytest.raises(RecipeError, match="no model: name one"):
        recipe_for("", "/imagenet")


def test_an_installed_package_has_its_recipes_inside_and_folders_are_part_of_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "lbc_cli"
    for path in (package / "recipes/paper/one.toml", tmp_path / "recipes/other.toml"):
        path.parent.mkdir(parents=True)
        path.write_text("[train]\nepochs = 33\n")
    monkeypatch.setattr(find, "__file__", str(package / "recipe/find.py"))
    assert shipped_recipes() == {"paper/one": package / "recipes/paper/one.toml"}
    resolved = resolve("paper/one")
    assert (resolved.name, resolved.provenance["train.epochs"]) == ("paper/one", "recipes/paper/one.toml:2")


# The JSON schema


def against(schema: dict[str, Any], value: Any, root: dict[str, Any], where: str = "") -> Iterator[str]:
    """The part of JSON Schema that recipes need, checked by hand; yields what does not fit."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
    options = schema.get("oneOf", schema.get("anyOf"))
    if options is not None:
        fitting = [option for option in options if not list(against(option, value, root, where))]
        if len(fitting) != 1:
            yield f"{where}: {len(fitting)} of {len(options)} alternatives fit"
    if "const" in schema and schema["const"] != value:
        yield f"{where}: not {schema['const']}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: not one of {schema['enum']}"
    kind = schema.get("type")
    if kind == "null" or (
        kind and (not isinstance(value, kinds[kind]) or isinstance(value, bool) != (kind == "boolean"))
    ):
        yield f"{where}: no {kind}"
    if kind == "object" and isinstance(value, dict):
        yield from (f"{where}.{key}: missing" for key in schema.get("required", []) if key not in value)
        for key, below in value.items():
            known = schema.get("properties", {}).get(key, schema.get("additionalProperties", True))
            if known is False:
                yield f"{where}.{key}: unknown"
            elif known is not True:
                yield from against(known, below, root, f"{where}.{key}")


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_json_schema_accepts_shipped_and_resolved_recipes(name: str) -> None:
    schema = json_schema()
    assert list(against(schema, tomllib.loads(shipped_recipes()[name].read_text()), schema)) == []
    assert list(against(schema, tomllib.loads(resolve(name).text), schema)) == []


@pytest.mark.parametrize(
    "text",
    [
        "epochs = 3",
        "[train]\nepoch = 3",
        "[train]\nepochs = 'ten'",
        "[train]\namp = 'half'",
        "[method]\nt_ff = 3",
        "[method]\nname = 'dense'\nt_f = 3",
        "[method]\nname = 'none'",
        "extends = 3",
    ],
)
def test_the_json_schema_refuses_what_a_recipe_refuses(text: str) -> None:
    schema = json_schema()
    assert list(against(schema, tomllib.loads(text), schema))


def test_the_json_schema_is_json_of_the_right_draft_with_every_method() -> None:
    schema = json.loads(json.dumps(json_schema(), allow_nan=False))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    names = [method["properties"]["name"]["const"] for method in schema["properties"]["method"]["oneOf"]]
    assert names == list(METHODS)
    fields = json.dumps(schema["$defs"]["Train"]["properties"]["epochs"])
    assert "passes over the training data" in fields
    assert list(against(schema, tomllib.loads("[method]\nt_f = 3"), schema)) == [], "the default method needs no name"


# Start-up


def test_recipes_are_read_without_torch() -> None:
    code = (
        "import sys, lbc_cli.recipe.schema, lbc_cli.recipe.load, lbc_cli.recipe\n"
        "lbc_cli.recipe.shipped_recipes(); lbc_cli.recipe.recipe_for('resnet50', 'digits')\n"
        "print([name for name in ('torch', 'timm', 'numpy', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
