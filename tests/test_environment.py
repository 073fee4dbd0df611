"""What a run was made with: versions, hardware, commit."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import lbc_cli
from lbc_cli.environment import describe_environment, describe_hardware, git_commit
from lbc_cli.runs import to_json


def test_environment_names_versions_and_hardware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    found = describe_environment(["lbc", "train", "resnet18"])
    assert found["argv"] == ["lbc", "train", "resnet18"]
    assert found["git"] is None
    assert found["folder"] == str(tmp_path)
    assert found["cpus"] >= 1
    assert found["memory"] > 1 << 28
    assert found["variables"]["OMP_NUM_THREADS"] == "3"
    assert "secret" not in to_json(found)
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert abs(datetime.fromisoformat(found["started"]) - datetime.now(UTC)) < timedelta(minutes=1)
    assert all(found[name] for name in ("lbc", "torch", "torchvision", "timm", "numpy", "platform", "cpu"))
    assert not {"argv", "git", "lbc_git", "folder", "variables"} & describe_hardware().keys()
    assert json.loads(to_json(found)) == found


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_environment_names_the_commit_and_whether_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "first")
    monkeypatch.chdir(tmp_path)
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "new").write_text("what is not tracked changes nothing")
    assert describe_environment([])["git"] == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("two")
    assert describe_environment([])["git"] == {"commit": commit, "dirty": True}
    # A package installed somewhere below is not of this repository.
    assert git_commit(tmp_path / "runs", of=tmp_path / "runs" / "new") is None
    assert git_commit(tmp_path, of=tmp_path / "file") == {"commit": commit, "dirty": True}


def test_lbc_installed_somewhere_in_a_repository_is_not_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-qm", "first", "--allow-empty")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "environment.py").write_text("")
    monkeypatch.setattr("lbc_cli.environment.__file__", str(tmp_path / "site-packages" / "environment.py"))
    assert describe_environment([])["lbc_git"] is None


def test_the_commit_of_lbc_is_that_of_its_own_source() -> None:
    package = Path(lbc_cli.__file__).parent
    tracked = subprocess.run(
        ["git", "-C", package, "ls-files", "--error-unmatch", "environment.py"], capture_output=True, check=False
    )
    found = describe_environment([])["lbc_git"]
    if tracked.returncode:
        assert found is None
    else:
        assert found["commit"] == git(package, "rev-parse", "HEAD")
