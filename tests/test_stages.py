"""The stages of a run: how much there is to do, on what, how long, and for what money."""

import io

import pytest
from rich.console import Console

from cluster.speed import CORE, Span, Work, hours_between
from cluster.speed import GPU as GPU_SPEED
from pipeline.stages import costs_of, stage_table, stages_of
from pipeline.work import Sizes, count_steps, longest_batch, trained

GPU = {"cpus": 16, "memory_gib": 128, "gpus": 4, "gpu_memory_gib": 80}
SIZE = 494_032_768  # parameters of Qwen2.5 0.5B
HEAD = {"name": "head", "min_count": 1, "cpus": 8, "memory_gib": 32, "price_per_hour": 0.5}
LARGE = {"name": "large", **GPU, "max_count": 2, "price_per_hour": 8.0}


def stages(of):
    return {stage.name: stage for stage in stages_of(of)}


def test_each_stage_has_its_tokens(known):
    found = stages(known(training={"epochs": 3}, sampling={"samples": 4, "max_new_tokens": 100}))
    assert list(found) == ["sample the teacher", "sample students, 3 x", "train", "evaluate"]
    assert found["sample the teacher"].work(1.0).tokens == 100 * 4 * 100
    assert found["sample the teacher"].work(0.25).tokens == 100 * 4 * 25
    assert found["sample students, 3 x"].work(1.0).tokens == 3 * 100 * 4 * 100
    # Half of 400 traces are right: 200 pairs, 7 steps of 32 an epoch; a prompt is taken as 200.
    assert found["train"].work(1.0).tokens == 3 * 7 * 32 * (200 + 2 * 100)
    assert found["train"].work(1.0).training == 6 * found["train"].work(1.0).tokens * SIZE
    # Base and three students on 10 test prompts, those three on 10 of validation, the teacher once.
    assert found["evaluate"].work(1.0).tokens == (4 + 3 + 1) * 10 * 100


def test_a_stage_that_has_nothing_to_do_is_left_out(known):
    assert list(stages(known(training={"epochs": 0}))) == ["evaluate"]
    sft = {"training": {"method": "sft"}}
    assert list(stages(known(**sft))) == ["sample the teacher", "train", "evaluate"]
    scored = known(training={"method": "dadpo"}, pairs={"phi": 0})
    assert "score" in stages(scored)


def test_recomputed_activations_take_a_third_more(known):
    plain, recomputed = (
        trained(known(training={"gradient_checkpointing": on}).config, SIZES, SIZE, 1.0)
        for on in (False, True)
    )
    assert recomputed.training == pytest.approx(plain.training * 4 / 3)


SIZES = Sizes(train=1000, validation=0, test=10, prompt=50)


def test_rows_are_as_long_as_training_takes_them(known):
    options = {"training": {"max_length": 150}, "sampling": {"max_new_tokens": 120}}
    batch = longest_batch(known(**options).config, SIZES)
    assert (batch.rows, batch.tokens, batch.scored) == (4, 50 + 2 * 100, 2 * 100)
    whole = known(**options | {"training": {"max_length": 150, "nll_scope": "full"}})
    assert longest_batch(whole.config, SIZES).scored == 250
    alone = known(**options | {"training": {"max_length": 150, "method": "sft"}})
    assert longest_batch(alone.config, SIZES).tokens == 150


def test_steps_are_those_of_the_schedule(known):
    assert count_steps(known(training={"epochs": 2}).config, SIZES) == 2 * 125
    set_by_hand = {"epochs": 2, "steps_per_epoch": 7}
    assert count_steps(known(training=set_by_hand).config, SIZES) == 14


@pytest.mark.parametrize(("on_gpu", "speed"), [(True, GPU_SPEED), (False, CORE)])
def test_hours_span_short_and_long_traces_and_doubt(on_gpu, speed):
    def work(share):
        return Work(decoding=share * speed.decoding * 3600, training=2 * speed.training * 3600)

    decoding, training = hours_between(work, on_gpu)
    assert decoding == Span(0.25 / speed.factor, speed.factor)
    assert training == Span(2 / speed.factor, 2 * speed.factor)


def test_hours_are_shared_by_gpus_and_nodes_cost_while_they_are_up(known):
    of = known([HEAD, LARGE], training={"workers": 4}, engines={"max_engines": 4})
    found = stages(of)
    train = costs_of(found["train"], of)
    _, alone = hours_between(found["train"].work, on_gpu=True)
    assert train.hours.low == pytest.approx(alone.low / 4)
    # Four trainers fill one node, and a warm engine holds another; the head is up anyway.
    assert train.money.high == pytest.approx(train.hours.high * (0.5 + 2 * 8))
    sample = costs_of(found["sample the teacher"], of)
    assert sample.money.low == pytest.approx(sample.hours.low * (0.5 + 8))


def test_no_more_engines_count_than_find_room(known):
    few, many = (
        costs_of(stages(of)["sample the teacher"], of).hours.high
        for of in (known([LARGE], engines={"max_engines": count}) for count in (8, 100))
    )
    assert few == many


def test_what_is_not_known_is_not_told(known):
    unpriced = known([{"name": "all", **GPU}])
    costs = costs_of(stages(unpriced)["train"], unpriced)
    assert costs.hours is not None
    assert costs.money is None
    nowhere = known(nodes=(), cluster={"accelerator": "cpu"})
    assert costs_of(stages(nowhere)["train"], nowhere).hours is None
    on_gpus = known(nodes=())
    assert costs_of(stages(on_gpus)["train"], on_gpus).hours is not None


def shown(of):
    screen = Console(file=io.StringIO(), width=200)
    screen.print(stage_table(of))
    return screen.file.getvalue().splitlines()


def test_the_table_adds_up(known):
    head, *lines, total = shown(known([HEAD, LARGE], engines={"max_engines": 4}))
    assert head.split() == ["stage", "processes", "each", "tokens", "hours", "cost"]
    assert "1 to 4 engines" in lines[0]
    assert "1 CPU, 1 GPU of " in lines[0]
    highs = [float(line.split(" to ")[-2].split()[0]) for line in lines]
    assert float(total.split(" to ")[1].split()[0]) == pytest.approx(sum(highs), abs=0.03)
    assert "cost" not in shown(known())[0]
