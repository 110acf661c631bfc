"""Which checkpoints stay once a run is evaluated, and what is still known of the others."""

import pytest

from cluster import storage
from cluster.config import parse_config
from cluster.errors import RunError
from cluster.publishing import MARKER, publishing
from cluster.run_folder import RunFolder
from cluster.soundness import set_aside_damaged
from evals.keeping import thin_out
from evals.results import read_results
from evals.table import results_table
from serving.models import evaluation_name, published_epochs, student_id

VALIDATION = {1: 0.5, 2: 0.75, 3: 0.25}


def config(tmp_path, keep):
    raw = {
        "run": {"folder": str(tmp_path / "run")},
        "task": {"name": "word_problems"},
        "teacher": {"model": "big"},
        "student": {"model": "small"},
        "training": {"epochs": 3, "keep": keep},
    }
    return parse_config(raw, "test")


def publish(run, epoch):
    with publishing(run.checkpoint(epoch)) as folder:
        (folder / "model.safetensors").write_text(f"weights of epoch {epoch}")


@pytest.fixture
def run(tmp_path):
    """Three epochs that are trained and evaluated, the second the best."""
    run = RunFolder(storage.location(str(tmp_path / "run")))
    for epoch, accuracy in VALIDATION.items():
        publish(run, epoch)
        for split in ("validation", "test"):
            figures = {"accuracy": accuracy, "standard_error": 0.1, "interval_95": [0, 1], "n": 4}
            more = {"unparsed": 0, "accuracy_given_parsed": accuracy}
            file = run.evaluation(evaluation_name(student_id(epoch), split))
            storage.write_json(file, figures | more)
    return run


KEPT = {"each_epoch": [1, 2, 3], "best_and_last": [2, 3], "last": [3]}


@pytest.mark.parametrize("keep", KEPT)
def test_a_policy_keeps_what_it_says_and_all_stays_known(run, keep, tmp_path, capsys):
    settings = config(tmp_path, keep)
    for _ in range(2):  # the second time there is nothing to do
        thin_out(run, settings)
    assert published_epochs(run, settings) == KEPT[keep]
    files = {path.parent.name for path in run.root.glob("checkpoints/*/model.safetensors")}
    assert files == {f"epoch_{epoch:03d}" for epoch in KEPT[keep]}
    assert capsys.readouterr().out.count("removed") == (keep != "each_epoch")
    assert run.epochs_published() == 3, "they were trained"
    assert "epochs trained: 1, 2, 3 of 3" in run.describe(3)
    assert [result.model_id for result in read_results(run, settings)] == [
        student_id(epoch) for epoch in (1, 2, 3)
    ]


@pytest.mark.fault
def test_a_removed_checkpoint_is_not_a_damaged_one(run, tmp_path, capsys):
    marker = storage.read_json(run.checkpoint(1) / MARKER)
    thin_out(run, config(tmp_path, "last"))
    assert storage.read_json(run.removed_file)["epoch_001"] == marker, "its digests are kept"
    set_aside_damaged(run)
    assert "damaged" not in capsys.readouterr().out
    assert run.epochs_published() == 3
    run.removed_file.write_text("{")
    set_aside_damaged(run)
    assert run.epochs_published() == 0, "nobody knows, so it is trained again"


@pytest.mark.fault
def test_none_is_removed_before_those_that_stay_are_proved_whole(run, tmp_path):
    (run.checkpoint(3) / "model.safetensors").write_text("weights of epoch 4")
    with pytest.raises(RunError, match=r"epoch_003 is to stay and is damaged, so no other is"):
        thin_out(run, config(tmp_path, "best_and_last"))
    assert published_epochs(run, config(tmp_path, "last")) == [1, 2, 3]
    assert not run.removed_file.exists()


@pytest.mark.fault
def test_a_removal_that_was_killed_is_finished(run, tmp_path, monkeypatch):
    def killed(folder):
        (folder / MARKER).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("cluster.run_folder.discard_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            thin_out(run, config(tmp_path, "last"))
    assert run.epochs_published() == 3
    thin_out(run, config(tmp_path, "last"))
    assert storage.read_json(run.removed_file).keys() == {"epoch_001", "epoch_002"}
    assert [path.name for path in run.root.glob("checkpoints/epoch_*")] == ["epoch_003"]


@pytest.mark.fault
def test_a_checkpoint_that_is_made_again_is_there_again(run, tmp_path):
    settings = config(tmp_path, "last")
    thin_out(run, settings)
    publish(run, 1)
    assert published_epochs(run, settings) == [1, 3]
    thin_out(run, settings)
    assert published_epochs(run, settings) == [3]


@pytest.mark.parametrize(
    ("keep", "student", "caption"),
    [
        ("best_and_last", 2, "* the best on validation, served as student"),
        ("last", 3, "* served as student"),
    ],
)
def test_the_student_that_is_served_is_one_that_is_kept(run, keep, student, caption, tmp_path):
    settings = config(tmp_path, keep)
    thin_out(run, settings)
    marked = [result for result in read_results(run, settings) if result.best]
    assert [result.model_id for result in marked] == [student_id(student)]
    assert results_table(run, settings).caption == caption


def test_without_validation_only_the_last_is_the_best(run, tmp_path):
    run.evaluation(evaluation_name(student_id(1), "validation")).unlink()
    thin_out(run, config(tmp_path, "best_and_last"))
    assert published_epochs(run, config(tmp_path, "last")) == [3]
