"""Recipes of several stages: who trains whom, and where."""

import pytest
import yaml

from cluster.errors import BadInputError
from cluster.recipes import load_config, load_recipe
from cluster.storage import location

RECIPE = {
    "run": {"folder": "runs/two", "store": "store"},
    "task": {"name": "gsm8k"},
    "teacher": {"model": "org/teacher"},
    "student": {"model": "org/student", "chat_template": "{{ x }}"},
    "training": {"global_batch": 8, "epochs": 1},
    "stages": {
        "dsft": {"training": {"method": "sft", "epochs": 3}},
        "dadpo": {"training": {"method": "dadpo", "learning_rate": 5e-7}},
    },
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return path


def test_a_stage_trains_the_student_of_the_one_before(file):
    first, second = load_recipe(file)
    assert (first.run.folder, second.run.folder) == ("runs/two/dsft", "runs/two/dadpo")
    assert (first.training.method, first.training.epochs) == ("sft", 3)
    assert (second.training.method, second.training.epochs) == ("dadpo", 1)
    assert first.training.global_batch == second.training.global_batch == 8
    assert second.student.model == str(location("runs/two/dsft/checkpoints/epoch_003"))
    assert second.student.chat_template is None, "a checkpoint has its own"
    assert second.base_student == first.student
    assert first.base_student is None


def test_overrides_reach_all_stages_or_one(file):
    first, second = load_recipe(file, ["training.precision=fp32", "stages.dsft.training.epochs=2"])
    assert first.training.precision == second.training.precision == "fp32"
    assert second.student.model.endswith("dsft/checkpoints/epoch_002")


def test_an_arm_changes_the_last_stage(file):
    first, second = load_recipe(file, arm="ddpo")
    assert first.training.method == "sft"
    assert (second.training.method, second.training.teacher_weight) == ("dadpo", 0)


@pytest.mark.parametrize("stages", [[], "dsft", {}, {"a b": {}}, {"dsft": 3}], ids=repr)
def test_stages_that_are_none_are_refused(file, stages):
    file.write_text(yaml.safe_dump(RECIPE | {"stages": stages}))
    with pytest.raises(BadInputError, match="expected names, each with the sections"):
        load_recipe(file)


def test_a_mistake_names_its_stage(file):
    with pytest.raises(BadInputError, match=r"stage dadpo: training\.epoch is not an option"):
        load_recipe(file, ["stages.dadpo.training.epoch=2"])


def test_a_recipe_without_stages_is_one_configuration(file):
    file.write_text(yaml.safe_dump({k: v for k, v in RECIPE.items() if k != "stages"}))
    assert [load_config(file)] == load_recipe(file)
