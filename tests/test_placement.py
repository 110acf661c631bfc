"""Which nodes a stage may use: as users write it, as Ray takes it, and where it is refused."""

import pytest
from ray._private.label_utils import validate_label_selector

from cluster.config import parse_config, recipe_of
from cluster.errors import BadInputError
from cluster.placement import label_selector
from cluster.refusals import refuse_labels
from pipeline.engine import Weights
from pipeline.pool import _deployment
from training.stage import _scaling

WEIGHTS = Weights("org/model", "d1", "a1", "bfloat16")


def config(**cluster):
    raw = {
        "run": {"folder": "/runs/x"},
        "task": {"name": "gsm8k"},
        "teacher": {"model": "a"},
        "student": {"model": "b"},
        "cluster": cluster,
    }
    return parse_config(raw, "test")


@pytest.mark.parametrize(
    ("text", "selector"),
    [
        (None, {}),
        ("stage=training", {"stage": "training"}),
        ("ray.io/market-type!=spot, zone=a-1", {"ray.io/market-type": "!spot", "zone": "a-1"}),
    ],
)
def test_labels_are_what_ray_takes(text, selector):
    assert label_selector(text) == selector
    assert validate_label_selector(selector) is None


@pytest.mark.parametrize("text", ["", "training", "stage=", "stage==x", "stage=a,", "a=b,a=c"])
def test_anything_else_is_refused_with_the_option_and_the_form(text):
    with pytest.raises(
        BadInputError, match=r"cluster\.training_nodes=.* is not a list of labels: expected label="
    ):
        config(training_nodes=text)


def test_trainers_and_samplers_go_where_they_are_told():
    placed = config(training_nodes="stage=training", sampling_nodes="stage=sampling")
    assert _scaling(placed, on_gpu=True, workers=1).label_selector == {"stage": "training"}
    options = _deployment(placed, True, WEIGHTS).ray_actor_options
    assert options["label_selector"] == {"stage": "sampling"}
    assert options["num_gpus"] == 1


def test_by_default_they_go_anywhere():
    assert _scaling(config(), on_gpu=False, workers=1).label_selector is None
    assert "label_selector" not in _deployment(config(), False, WEIGHTS).ray_actor_options


def test_a_cluster_of_ones_own_has_no_labels_to_choose_by():
    refuse_labels(config())
    for option in ("training_nodes", "sampling_nodes"):
        with pytest.raises(BadInputError, match=rf"cluster\.{option}='stage=a', but .* no labels"):
            refuse_labels(config(**{option: "stage=a"}))


def test_where_a_run_works_is_no_part_of_its_recipe():
    assert recipe_of(config()) == recipe_of(config(training_nodes="a=b", sampling_nodes="a=c"))
