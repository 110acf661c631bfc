"""Estimates of memory: near to what was measured, and moving the way that the parts do."""

import pytest

from benchmarks.memory_cases import CASES, read_measured
from cluster.memory import GIB, Batch, engine_memory, trainer_memory
from cluster.sections import Engines, Training
from cluster.shapes import ModelShape, read_shape

BATCH = Batch(rows=2, tokens=100, scored=50)
MEASURED = read_measured()


@pytest.fixture
def shape(tiny_llama):
    return read_shape(tiny_llama)


def test_every_case_was_measured():
    assert len(MEASURED) == 9
    assert MEASURED.keys() == {case.name for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_estimate_is_near_to_what_was_measured(case):
    found = MEASURED[case.name]
    shape = ModelShape(**found["shape"])
    assert shape.parameters > 1e8
    assert case.estimate(shape).host_gib * GIB == pytest.approx(found["peak"], rel=0.2)


def test_an_engine_holds_its_cache(shape):
    def needed(cache):
        return engine_memory(shape, "bfloat16", Engines(kv_cache_gib=cache), on_gpu=False)

    assert needed(3).host_gib - needed(1).host_gib == pytest.approx(2)


def test_an_engine_on_a_gpu_holds_its_share_of_the_weights(shape):
    def weights(processes):
        engines = Engines(tensor_parallel=processes)
        return engine_memory(shape, "float32", engines, on_gpu=True).gpu["weights"]

    assert weights(1) == 4 * shape.parameters
    assert weights(4) == shape.parameters


def trainer(shape, on_gpu=False, batch=BATCH, **options):
    return trainer_memory(shape, Training(global_batch=8, **options), batch, on_gpu)


@pytest.mark.parametrize(
    ("stage", "shared"), [(1, {"optimizer"}), (2, {"optimizer", "gradients"})], ids=str
)
def test_zero_shares_states_over_the_workers(shape, stage, shared):
    plain = trainer(shape, workers=2, batch=Batch(4, 2000, 1000)).host
    sharded = trainer(shape, workers=2, zero_stage=stage, batch=Batch(4, 2000, 1000)).host
    halved = {name for name in plain.keys() & sharded if sharded[name] == plain[name] / 2}
    assert halved == shared
    third = trainer(shape, workers=2, zero_stage=3, batch=Batch(4, 2000, 1000)).host
    assert third["weights"] == shape.parameters, "half of two bytes each"
    elastic = trainer(shape, workers=4, min_workers=2, zero_stage=3, batch=Batch(4, 2000, 1000))
    assert elastic.host == third, "the fewest workers share them"


def test_states_are_those_of_adamw(shape):
    mixed, plain = trainer(shape).host, trainer(shape, precision="fp32").host
    assert mixed["weights"] == mixed["gradients"] == 2 * shape.parameters
    assert mixed["optimizer"] == 12 * shape.parameters, "two moments and a copy in float32"
    assert plain["weights"] == plain["gradients"] == 4 * shape.parameters
    assert plain["optimizer"] == 8 * shape.parameters


def test_what_is_offloaded_leaves_the_gpu(shape):
    here = trainer(shape, True, zero_stage=3)
    moved = trainer(shape, True, zero_stage=3, offload="optimizer")
    assert "optimizer" in here.gpu
    assert "optimizer" not in moved.gpu
    assert moved.host["optimizer"] == here.gpu["optimizer"]
    both = trainer(shape, True, zero_stage=3, offload="parameters")
    assert both.host["weights"] == here.gpu["weights"]
    assert both.gpu_gib < moved.gpu_gib < here.gpu_gib


def test_activations_go_with_tokens_and_scores_with_the_vocabulary(shape):
    large = Batch(4, 2000, 1000)
    plain = trainer(shape, batch=large).host
    checkpointed = trainer(shape, batch=large, gradient_checkpointing=True).host
    assert checkpointed["activations"] < 0.75 * plain["activations"]
    # Two bytes for a logit and for its gradient, and three floats where it is widened.
    assert plain["scores"] == 16 * shape.vocabulary * 4 * 1000
    assert trainer(shape, batch=Batch(2, 2000, 1000)).host["activations"] == pytest.approx(
        plain["activations"] / 2
    )


def test_low_rank_training_has_small_states(shape):
    low, whole = trainer(shape, lora={"rank": 2}).host, trainer(shape).host
    assert low["optimizer"] < 0.2 * whole["optimizer"]
    assert low["weights"] == whole["weights"]


def test_a_teacher_beside_the_student_has_its_own_dtype(shape):
    training = Training(kl_weight=1.0)
    held = trainer_memory(shape, training, BATCH, False, teacher=(shape, "float32")).host
    assert held["teacher"] == 4 * shape.parameters


def test_activations_worked_out_by_hand():
    known = {"hidden": 10, "mlp": 40, "heads": 2, "key_value_heads": 1, "head_size": 5}
    shape = ModelShape(parameters=1, layers=3, vocabulary=7, context=0, normalised=50, **known)
    # A token of a layer in bf16: norms 50 x (4 + 2 + 2), attention 5 x 10 x 2, MLP 4 x 40 x 2
    # bytes, 820 in all. Two rows of 100 tokens have 200 tokens, and a mask of 2 x 100 x 100 x 2.
    passing = trainer(shape, on_gpu=True, batch=Batch(2, 100, 50)).gpu
    assert passing["activations"] == 3 * 200 * 820 + 40_000
    # Recomputed: one layer, and the input of each, 10 x 2 bytes a token.
    options = {"on_gpu": True, "gradient_checkpointing": True}
    recomputed = trainer(shape, batch=Batch(2, 100, 50), **options).gpu
    assert recomputed["activations"] == 200 * 820 + 40_000 + 3 * 200 * 20
