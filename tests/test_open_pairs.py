"""From prompts without gold answers to pairs: the resampler over a full store, no engine."""

import json

import pytest

from cluster.config import RunConfig, parse_config
from cluster.run_folder import RunFolder
from cluster.storage import location
from pipeline.resampler import MixedPolicyResampler
from pipeline.rows import Sample
from pipeline.sampling import make_writer, plan_requests
from pipeline.store import SampleStore
from pipeline.tasks import load_prompts

IS_CALM = (
    "def is_calm(answer, prompt):\n    return '!' not in answer and prompt['kind'] == 'open'\n"
)


@pytest.fixture
def resampler_of(tmp_path, tiny_llama, tiny_gemma):
    """A resampler of greedy chats whose models have answered: the teacher calmly but once."""
    rows = [{"prompt": f"Tom has {n} pens. Tell me of him."} for n in range(40)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.py").write_text(IS_CALM)

    def make(verdict=None) -> MixedPolicyResampler:
        raw = {
            "run": {"folder": str(tmp_path / "run"), "store": str(tmp_path / "store")},
            "task": {
                "name": "chat",
                "data": str(tmp_path / "chats.jsonl"),
                "train_prompts": 4,
                "verdict": verdict,
            },
            "teacher": {"model": str(tiny_gemma)},
            "student": {"model": str(tiny_llama)},
            "cluster": {"accelerator": "cpu"},
            "sampling": {"samples": 1, "temperature": 0, "max_new_tokens": 16},
        }
        config = parse_config(raw, "test")
        answer(config, "teacher", ["He is well.", "He writes.", "Pens!", ""])
        answer(config, "student", ["Pens!", "pens pens", "Calmly.", "Tom! Tom!"])
        return MixedPolicyResampler(RunFolder(location(config.run.folder)), config)

    return make


def answer(config: RunConfig, name: str, texts: list[str]) -> None:
    section = config.teacher if name == "teacher" else config.student
    writer = make_writer(name, section.model, section, config, "open")
    prompts = load_prompts(config.task, "train", config.run.seed)
    requests = plan_requests(writer, prompts, 1, config.run.seed)
    SampleStore(location(config.run.store)).write(
        Sample(request.key, request.prompt_id, 0, writer.weights.digest, text, "stop", 3)
        for request, text in zip(requests, texts, strict=True)
    )


def pairs_of(resampler: MixedPolicyResampler) -> set[tuple[str, str | None]]:
    pairs = resampler._draw_pairs(1)
    assert all(pair.prompt.endswith("Tell me of him.") for pair in pairs)
    return {(pair.chosen, pair.rejected) for pair in pairs}


def test_without_a_verdict_the_teacher_is_chosen_and_the_student_rejected(resampler_of):
    assert pairs_of(resampler_of()) == {
        ("He is well.", "Pens!"),
        ("He writes.", "pens pens"),
        ("Pens!", "Calmly."),
    }


def test_with_a_verdict_right_answers_are_chosen_and_wrong_ones_rejected(resampler_of, tmp_path):
    verdict = {"by": "function", "function": f"{tmp_path / 'mine.py'}:is_calm"}
    assert pairs_of(resampler_of(verdict)) == {
        ("He is well.", "Pens!"),
        ("He writes.", None),
    }
