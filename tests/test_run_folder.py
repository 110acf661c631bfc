"""The run folder: resumed by the same recipe, refused for another."""

import json

import pytest
import yaml

from cluster.config import parse_config
from cluster.errors import BadInputError
from cluster.publishing import staging_folder
from cluster.run_folder import check_recipe, open_run

pytestmark = pytest.mark.fault


def config(folder, **changes):
    raw = {
        "run": {"folder": str(folder)},
        "task": {"name": "gsm8k"},
        "teacher": {"model": "org/teacher"},
        "student": {"model": "org/student"},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        raw.setdefault(section, {})[name] = value
    return parse_config(raw, "test")


def test_the_resolved_configuration_and_environment_are_kept(tmp_path):
    folder = open_run(config(tmp_path / "run"))
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["sampling"]["samples"] == 8
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["packages"]["ray"]
    assert folder.load_config() == config(tmp_path / "run")


def test_execution_fields_may_change(tmp_path):
    open_run(config(tmp_path / "run"))
    changed = config(tmp_path / "run", training__micro_batch=8, engines__max_engines=3)
    assert open_run(changed).load_config() == changed


def test_going_on_clears_what_a_killed_try_left(tmp_path):
    folder = open_run(config(tmp_path / "run"))
    left = staging_folder(folder.checkpoint(2))
    (left / "model.safetensors").write_text("half")
    open_run(config(tmp_path / "run"))
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_another_recipe_is_refused_and_changes_nothing(tmp_path):
    open_run(config(tmp_path / "run"))
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(BadInputError, match=r"pairs.phi was 0.5 and is now 1.0"):
        open_run(config(tmp_path / "run", pairs__phi=1))
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_check_leaves_no_folder(tmp_path):
    check_recipe(config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_run_is_refused(tmp_path):
    from cluster.run_folder import RunFolder
    from cluster.storage import location

    with pytest.raises(BadInputError, match="no run in"):
        RunFolder(location(str(tmp_path))).load_config()


def test_metrics_are_lines_of_json(tmp_path):
    folder = open_run(config(tmp_path / "run"))
    folder.record(stage="train", step=1)
    folder.record(stage="train", step=2)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_line_that_was_cut_short_costs_only_itself(tmp_path, capsys):
    folder = open_run(config(tmp_path / "run"))
    folder.record(stage="train", step=1)
    with folder.metrics_file.open("a") as stream:
        stream.write('{"stage": "train", "st')  # the disk was full
    assert folder.last_record() == "stage train, step 1"
    capsys.readouterr()
    folder.record(stage="train", step=2)
    assert [record["step"] for record in folder.records()] == [1, 2]
    assert capsys.readouterr().out.count("1 line(s) are damaged and left out") == 1


@pytest.mark.parametrize("damaged", [b'{"step": "\xff"}', b"[1]", b"7"])
def test_a_damaged_line_costs_only_itself(damaged, tmp_path):
    folder = open_run(config(tmp_path / "run"))
    folder.metrics_file.write_bytes(damaged + b"\n")
    folder.record(stage="train", step=1)
    assert [record["step"] for record in folder.records()] == [1]


def test_what_is_recorded_beside_steps_is_found_with_them(tmp_path):
    folder = open_run(config(tmp_path / "run"))
    folder.record(step=1)
    folder.record_ahead(stage="sample")
    assert folder.metrics_file.read_text() == '{"step": 1}\n'
    assert folder.records() == [{"stage": "sample"}, {"step": 1}]


def test_an_empty_file_of_metrics_is_no_record(tmp_path):
    folder = open_run(config(tmp_path / "run"))
    assert folder.last_record() == "none yet"
    folder.metrics_file.touch()
    assert folder.last_record() == "none yet"
    folder.record(stage="train", step=1)
    assert folder.metrics_file.read_text().count("\n") == 1


def test_each_try_leaves_its_environment(tmp_path, monkeypatch):
    for commit in ("first", "second", "third"):
        monkeypatch.setattr("cluster.run_folder._git_commit", lambda commit=commit: commit)
        open_run(config(tmp_path / "run"))
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["commit"] == "third"
    assert [earlier["commit"] for earlier in environment["earlier"]] == ["first", "second"]
    assert all("earlier" not in earlier for earlier in environment["earlier"])


@pytest.mark.parametrize("damaged", ["", '{"com', "[]", "\x00"])
def test_a_damaged_environment_costs_only_what_it_told(damaged, tmp_path):
    place = tmp_path / "run" / "environment.json"
    open_run(config(tmp_path / "run"))
    place.write_text(damaged)
    open_run(config(tmp_path / "run"))
    assert json.loads(place.read_text())["earlier"] == []
    assert len(list(place.parent.glob("environment.json.damaged-*"))) == 1


@pytest.mark.parametrize("theirs", ["README.md", "config.json"])
def test_a_folder_of_something_else_is_left_alone(tmp_path, theirs):
    (tmp_path / theirs).write_text("{}")
    with pytest.raises(BadInputError, match="and no run: give a folder that is new or empty"):
        open_run(config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [theirs]
