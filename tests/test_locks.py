"""The locks hold what pyproject.toml asks for, pinned, from no particular index."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[1]
PIN = re.compile(r"([a-z0-9][a-z0-9-]*)==(\S+)")
# lock -> the locks that it adds to, and the extras that they hold together
LOCKS = {
    "cpu": (["cpu"], ["cpu", "smollm"]),
    "gemma": (["cpu", "gemma"], ["gemma"]),
    "dev": (["cpu", "dev"], ["dev"]),
    "gpu": (["gpu"], ["gpu", "smollm"]),
}
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton", "llm", "llama-cpp-python"}


def pins(lock):
    lines = (PROJECT / f"requirements/{lock}.txt").read_text().splitlines()
    found = [PIN.fullmatch(line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    return {match.group(1): match.group(2) for match in found}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_satisfies_what_the_project_asks_for(lock):
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    locks, extras = LOCKS[lock]
    pinned = {name: version for part in locks for name, version in pins(part).items()}
    wanted = [*project["dependencies"]]
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    for line in wanted:
        requirement = Requirement(line)
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{line} is in no lock: run make lock"
        assert requirement.specifier.contains(version), f"{line}, but {version}: run make lock"


def test_the_added_locks_repeat_nothing_of_the_first():
    assert pins("gemma").keys() & pins("cpu").keys() == set()
    assert pins("dev").keys() & pins("cpu").keys() == set()


def test_the_cpu_lock_has_a_cpu_torch_and_leaves_out_what_breaks_or_bloats_it():
    locked = pins("cpu") | pins("gemma") | pins("dev")
    assert locked["torch"].endswith("+cpu")
    assert locked.keys() & LEFT_OUT == set()
    assert not [name for name in locked if name.startswith(("nvidia-", "cuda-"))]
    assert "+cpu" not in pins("gpu")["torch"]
