"""The miniature task, its worked solutions, and models that learn from nothing."""

from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from cluster import sections
from cluster.config import parse_config
from cluster.errors import BadInputError
from pipeline.answers import canonical_answer, grade
from pipeline.chat import Chat, load_chat
from pipeline.models import resolve_model
from pipeline.tasks import load_prompts, user_message
from pipeline.tasks.miniature import KINDS, draw_puzzle, put_in_words
from pipeline.tasks.solutions import solve
from pipeline.tasks.splits import part_of, problem_key
from training import miniature
from training.miniature import Cut, Recipe, careless, lessons, prepare_miniature
from training.scratch import Course, _batch, teach

PROJECT = Path(__file__).parents[1]
SECTION = sections.Task(name="miniature", train_prompts=60, validation_prompts=30, test_prompts=60)


@pytest.mark.parametrize("kind", KINDS)
def test_a_worked_solution_is_right_and_its_gold_is_canonical(kind):
    random = Random(1)
    for _ in range(300):
        puzzle = draw_puzzle(kind, random)
        prompt = put_in_words(puzzle, random)
        text = solve(puzzle, random)
        assert canonical_answer(prompt.gold, kind, prompt.choices) == prompt.gold
        assert grade(text, kind, prompt.gold, prompt.choices) == "right", (prompt, text)


@pytest.mark.parametrize("kind", KINDS)
def test_forgotten_carries_make_some_solutions_wrong_and_none_unparsed(kind):
    random = Random(1)
    verdicts = []
    for _ in range(300):
        puzzle = draw_puzzle(kind, random)
        prompt = put_in_words(puzzle, random)
        text = solve(puzzle, random, careless(0.6, random))
        verdicts.append(grade(text, kind, prompt.gold, prompt.choices))
    assert set(verdicts) == {"right", "wrong"}
    assert 30 < verdicts.count("wrong") < 250


def test_a_forgotten_carry_changes_the_tens_alone():
    forget = careless(1.0, Random(0))
    assert (forget(8, 9), forget(22, -9), forget(12, 5), forget(9, -9)) == (7, 23, 17, 0)


def test_parts_hold_all_kinds_alike_and_share_no_problem():
    parts = {split: load_prompts(SECTION, split, seed=3) for split in ("train", "test")}
    keys = {split: {problem_key(prompt) for prompt in found} for split, found in parts.items()}
    assert not keys["train"] & keys["test"]
    for found in parts.values():
        assert [prompt.kind for prompt in found] == list(KINDS) * 20
    assert parts["test"] == load_prompts(SECTION, "test", seed=3)
    assert parts["test"] != load_prompts(SECTION, "test", seed=4)


def test_data_is_refused(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "2 + 3?", "answer": "5"}')
    with pytest.raises(BadInputError, match=r"makes its problems itself: leave task\.data out"):
        load_prompts(SECTION.model_copy(update={"data": str(file)}), "train", seed=0)


def test_lessons_are_of_train_problems_alone():
    shown = {message for message, _ in islice(lessons(seed=7), 300)}
    for split in ("validation", "test"):
        for prompt in load_prompts(SECTION, split, seed=0):
            assert part_of(problem_key(prompt)) == split
            assert user_message(prompt) not in shown


@pytest.fixture
def small(monkeypatch):
    """Recipes as those that are shipped, of models that learn next to nothing."""
    course = Course(steps=12, batch=4, learning_rate=5e-3)
    recipes = {
        "miniature-teacher": Recipe("llama", hidden=64, mlp=128, course=course, seed=0, layers=1),
        "miniature-qwen3": Recipe("qwen3", hidden=64, mlp=128, course=course, seed=2, layers=1),
        "miniature-pruned": Cut("miniature-teacher", ratio=0.2),
    }
    monkeypatch.setattr(miniature, "MINIATURES", recipes)
    monkeypatch.setattr(miniature, "_TOKENIZER_LESSONS", 300)
    monkeypatch.setattr(miniature, "_CALIBRATION_LESSONS", 4)


def test_a_miniature_is_an_ordinary_model_that_is_made_once(small, tmp_path, monkeypatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    threads = torch.get_num_threads()
    folders = {name: prepare_miniature(name) for name in miniature.MINIATURES}
    torch.set_num_threads(threads)
    for name, folder in folders.items():
        assert resolve_model(name) == folder == tmp_path / "models" / name
        chat = load_chat(folder)
        question, answer = next(lessons(seed=5))
        assert chat.tokenizer.decode(chat.response_ids(answer, finished=False)) == answer
        pieces = chat.tokenizer.tokenize("Tom has 19 pens.")
        assert any("19" in piece for piece in pieces), "not the tokenizer that it learned with"
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.generation_config.eos_token_id == chat.end_of_turn_id
        assert model(torch.tensor([chat.prompt_ids(question)])).logits.isfinite().all()
    sizes = {
        name: AutoModelForCausalLM.from_pretrained(folder).num_parameters()
        for name, folder in folders.items()
    }
    assert sizes["miniature-pruned"] < 0.85 * sizes["miniature-teacher"]
    before = {name: (folder / "model.safetensors").stat() for name, folder in folders.items()}
    for name, folder in folders.items():
        assert prepare_miniature(name) == folder
        assert (folder / "model.safetensors").stat().st_mtime_ns == before[name].st_mtime_ns


def test_pruning_wants_its_parent_first(small, tmp_path, monkeypatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    with pytest.raises(BadInputError, match=r"prepare that first \(potstill models prepare minia"):
        prepare_miniature("miniature-pruned")


def test_the_same_lessons_teach_the_same(tiny_llama):
    def taught(steps):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        losses = []
        course = Course(steps=steps, batch=4, learning_rate=3e-3)
        teach(model, load_chat(tiny_llama), lessons(seed=1), course, losses.append)
        return model, losses

    (first, losses), (second, again) = taught(8), taught(8)
    assert losses == again
    assert losses[-1] < 0.95 * losses[0]
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_only_answers_are_learned(tiny_llama):
    chat: Chat = load_chat(tiny_llama)
    ids, labels = _batch(chat, [("Hi?", "8"), ("How many pens?", "3 + 5 = 8.")])
    for row, (message, answer) in enumerate([("Hi?", "8"), ("How many pens?", "3 + 5 = 8.")]):
        learned = labels[row][labels[row] != -100].tolist()
        assert learned == chat.response_ids(answer, finished=True)
        prompt = chat.prompt_ids(message)
        assert ids[row][: len(prompt)].tolist() == prompt
        assert (labels[row][: len(prompt)] == -100).all()


def test_the_shipped_table_is_of_shipped_models():
    for name in ("miniature", "miniature_dadpo"):
        raw = yaml.safe_load((PROJECT / "configs" / f"{name}.yaml").read_text())
        for role in ("teacher", "student"):
            assert raw[role]["model"] in miniature.MINIATURES
        raw.pop("stages", None)
        assert parse_config(raw, name).task.name == "miniature"
