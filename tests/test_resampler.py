"""Which traces the resampler makes an epoch's pairs of: with a full store, and no engine."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from cluster.config import parse_config
from cluster.publishing import publishing, read_published
from cluster.run_folder import RunFolder
from cluster.storage import location, read_parquet
from pipeline.resampler import MixedPolicyResampler
from pipeline.rows import Pair, Sample, from_table
from pipeline.sampling import plan_requests
from pipeline.store import SampleStore
from pipeline.tasks import user_message
from pipeline.traces import base_student, student, teacher

RIGHT, WRONG = "It is \\boxed{%s}.", "It is %d, so \\boxed{-1}."
UNPARSED = "I gave up after %d tries."
EXAMPLE = {"question": "How many are two pens?", "answer": "\\boxed{2}"}


@pytest.fixture
def resampler(tiny_llama, tmp_path, request):
    """A run whose teacher is right in every second sample, and whose student never is."""
    raw = {
        "run": {"folder": str(tmp_path / "run"), "store": str(tmp_path / "store")},
        "cluster": {"accelerator": "cpu"},
        "task": {"name": "word_problems", "train_prompts": 5},
        "teacher": {"model": str(tiny_llama), "few_shot": [EXAMPLE]},
        "student": {"model": str(tiny_llama)},
        "sampling": {"samples": 4, "max_new_tokens": 16, "max_rouge_l": 1},
        "pairs": request.param,
        "training": {"method": "orpo", "epochs": 3},
    }
    config = parse_config(raw, "test")
    resampler = MixedPolicyResampler(RunFolder(location(config.run.folder)), config)
    fill(resampler, teacher("teacher", config), right=True)
    fill(resampler, base_student(1, config), right=False)
    return resampler


def fill(resampler, source, right, otherwise=WRONG):
    writer = resampler._traces.writer(source)
    golds = {prompt.prompt_id: prompt.gold for prompt in resampler._prompts}
    store = SampleStore(location(resampler._config.run.store))
    for request in plan_requests(writer, resampler._prompts, 4, 0, source.first):
        index = request.sample_index
        text = RIGHT % golds[request.prompt_id] if right and index % 2 else otherwise % index
        row = (request.key, request.prompt_id, index, writer.weights.digest)
        store.write([Sample(*row, f"{source.name} {text}", "stop", 3)])


def pairs_of(resampler, epoch) -> list[Pair]:
    resampler.prepare_epoch(epoch)
    return from_table(Pair, read_published(resampler._run.pairs(epoch)))


@pytest.mark.parametrize("resampler", [{"phi": 0}], indirect=True)
def test_negatives_are_the_students(resampler):
    pairs = pairs_of(resampler, 1)
    assert len(pairs) == 5 * 2, "two right traces of each prompt"
    assert all(pair.chosen.startswith("teacher") for pair in pairs)
    assert all(pair.rejected.startswith("student_000") for pair in pairs)


@pytest.mark.parametrize("resampler", [{"phi": 0}], indirect=True)
def test_worked_examples_are_for_the_teacher_alone(resampler):
    writer, config = resampler._traces.writer, resampler._config
    assert len(writer(teacher("teacher", config)).few_shot) == 1
    assert writer(base_student(1, config)).few_shot == ()
    messages = {prompt.prompt_id: user_message(prompt) for prompt in resampler._prompts}
    pairs = pairs_of(resampler, 1)
    assert {pair.prompt_id: pair.prompt for pair in pairs} == messages


@pytest.mark.parametrize(
    ("resampler", "negatives"),
    [
        ({"phi": 0, "base": "fresh", "negatives": "wrong"}, 0),
        ({"phi": 0, "base": "fresh", "negatives": "wrong_or_unparsed"}, 10),
    ],
    indirect=["resampler"],
)
def test_unparsed_traces_are_negatives_where_the_recipe_says_so(resampler, negatives):
    fill(resampler, base_student(2, resampler._config), right=False, otherwise=UNPARSED)
    rejected = [pair.rejected for pair in pairs_of(resampler, 2)]
    assert len(rejected) == 5 * 2
    assert sum(text is not None for text in rejected) == negatives


@pytest.mark.parametrize("resampler", [{"phi_schedule": [0.5, 0.5, 0]}], indirect=True)
def test_each_epoch_goes_by_its_own_phi(resampler):
    """The third has students before it, whose traces nothing here could sample."""
    assert all(pair.rejected.startswith("student_000") for pair in pairs_of(resampler, 3))


@pytest.mark.parametrize("resampler", [{"phi": 0, "negatives_from": "teacher"}], indirect=True)
def test_negatives_may_be_the_teachers_wrong_traces(resampler, capsys):
    pairs = pairs_of(resampler, 2)
    assert "10 pairs, 10 from teacher\n" in capsys.readouterr().out
    assert len(pairs) == 5 * 2
    assert all(pair.rejected.startswith("teacher") for pair in pairs)
    assert all(pair.rejected.endswith("\\boxed{-1}.") for pair in pairs)
    assert not resampler._run.completions("student_000").exists(), "no student is sampled"


@pytest.mark.parametrize("resampler", [{"draw": "recent"}, {}], indirect=True)
def test_recent_asks_for_every_student_since_the_first_epoch(resampler, request):
    recent = resampler._config.pairs.draw == "recent"
    expected = ["student_002", "student_001"] if recent else ["student_002"]
    assert [source.name for source in resampler._later_students(3)] == expected


@pytest.mark.parametrize("resampler", [{"phi": 0, "base": "fresh"}], indirect=True)
def test_fresh_negatives_of_the_base_student_are_sampled_before_they_are_needed(resampler):
    fill(resampler, base_student(2, resampler._config), right=False)
    assert {pair.rejected for pair in pairs_of(resampler, 1)} <= {
        f"student_000 {WRONG % index}" for index in range(4)
    }
    resampler.sample_ahead(2)
    ahead = read_parquet(resampler._run.completions("base_002"))
    assert set(ahead["epoch"].to_pylist()) == {0}, "of the base student"
    assert {pair.rejected for pair in pairs_of(resampler, 2)} <= {
        f"base_002 {WRONG % index}" for index in range(4, 8)
    }
    resampler.sample_ahead(4)  # there is no fourth epoch
    assert not resampler._run.completions("base_004").exists()


@pytest.mark.fault
@pytest.mark.parametrize("resampler", [{}], indirect=True)
def test_traces_of_a_student_that_was_made_again_are_too(resampler, tiny_llama, capsys):
    run, source = resampler._run, student(1, resampler._config)
    for times in (1, 2):
        with publishing(run.checkpoint(1)) as folder:
            shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
            weights = load_file(folder / "model.safetensors")
            weights["model.norm.weight"] *= times  # the second time, another model
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        fill(resampler, source, right=False)
        keys = {trace.key for trace in resampler._traces.of(source)}
        assert len(keys) == 5 * 4
    assert "student_001.parquet is damaged: set aside" in capsys.readouterr().out


@pytest.mark.parametrize("resampler", [{"phi": 1, "base": "fresh"}], indirect=True)
def test_nothing_is_sampled_ahead_that_no_epoch_draws_from(resampler):
    resampler.sample_ahead(2)
    assert not resampler._run.completions("base_002").exists()
