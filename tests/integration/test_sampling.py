"""Sampling with the real engines: Ray, Ray Data, Ray Serve and vLLM on a CPU, on tiny models."""

import json
import threading
import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml

from cluster.config import RunConfig, parse_config
from cluster.errors import BadInputError, RunError
from cluster.publishing import discard_folder
from cluster.run_folder import open_run
from cluster.session import ray_session, result_of
from cluster.storage import location, read_table
from pipeline.fan_out import through_engines
from pipeline.models import model_digest
from pipeline.pool import ensure_engines, release_engines
from pipeline.resampler import MixedPolicyResampler, start_resampler
from pipeline.rows import Pair, Sample, from_table
from pipeline.sampling import AskEngines, make_writer, sample
from pipeline.scoring import Answered, ScoreByEngines, score
from pipeline.store import SampleStore, ScoreStore
from pipeline.tasks import load_prompts
from tests.integration.runs import SHOT, write_problems

pytestmark = pytest.mark.integration

PROMPTS = 6
PROBLEMS = {"train": 30, "validation": 2, "test": 2}


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_llama):
    folder = tmp_path_factory.mktemp("sampling")
    return parse_config(
        {
            "run": {"folder": str(folder / "run"), "store": str(folder / "store")},
            "task": {"name": "word_problems", "train_prompts": PROMPTS},
            "teacher": {"model": str(tiny_llama)},
            "student": {"model": str(tiny_llama)},
            "sampling": {"samples": 3, "max_new_tokens": 16},
            "engines": {
                "max_model_len": 512,
                "kv_cache_gib": 0.2,
                "enforce_eager": True,
                "batch_rows": 4,
                "pool": "tests",
            },
            "serving": {"max_model_len": 512, "port": 18231},
        },
        "test",
    )


@pytest.fixture(scope="module")
def session(config):
    with ray_session(config):
        yield
        release_engines(config)


@pytest.fixture(scope="module")
def prompts(config):
    return load_prompts(config.task, "train", 0)


@pytest.fixture
def store(tmp_path):
    return SampleStore(location(str(tmp_path / "store")))


def writer(config, folder, prompts):
    return make_writer("student", str(folder), config.student, config, prompts[0].kind)


def by_key(samples: list[Sample]) -> dict[str, Sample]:
    return {row.key: row for row in samples}


def running_engines():
    processes = psutil.Process().children(recursive=True)
    return {process for process in processes if "EngineCore" in " ".join(process.cmdline())}


def stored_keys(store: Path) -> list[str]:
    """Keys of the samples in a store, as often as they are there."""
    tables = [read_table(location(str(file))) for file in store.rglob("*.parquet")]
    return [key for table in tables for key in table["key"].to_pylist()]


def kill_those_named(name: str) -> int:
    """Kill the processes with `name` in their command; how many there were."""
    victims = [
        process
        for process in psutil.Process().children(recursive=True)
        if name in " ".join(process.cmdline())
    ]
    for process in victims:
        process.kill()
    return len(victims)


def kill_once_under_way(name: str, under_way: Callable[[], object]) -> threading.Thread:
    """Kill the processes with `name` in their command as soon as `under_way` holds.

    Where there are none it goes on looking for them, so that the thread that it gives never ends.
    """

    def kill() -> None:
        while not (under_way() and kill_those_named(name)):
            time.sleep(0.02)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


def with_options(config, **sections):
    raw = config.model_dump(mode="json")
    for section, options in sections.items():
        raw[section] = {**raw[section], **options}
    return parse_config(raw, "test")


@pytest.mark.usefixtures("session")
def test_samples_are_keyed_seeded_and_never_drawn_twice(
    config, tiny_llama, prompts, store, tmp_path
):
    student = writer(config, tiny_llama, prompts)
    first = sample(student, prompts, config, store, on_gpu=False)
    assert len(by_key(first)) == PROMPTS * 3
    assert {row.error for row in first} == {None}
    assert {row.prompt_id for row in first} == {prompt.prompt_id for prompt in prompts}
    assert len({row.text for row in first}) > PROMPTS  # the K samples of a prompt differ

    files = set((tmp_path / "store").rglob("*.parquet"))
    assert by_key(sample(student, prompts, config, store, on_gpu=False)) == by_key(first)
    assert set((tmp_path / "store").rglob("*.parquet")) == files

    # Other batches and another order give the same texts: the seed is the sample's own.
    elsewhere = SampleStore(location(str(tmp_path / "elsewhere")))
    sample(student, prompts[1:2], config, elsewhere, on_gpu=False)
    again = sample(student, prompts[::-1], config, elsewhere, on_gpu=False)
    assert {key: row.text for key, row in by_key(again).items()} == {
        key: row.text for key, row in by_key(first).items()
    }


