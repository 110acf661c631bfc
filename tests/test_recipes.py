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


def test_the_command_line_wins_over_the_arm_wins_over_the_table(file):
    for given in ("training.teacher_weight=0.5", "stages.dadpo.training.teacher_weight=0.5"):
        *_, last = load_recipe(file, [given], "ddpo")
        assert last.training.teacher_weight == 0.5, given
    table = {"training.teacher_weight": 0.01, "training.reference_weight": 0.3}
    *_, last = load_recipe(file, arm="ddpo", options=table)
    assert (last.training.teacher_weight, last.training.reference_weight) == (0, 0.3)


def test_an_arm_may_end_at_the_first_stage(file):
    (zero,) = load_recipe(file, arm="zero_shot_cot")
    assert (zero.training.epochs, zero.student.model) == (0, "org/student")
    (dsft,) = load_recipe(file, arm="dsft")
    assert (dsft.training.method, dsft.training.epochs) == ("sft", 3)


def test_phi_of_an_arm_is_not_undone_by_a_schedule(file):
    options = {"pairs.phi_schedule": [0.1]}
    file.write_text(yaml.safe_dump({k: v for k, v in RECIPE.items() if k != "stages"}))
    for arm, phi in (("off_policy_orpo", 0), ("on_policy_orpo", 1), ("mixed_policy_orpo", 0.5)):
        assert load_recipe(file, arm=arm, options=options)[0].pairs.phi_in(1) == phi
    assert load_recipe(file, arm="zero_shot_cot", options=options)[0].training.epochs == 0


@pytest.mark.parametrize("option", ["stages.dadop.training.epochs=2", "stages.dsft=2"])
def test_a_misspelt_stage_is_refused(file, option):
    with pytest.raises(BadInputError, match="is no stage, the recipe has those of dsft, dadpo"):
        load_recipe(file, [option])


def test_an_override_of_a_stage_needs_stages(file):
    file.write_text(yaml.safe_dump({k: v for k, v in RECIPE.items() if k != "stages"}))
    with pytest.raises(BadInputError, match="the recipe has none"):
        load_recipe(file, ["stages.dsft.training.epochs=2"])


def test_a_stage_without_epochs_leaves_no_student(file):
    with pytest.raises(BadInputError, match=r"before dadpo has training\.epochs=0"):
        load_recipe(file, ["stages.dsft.training.epochs=0"])


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
