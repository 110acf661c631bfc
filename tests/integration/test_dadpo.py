"""daDPO as a user runs it: dSFT, then preference from that model, in one command and two stages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.models import model_digest

pytestmark = pytest.mark.integration

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe(guesser, free_port, tmp_path_factory):
    home = tmp_path_factory.mktemp("dadpo")
    model = {"model": str(guesser), "dtype": "float32"}
    (home / "data").mkdir()
    for split, first, count in (("train", 0, 16), ("validation", 100, 4), ("test", 200, 6)):
        rows = [
            {"question": f"Tom has {n} pens. How many pens?", "answer": f"#### {'38'[n % 2]}"}
            for n in range(first, first + count)
        ]
        (home / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "run": {"folder": str(home / "run"), "store": str(home / "store")},
        "task": {"name": "gsm8k", "data": str(home / "data")},
        "teacher": model,
        "student": model,
        "sampling": {"samples": 4, "max_new_tokens": 40, "max_rouge_l": 0.99},
        "training": {
            "epochs": 1,
            "learning_rate": 3e-4,
            "global_batch": 4,
            "micro_batch": 4,
            "max_length": 256,
            "precision": "fp32",
        },
        "engines": {"max_model_len": 256, "kv_cache_gib": 0.2, "enforce_eager": True},
        "serving": {"max_model_len": 256, "port": free_port()},
        "evaluation": {"through": "engines"},
        "stages": {
            "dsft": {"training": {"method": "sft"}},
            "dadpo": {"training": {"method": "dadpo", "steps_per_epoch": 5}},
        },
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return home / "recipe.yaml"


def run(recipe: Path) -> str:
    ended = subprocess.run(
        [sys.executable, "potstill.py", "run", str(recipe)],
        cwd=PROJECT,
        env={**os.environ, "POTSTILL_CACHE": str(recipe.parent / "cache")},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def screen(recipe):
    return run(recipe)


def keys(recipe: Path, kind: str) -> list[str]:
    files = (recipe.parent / "store" / kind).rglob("*.parquet")
    return [key for file in files for key in pq.read_table(file)["key"].to_pylist()]


def steps(recipe: Path, stage: str) -> list[dict]:
    lines = (recipe.parent / "run" / stage / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["stage"] == "train"]


def test_both_stages_end_with_a_table(screen):
    assert screen.count("\nafter epoch 1 *") == 2, screen
    for reader in ("reference", "teacher"):
        assert f"scoring by {reader}" in screen, screen


def test_negatives_are_the_original_students(screen, recipe):
    pairs = pq.read_table(recipe.parent / "run/dadpo/pairs/epoch_001/pairs.parquet").to_pylist()
    teacher = {pair["chosen_model"] for pair in pairs}
    assert {pair["rejected_model"] for pair in pairs} <= teacher | {None}, "one model was both"
    assert any(pair["rejected"] for pair in pairs)


def test_the_second_stage_starts_from_the_firsts_student_as_reference(screen, recipe):
    scores = pq.read_table(recipe.parent / "run/dadpo/scores/epoch_001.parquet").to_pylist()
    readers = {row["reader"]: row["model"] for row in scores}
    learned = model_digest(recipe.parent / "run/dsft/checkpoints/epoch_001")
    assert readers["reference"] == learned != readers["teacher"]
    first, *_ = taken = steps(recipe, "dadpo")
    assert len(taken) == 5
    # The policy is its own reference before the first step, so only the teacher's part is there.
    assert abs(first["margin"]) <= first["teacher_term"] + 1e-3


def test_nothing_is_sampled_or_scored_twice_when_it_is_run_again(screen, recipe):
    before = {kind: sorted(keys(recipe, kind)) for kind in ("samples", "scores")}
    assert all(len(found) == len(set(found)) for found in before.values())
    again = run(recipe)
    assert again.count("nothing to train") == 2
    assert {kind: sorted(keys(recipe, kind)) for kind in before} == before