@pytest.mark.usefixtures("session")
def test_a_router_is_there_before_threads_share_it(config, tiny_llama, prompts):
    weights = writer(config, tiny_llama, prompts).weights
    # As Ray Data brings it to its workers; else threads make a router each, and none counts right.
    handle = copy(ensure_engines(config, weights, on_gpu=False))
    assert not handle.is_initialized
    assert ScoreByEngines(copy(handle), "", None, 1)._handle.is_initialized
    assert AskEngines(copy(handle), "", None, None, 1)._handle.is_initialized


@pytest.mark.usefixtures("session")
def test_an_error_of_ours_comes_back_from_ray_data_as_itself(config, prompts):
    class Fails:
        def __call__(self, batch):
            try:
                raise OSError("no space left")
            except OSError as error:
                raise RunError("the store cannot be written") from error

    with pytest.raises(RunError, match=r"^the store cannot be written$"):
        list(through_engines(prompts, Fails, (), config.engines))


@pytest.mark.usefixtures("session")
def test_engines_that_find_no_room_are_told_with_what_there_is(config, tiny_llama, prompts, store):
    room = {"pool": "roomless", "cpus_per_engine": 100, "start_timeout_s": 5}
    large = with_options(config, engines=room)
    told = r"after at most 5 s: .*Asked for 1 x .*'num_cpus': 100.*; the cluster has .*'CPU': 8"
    with pytest.raises(RunError, match=told):
        sample(writer(large, tiny_llama, prompts), prompts, large, store, on_gpu=False)
    release_engines(large)


@pytest.mark.usefixtures("session")
def test_a_larger_k_samples_only_what_is_missing(config, tiny_llama, prompts, store):
    student = writer(config, tiny_llama, prompts)
    few = by_key(sample(student, prompts[:2], config, store, on_gpu=False))
    more = with_options(config, sampling={"samples": 5})
    many = by_key(sample(student, prompts[:2], more, store, on_gpu=False))
    assert len(many) == 10
    assert few.items() <= many.items()


@pytest.mark.usefixtures("session")
def test_a_prompt_too_long_is_a_row_with_its_error(config, tiny_llama, prompts, store):
    long = replace(prompts[0], prompt_id="long", question="many words " * 400)
    tolerant = with_options(config, sampling={"max_error_share": 0.5})
    student = writer(config, tiny_llama, prompts)
    rows = sample(student, [*prompts[:2], long], tolerant, store, on_gpu=False)
    assert [row.prompt_id for row in rows if row.error] == ["long"] * 3
    assert "leaves room for" in next(row.error for row in rows if row.error)
    with pytest.raises(RunError, match=r"3 of 9 samples failed.*max_error_share=0.01"):
        sample(student, [*prompts[:2], long], config, store, on_gpu=False)


@pytest.mark.usefixtures("session")
def test_the_resampler_goes_on_from_files_alone(config, monkeypatch):
    # A tiny random model is never right, so the verdicts are set by hand here.
    monkeypatch.setattr(
        "pipeline.verdicts.exact.grade", lambda text, *_: "right" if len(text) % 2 else "wrong"
    )
    run = open_run(config)
    counts = MixedPolicyResampler(run, config).prepare_epoch(1)
    pairs = from_table(Pair, read_table(run.pairs(1)))
    assert counts["pairs"] == len(pairs) > 0
    assert {pair.rejected_epoch for pair in pairs} <= {0, None}
    assert all("boxed" in pair.prompt for pair in pairs)  # the prompt with its instruction
    recorded = (run.root / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in recorded] == ["sample", "sample", "pairs"]

    # Another resampler finds the pairs there, and samples nothing.
    assert MixedPolicyResampler(run, config).prepare_epoch(1) == counts
    assert (run.root / "metrics.jsonl").read_text().splitlines() == recorded
    assert yaml.safe_load(run.config_file.read_text())["sampling"]["samples"] == 3

    # Other prompts at the same place are not mixed with the traces of the old ones.
    discard_folder(run.pairs(1))
    monkeypatch.setattr(
        "pipeline.resampler.load_prompts", lambda *_: load_prompts(config.task, "train", 1)
    )
    with pytest.raises(BadInputError, match=r"teacher\.parquet was sampled from other data"):
        MixedPolicyResampler(run, config).prepare_epoch(1)


