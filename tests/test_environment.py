"""What a run was made with: versions, hardware, commit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lbc_cli.environment import describe_environment, describe_hardware
from lbc_cli.runs import to_json


def test_environment_names_versions_and_hardware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = describe_environment(["lbc", "train", "resnet18"])
    assert found["argv"] == ["lbc", "train", "resnet18"]
    assert found["git"] is None
    assert found["cpus"] >= 1
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert all(found[name] for name in ("lbc", "torch", "torchvision", "timm", "numpy", "platform", "cpu"))
    assert not {"argv", "git"} & describe_hardware().keys()
    assert json.loads(to_json(found)) == found


def test_environment_names_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "first")
    monkeypatch.chdir(tmp_path)
    assert describe_environment([])["git"] == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("two")
    assert describe_environment([])["git"] == git("rev-parse", "HEAD") + "-dirty"
