"""The README's tree is the project's, imports go one way, and the command line starts light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
ORDER = ["cluster", "pipeline", "training", "serving", "evals"]
WHOLE_FOLDERS = {"tests", "docs", "benchmarks"}  # one line for all that is in them
UNLISTED = {"__init__.py", ".gitignore"}
HEAVY = ["torch", "ray", "vllm", "deepspeed", "transformers", "datasets"]


def files_of_the_project():
    """What git tracks, or would track if it were added."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    present = [Path(name) for name in listed if (PROJECT / name).exists()]
    assert present
    return {
        f"{file.parts[0]}/" if file.parts[0] in WHOLE_FOLDERS else file.as_posix()
        for file in present
        if file.name not in UNLISTED
    }


def parse_tree(readme):
    """Path -> its sentence, of the block under "## The tree"; indented names are in the folder."""
    block = re.search(r"## The tree\n.*?```\n(.*?)```", readme, re.DOTALL)
    assert block, "README.md has no tree"
    sentences, folder = {}, ""
    for line in block.group(1).splitlines():
        name, _, sentence = line.strip().partition(" ")
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            sentences[name] = sentence.strip()
        else:
            sentences[folder + name] = sentence.strip()
    return sentences


def test_the_readme_shows_every_file_and_no_other():
    tree = parse_tree((PROJECT / "README.md").read_text())
    files = files_of_the_project()
    folders = {name for name in tree if name.endswith("/")} - {f"{w}/" for w in WHOLE_FOLDERS}
    assert sorted(files - tree.keys()) == [], "add them to the tree in README.md"
    assert sorted(tree.keys() - files - folders) == [], "remove them from the tree in README.md"
    assert [name for name in folders if not any(f.startswith(name) for f in files)] == []
    assert [name for name, sentence in tree.items() if not sentence] == []


def test_a_tree_is_read_as_it_looks():
    readme = "# X\n## The tree\n```\na.py    one\nb/      two\n  c.py  three\n  d/e.py four\n```\n"
    assert parse_tree(readme) == {"a.py": "one", "b/": "two", "b/c.py": "three", "b/d/e.py": "four"}


def imports_of(source):
    """The top-level names that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def wrong_way(folder, source):
    return imports_of(source) & {*ORDER[ORDER.index(folder) + 1 :], "potstill", "tests"}


@pytest.mark.parametrize("folder", ORDER)
def test_imports_go_one_way(folder):
    files = sorted((PROJECT / folder).rglob("*.py"))
    assert files
    wrong = {str(f.relative_to(PROJECT)): wrong_way(folder, f.read_text()) for f in files}
    assert {file: names for file, names in wrong.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from training.stage import train", {"training"}),
        ("import evals.report as r", {"evals"}),
        ("def f():\n    from serving import app", {"serving"}),
        ("import potstill", {"potstill"}),
        ("from cluster import storage\nfrom pipeline.rows import Pair\nimport json", set()),
    ],
)
def test_an_import_the_wrong_way_is_seen(source, found):
    assert wrong_way("pipeline", source) == found


def test_the_command_line_starts_without_the_engines():
    code = "import sys, potstill; print([m for m in sys.argv[1:] if m in sys.modules])"
    finished = subprocess.run(
        [sys.executable, "-c", code, *HEAVY], cwd=PROJECT, capture_output=True, text=True
    )
    assert finished.stdout.strip() == "[]", finished.stderr