@pytest.mark.usefixtures("session")
def test_a_teacher_behind_an_endpoint_is_asked_from_the_cluster(
    config, tiny_llama, prompts, chat_server, tmp_path, monkeypatch
):
    def works_it_out(body):
        (prompt,) = [p for p in prompts if p.question in body["messages"][-1]["content"]]
        return f"I count to {prompt.gold}. The answer is \\boxed{{{prompt.gold}}}."

    server = chat_server(works_it_out)
    monkeypatch.setenv("MY_TEACHERS_KEY", "secret")  # after Ray has started
    theirs = with_options(
        config,
        run={"folder": str(tmp_path / "run")},
        teacher={"model": "big", "endpoint": {"url": server.url, "api_key_env": "MY_TEACHERS_KEY"}},
        pairs={"negatives": "wrong_or_unparsed"},
    )
    run = open_run(theirs)
    resampler = start_resampler(run, theirs, board=None)
    counts = result_of(resampler.prepare_epoch.remote(1))
    assert counts["prompts_with_pairs"] == PROMPTS
    assert len(server.bodies) == PROMPTS * 3
    assert set(server.keys) == {"Bearer secret"}
    pairs = from_table(Pair, read_table(run.pairs(1)))
    gold = {prompt.prompt_id: prompt.gold for prompt in prompts}
    assert all(f"boxed{{{gold[pair.prompt_id]}}}" in pair.chosen for pair in pairs)
    assert {pair.rejected_model for pair in pairs} == {model_digest(tiny_llama)}


