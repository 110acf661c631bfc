"""Real rows of the five data sets; POTSTILL_DATA names the folder that has a folder for each."""

import os
from collections import Counter
from pathlib import Path

import pytest

from cluster.sections import Task as Section
from pipeline.answers import grade
from pipeline.rows import Prompt
from pipeline.tasks import load_prompts, user_message
from pipeline.tasks.splits import problem_key

DATA = Path(
    os.environ.get("POTSTILL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets at {DATA}")

# Prompts of train and validation together where both are files, and how many of them are left out:
# seven repeat another part's problem, one has a control character for a dash.
SIZES = {
    "gsm8k": (7473, 0),
    "arc_challenge": (1119 + 299, 1),
    "openbookqa": (4957 + 500, 7),
    "strategyqa": (2061, 0),
    "medqa": (2696 + 1272, 0),
}


def load(name: str, split="all") -> list[Prompt]:
    return load_prompts(Section(name=name, data=str(DATA / name)), split, seed=0)


@pytest.mark.parametrize("name", SIZES)
def test_every_row_is_read_into_parts_that_share_no_problem(name):
    rows, left_out = SIZES[name]
    parts = [load(name, split) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(load(name)) == rows - left_out
    keys = [{problem_key(prompt) for prompt in part} for part in parts]
    assert all(keys)
    assert len(set.union(*keys)) == sum(map(len, keys))


@pytest.mark.parametrize("name", SIZES)
def test_every_gold_is_right_and_unparsed_without_its_box(name):
    for prompt in load(name):
        right = f"So it is \\boxed{{{prompt.gold}}}."
        assert grade(right, prompt.kind, prompt.gold, prompt.choices) == "right"
        assert grade(prompt.gold, prompt.kind, prompt.gold, prompt.choices) == "unparsed"


@pytest.mark.parametrize("name", ["arc_challenge", "openbookqa", "medqa"])
def test_an_options_own_text_stands_for_its_label(name):
    """Except for the few texts that are another label, or that two options share."""
    verdicts: Counter[str] = Counter()
    for prompt in load(name):
        assert prompt.choices is not None
        box = f"\\boxed{{{prompt.choices[prompt.gold]}}}"
        verdicts[grade(box, prompt.kind, prompt.gold, prompt.choices)] += 1
        labelled = f"\\boxed{{{prompt.gold}. {prompt.choices[prompt.gold]}}}"
        assert grade(labelled, prompt.kind, prompt.gold, prompt.choices) == "right"
        assert user_message(prompt).count("\n") >= len(prompt.choices) + 2
    assert verdicts["right"] >= 0.99 * verdicts.total(), verdicts


def test_the_quirks_that_are_known():
    arc, medqa, gsm8k = load("arc_challenge"), load("medqa"), load("gsm8k")
    assert {len(prompt.choices or ()) for prompt in arc} == {3, 4, 5}
    assert {"1", "A"} <= {label for prompt in arc for label in prompt.choices or ()}
    options = [text for prompt in medqa for text in (prompt.choices or {}).values()]
    assert not [text for text in options if text != text.strip() or "\n" in text or '"""' in text]
    assert "109200000" in {prompt.gold for prompt in gsm8k}
    assert any("\u2028" in prompt.question for prompt in gsm8k)
