"""What only a GPU shows: a whole run on the accelerator that is there. Not yet run on one.

sh requirements/install.sh gpu dev && .venv/bin/pytest tests/gpu
"""

import os

import pytest
import torch

from tests.integration.runs import go, write_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]


@pytest.fixture(autouse=True)
def a_gpu():
    if not torch.cuda.is_available() and "CI" not in os.environ:
        pytest.skip("this machine has no GPU")


def test_a_run_on_a_gpu_learns_and_serves(guesser, free_port, tmp_path):
    recipe = write_recipe(tmp_path, guesser, free_port())
    ended = go(recipe, ["cluster.accelerator=gpu", "training.precision=bf16"])
    assert ended.code == 0, ended.screen
    losses = [*recipe.losses(1).values(), *recipe.losses(2).values()]
    assert sum(losses[-100:]) < sum(losses[:100])
    assert {"base_test", "teacher_test", "student-epoch-2_test"} <= recipe.evaluated()