@pytest.fixture(scope="module")
def changed(tiny_llama, tmp_path_factory):
    """A folder with other weights of the same architecture."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("changed")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("session")
def test_two_processes_that_share_a_model_answer_as_one(
    config, tiny_llama, changed, prompts, tmp_path
):
    texts = {}
    for processes in (1, 2):
        split = with_options(
            config,
            student={"dtype": "float32"},
            sampling={"temperature": 0, "samples": 1},
            engines={"tensor_parallel": processes, "pool": f"split in {processes}"},
        )
        store = SampleStore(location(str(tmp_path / str(processes))))
        for model in (tiny_llama, changed):  # the second is taken up by the engine of the first
            student = writer(split, model, prompts)
            rows = sample(student, prompts, split, store, on_gpu=False)
            texts[processes, model] = {row.key: row.text for row in rows}
        release_engines(split)
    for model in (tiny_llama, changed):
        assert texts[1, model] == texts[2, model]
    assert set(texts[2, tiny_llama].values()) != set(texts[2, changed].values())


@pytest.mark.usefixtures("session")
def test_a_warm_engine_takes_new_weights(config, tiny_llama, changed, tmp_path, prompts, store):
    old, new = writer(config, tiny_llama, prompts), writer(config, changed, prompts)
    assert old.weights.architecture == new.weights.architecture
    before = sample(old, prompts, config, store, on_gpu=False)
    engines = running_engines()
    after = sample(new, prompts, config, store, on_gpu=False)
    assert {row.model for row in after} == {new.weights.digest}
    assert {row.key for row in before}.isdisjoint(row.key for row in after)
    assert {row.text for row in before} != {row.text for row in after}
    # Back to the old weights: the same seeds give the same texts as before.
    fresh = SampleStore(location(str(tmp_path / "fresh")))
    back = by_key(sample(old, prompts, config, fresh, on_gpu=False))
    assert len(engines) == 1
    assert running_engines() == engines, "the engine was started anew"
    # A fresh engine with the new weights writes the same texts as the warm one did.
    release_engines(config)
    again = SampleStore(location(str(tmp_path / "again")))
    anew = by_key(sample(new, prompts, config, again, on_gpu=False))
    assert {key: row.text for key, row in anew.items()} == {
        key: row.text for key, row in by_key(after).items()
    }
    assert {key: row.text for key, row in back.items()} == {
        key: row.text for key, row in by_key(before).items()
    }


@pytest.mark.fault
@pytest.mark.long
@pytest.mark.parametrize("killed", ["EngineCore", "ServeReplica:potstill-sampler"])
@pytest.mark.usefixtures("session")
def test_an_engine_that_dies_in_the_midst_of_a_batch_loses_nothing(
    killed, config, tiny_llama, prompts, tmp_path, measured
):
    many = with_options(config, sampling={"samples": 20, "max_new_tokens": 100})
    student = writer(many, tiny_llama, prompts)
    stores = [SampleStore(location(str(tmp_path / name))) for name in ("calm", "disturbed")]
    folder = tmp_path / "disturbed"
    started = time.monotonic()
    calm = by_key(sample(student, prompts, many, stores[0], on_gpu=False))
    middle = time.monotonic()
    killing = kill_once_under_way(killed, lambda: [*folder.rglob("*.parquet.ok")])
    disturbed = by_key(sample(student, prompts, many, stores[1], on_gpu=False))
    longer = time.monotonic() - middle - (middle - started)
    measured(f"{killed} killed: sampling took {longer:.0f} s longer")
    killing.join(1)
    assert not killing.is_alive()
    assert sorted(stored_keys(folder)) == sorted(calm), "a sample is lost, or there twice"
    assert {key: row.text for key, row in disturbed.items()} == {
        key: row.text for key, row in calm.items()
    }


def guessing(config: RunConfig, guesser: Path, folder: Path) -> RunConfig:
    """A run on problems whose answers its models guess."""
    folder.mkdir()
    task = {"name": "gsm8k", "data": str(write_problems(folder / "data", PROBLEMS))}
    raw = config.model_dump(mode="json") | {
        "run": {"folder": str(folder / "run"), "store": str(folder / "store")},
        "task": task,
        "teacher": {"model": str(guesser), "few_shot": [SHOT]},
        "student": {"model": str(guesser)},
    }
    return with_options(parse_config(raw, "test"), sampling={"samples": 8, "max_new_tokens": 40})


@pytest.mark.fault
@pytest.mark.long
@pytest.mark.usefixtures("session")
def test_a_resampler_that_is_killed_makes_the_same_pairs(config, guesser, tmp_path, measured):
    calm, disturbed = (guessing(config, guesser, tmp_path / name) for name in ("calm", "disturbed"))
    store = tmp_path / "disturbed" / "store"
    killing = kill_once_under_way(
        "ray::MixedPolicyResampler", lambda: [*store.rglob("*.parquet.ok")]
    )
    tables, took = [], []
    for one in (calm, disturbed):
        run, began = open_run(one), time.monotonic()
        assert result_of(start_resampler(run, one, board=None).prepare_epoch.remote(1))["pairs"]
        tables.append(read_table(run.pairs(1)))
        took.append(time.monotonic() - began)
    assert not killing.is_alive()
    measured(f"resampler killed: pairs took {took[1] - took[0]:.0f} s longer")
    assert tables[0].equals(tables[1])
    keys = stored_keys(store)
    assert len(keys) == len(set(keys)) == 2 * PROBLEMS["train"] * 8


ANSWERS = [
    Answered("Tom has 3 pens. How many?", "He has 3. The answer is \\boxed{3}.", True),
    Answered("Tom has 3 pens. How many?", "He has 3 and", False),
    Answered("Anna had 9 apples.", "So Anna gave 4 away. " * 6, True),
]


def test_engines_and_a_forward_pass_agree_on_scores(session, config, tiny_llama, prompts, tmp_path):
    section = config.student.model_copy(update={"dtype": "float32"})
    reader = make_writer("student", str(tiny_llama), section, config, "number")
    found = {}
    for engine in ("vllm", "forward"):
        store = ScoreStore(location(str(tmp_path / engine)))
        chosen = with_options(config, scoring={"engine": engine})
        found[engine] = score(reader, ANSWERS, chosen, store, on_gpu=False)
        assert len(store.keys(reader.weights.digest)) == len(ANSWERS)
    for text in ANSWERS:
        by_engine, by_pass = found["vllm"][text], found["forward"][text]
        assert by_engine.key == by_pass.key, "either may answer for the other"
        assert by_engine.tokens == by_pass.tokens
        assert by_engine.logp == pytest.approx(by_pass.logp, abs=2e-3)
