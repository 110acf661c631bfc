"""What was damaged on the disk since an earlier try is set aside, and nothing else is."""

import pyarrow as pa
import pytest

from cluster.marking import mark, marker_of
from cluster.publishing import is_published, publishing
from cluster.run_folder import RunFolder
from cluster.soundness import set_aside_damaged
from cluster.storage import location, write_json, write_table

pytestmark = pytest.mark.fault

FILES = {
    "checkpoint": "checkpoints/epoch_001/model.safetensors",
    "marker": "checkpoints/epoch_002/PUBLISHED.json",
    "pairs": "pairs/epoch_001/pairs.parquet",
    "scores": "scores/epoch_002.parquet",
    "completions": "completions/teacher.parquet",
    "result": "evals/base_test.json",
    "answers": "evals/teacher_test.parquet",
}
GONE = {  # what is made again, where it is not the damaged file itself
    "checkpoint": ["checkpoints/epoch_001"],
    "marker": ["checkpoints/epoch_002"],
    "pairs": ["pairs/epoch_001"],
    "scores": ["scores/epoch_002.parquet", "pairs/epoch_002"],
    "answers": ["evals/teacher_test.json"],
}
TABLE = pa.table({"key": [f"key {number}" for number in range(1000)]})


@pytest.fixture
def run(tmp_path):
    """A run folder with a little of everything."""
    run = RunFolder(location(str(tmp_path / "run")))
    for epoch in (1, 2):
        with publishing(run.pairs(epoch)) as folder:
            write_table(TABLE, location(str(folder / "pairs.parquet")))
        with publishing(run.checkpoint(epoch)) as folder:
            (folder / "model.safetensors").write_bytes(bytes(1000))
        mark(run.scores(epoch), write_table(TABLE, run.scores(epoch)))
    for name in ("base_test", "teacher_test"):
        result = run.evaluation(name)
        mark(result, write_json(result, {"accuracy": 0.755}))
        answers = result.with_suffix(".parquet")
        mark(answers, write_table(TABLE, answers))
    mark(run.completions("teacher"), write_table(TABLE, run.completions("teacher")))
    return run


def names(run):
    found = {path.relative_to(run.root).as_posix() for path in run.root.rglob("*")}
    return {name for name in found if ".damaged-" not in name}


def flip(path, share=0.5):
    whole = bytearray(path.read_bytes())
    whole[int(share * (len(whole) - 1))] ^= 1
    path.write_bytes(whole)


def flip_near_the_end(path):
    """In the footer of a Parquet file, which has no checksum of its own."""
    flip(path, 0.95)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def test_nothing_is_set_aside_where_all_is_sound(run, capsys):
    before = names(run)
    set_aside_damaged(run)
    assert names(run) == before
    assert capsys.readouterr().out == ""


DAMAGES = [(what, damage) for what in FILES for damage in (flip, flip_near_the_end, cut, empty)]


def test_a_kill_leaves_no_pairs_without_their_scores(run, monkeypatch):
    cut(run.scores(2))
    with monkeypatch.context() as killed:
        killed.setattr("cluster.soundness.set_aside", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            set_aside_damaged(run)
    assert not is_published(run.pairs(2))
    set_aside_damaged(run)
    assert is_published(run.pairs(1))


@pytest.mark.parametrize(("what", "damage"), DAMAGES)
def test_a_damaged_file_is_set_aside_with_what_was_made_with_it(run, what, damage, capsys):
    before = names(run)
    damage(run.root / FILES[what])
    set_aside_damaged(run)
    gone = before - names(run)
    expected = GONE.get(what, [FILES[what]])
    assert gone == {name for name in before if any(name.startswith(path) for path in expected)}
    assert capsys.readouterr().out.count("is damaged: set aside") == len(expected)
    kept = {path for path in run.root.rglob("*.damaged-*") if ".damaged-" in path.name}
    assert len(kept) == len(expected), "still there to be looked at"


@pytest.mark.parametrize("what", ["completions", "scores", "result", "answers"])
def test_a_file_that_a_kill_left_without_its_marker_counts_where_it_can_be_read(run, what):
    file = run.root / FILES[what]
    marker_of(file).unlink()
    set_aside_damaged(run)
    assert file.exists()
    cut(file)
    set_aside_damaged(run)
    assert not (file if what != "answers" else run.evaluation("teacher_test")).exists()
