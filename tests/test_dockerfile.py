"""The Dockerfile as far as it can be read without a builder; nothing is built here."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.session import _ENVIRONMENT

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def instructions():
    """(instruction, its text) in order; a line that goes on is one."""
    text = re.sub(r"\\\n", " ", (PROJECT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(re.split(r"\s+", line, maxsplit=1)) for line in lines]


@pytest.fixture(scope="module")
def copied(instructions):
    """Source -> where it goes, relative to the working directory."""
    found = {}
    for name, text in instructions:
        if name == "COPY":
            *sources, target = [word for word in text.split() if not word.startswith("--")]
            found |= dict.fromkeys(sources, target)
    return found


def environment(instructions):
    text = " ".join(text for name, text in instructions if name == "ENV")
    return dict(word.split("=", 1) for word in text.split())


def test_what_it_copies_is_there_and_reaches_the_builder(copied):
    allowed = (PROJECT / ".dockerignore").read_text().splitlines()
    assert "*" in allowed, "all else stays behind"
    for source in copied:
        assert (PROJECT / source).exists(), source
    assert {f"!{source}" for source in copied} == {line for line in allowed if line[0] == "!"}


def test_what_it_copies_is_enough_to_run_the_command_and_to_install(copied, tmp_path):
    for source, target in copied.items():
        there = tmp_path / target / ("" if (PROJECT / source).is_dir() else source)
        copy = shutil.copytree if (PROJECT / source).is_dir() else shutil.copy
        copy(PROJECT / source, there)
    helped = subprocess.run(
        [sys.executable, "potstill.py", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert helped.returncode == 0, helped.stderr
    project = (tmp_path / "pyproject.toml").read_text()
    for package in re.findall(r'"(\w+)\*"', project):
        assert (tmp_path / package).is_dir(), "an editable install would leave it out"
    assert (tmp_path / "README.md").exists(), "pyproject.toml names it"


def test_its_targets_install_the_locks_and_nothing_else(instructions):
    stages = [text for name, text in instructions if name == "FROM"]
    assert stages == ["python:3.11-slim-bookworm AS base", "base AS cpu", "base AS cuda"]
    installs = [text for name, text in instructions if name == "RUN" and "install.sh" in text]
    assert [text.split("install.sh ")[1] for text in installs] == ["cpu", "gpu"]
    assert all((PROJECT / f"requirements/{lock}.txt").exists() for lock in ("cpu", "gpu"))
    assert not any("pip install" in text for _, text in instructions)


def test_its_user_is_not_root_and_it_asks_for_no_secret(instructions):
    names = [name for name, _ in instructions]
    assert names.index("USER") < names.index("COPY")
    assert [text for name, text in instructions if name == "USER"] == ["1000"]
    assert "ARG" not in names
    told = environment(instructions)
    assert told["RAY_AUTH_MODE"] == "token"
    assert not [name for name in told if re.search("KEY|SECRET|PASSWORD|TOKEN$", name)]


def test_its_environment_is_what_a_run_sets_for_its_processes(instructions):
    told = environment(instructions)
    shared = told.keys() & _ENVIRONMENT.keys()
    assert len(shared) >= 4
    assert {name: told[name] for name in shared} == {name: _ENVIRONMENT[name] for name in shared}
