"""The methods beside ORPO, in float64 without DeepSpeed: against their formulas, row by row."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from cluster.sections import Training
from pipeline.logprobs import ResponseLogProbs
from training.batches import Anchors, TokenPair, count_batch, micro_batches
from training.objectives import Objective
from training.step import (
    Totals,
    accumulate,
    collate_pairs,
    describe_step,
    log_ratio_to_unrelated,
)

DADPO = Training(method="dadpo", reference_weight=0.1, teacher_weight=0.05)
KTO = Training(method="kto", reference_weight=0.3, desirable_weight=1.5)


def _pairs(count=8):
    random = torch.Generator().manual_seed(5)

    def ids(low, high):
        size = int(torch.randint(low, high, (1,), generator=random))
        return torch.randint(3, 300, (size,), generator=random).tolist()

    def pair(n):
        anchors = Anchors(*(-10 * torch.rand(5, generator=random).double()).tolist())
        # So unlikely that KTO's estimate of the KL is above 0, where it counts.
        anchors = replace(anchors, reference_unrelated=-60 - n)
        rejected = None if n in (2, 5) else ids(2, 12)
        return TokenPair(f"p{n}", ids(4, 9), ids(2, 12), rejected, 0, ids(2, 6), anchors)

    return [pair(n) for n in range(count)]


@pytest.fixture
def model(tiny_llama, monkeypatch):
    # Its own norm computes in float32, whatever the model's dtype is.
    monkeypatch.setattr(
        LlamaRMSNorm,
        "forward",
        lambda n, x: n.weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6),
    )
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)


@pytest.fixture
def teacher(model, tiny_llama):
    """Another model of the same tokenizer."""
    other = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    return ResponseLogProbs(other.requires_grad_(False))


def _run(model, pairs, training, micro_batch=8, workers=1, share_prompts=True, teacher=None):
    """Figures, loss and gradient of a global batch, cut as told."""
    model.zero_grad()
    scorer, full = ResponseLogProbs(model), training.nll_scope == "full"
    shares = [micro_batches(pairs, micro_batch, workers, rank) for rank in range(workers)]
    counts = count_batch(pairs, full)
    divergence = sum(log_ratio_to_unrelated(scorer, share, 0) for share in shares) / counts.pairs
    objective = Objective(training, counts, divergence, teacher)
    collator = partial(
        collate_pairs,
        pad_id=0,
        share_prompts=share_prompts,
        score_prompt=full,
        with_teacher=teacher is not None,
    )
    totals = Totals()
    for share in shares:
        found = accumulate(scorer, share, objective, collator, lambda loss, _: loss.backward())
        totals.add(found.figures)
    gradient = torch.cat([p.grad.flatten().clone() for p in model.parameters()])
    return describe_step(totals, objective), gradient


def _sum(model, prompt, response):
    """Log-probability of a response, one row at a time."""
    ids = torch.tensor([prompt + response])
    every = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
    return every.gather(-1, ids[0, 1:, None]).squeeze(-1)[-len(response) :].sum()


def _dadpo_by_formula(model, pairs, training):
    total = 0.0
    for pair in (pair for pair in pairs if pair.rejected):
        chosen, rejected = (
            _sum(model, pair.prompt, pair.chosen),
            _sum(model, pair.prompt, pair.rejected),
        )
        held = pair.anchors
        reference = (chosen - held.reference_chosen) - (rejected - held.reference_rejected)
        teacher = (chosen - held.teacher_chosen) - (rejected - held.teacher_rejected)
        inner = training.reference_weight * reference + training.teacher_weight * teacher
        total = total - torch.log(torch.sigmoid(inner))
    return total / len(pairs)


def _kto_by_formula(model, pairs, training):
    with torch.no_grad():
        ratios = [
            _sum(model, pair.prompt, pair.unrelated) - pair.anchors.reference_unrelated
            for pair in pairs
        ]
    z = max(0.0, (sum(ratios) / len(ratios)).item())
    total, answers, beta = 0.0, 0, training.reference_weight
    for pair in pairs:
        ratio = _sum(model, pair.prompt, pair.chosen) - pair.anchors.reference_chosen
        total = total + training.desirable_weight * (1 - torch.sigmoid(beta * (ratio - z)))
        answers += 1
        if pair.rejected:
            ratio = _sum(model, pair.prompt, pair.rejected) - pair.anchors.reference_rejected
            total = total + training.undesirable_weight * (1 - torch.sigmoid(beta * (z - ratio)))
            answers += 1
    return total / answers


@pytest.mark.parametrize(
    ("training", "formula"),
    [(DADPO, _dadpo_by_formula), (KTO, _kto_by_formula)],
    ids=["dadpo", "kto"],
)
def test_the_loss_is_the_papers(model, training, formula):
    figures, gradient = _run(model, _pairs(), training)
    model.zero_grad()
    expected = formula(model, _pairs(), training)
    expected.backward()
    assert figures["loss"] == pytest.approx(expected.item(), abs=1e-9)
    assert figures["preference"] == pytest.approx(expected.item(), abs=1e-9)
    plain = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradient, plain, atol=1e-9, rtol=0)


def test_ktos_estimate_is_at_work_and_never_below_0(model):
    low = [replace(p, anchors=replace(p.anchors, reference_unrelated=-200.0)) for p in _pairs()]
    high = [replace(p, anchors=replace(p.anchors, reference_unrelated=0.0)) for p in _pairs()]
    at_zero = [replace(p, anchors=replace(p.anchors, reference_unrelated=-1.0)) for p in _pairs()]
    losses = [_run(model, pairs, KTO)[0]["loss"] for pairs in (low, high, at_zero)]
    assert losses[0] != pytest.approx(losses[1])
    assert losses[1] == losses[2], "both estimates are below 0"
    assert losses[1] != pytest.approx(_run(model, _pairs(), KTO)[0]["loss"]), "the tests' is not"


def test_without_training_dpo_is_at_log_2(model):
    with torch.no_grad():
        pairs = [
            replace(
                pair,
                anchors=Anchors(
                    reference_chosen=_sum(model, pair.prompt, pair.chosen).item(),
                    reference_rejected=_sum(model, pair.prompt, pair.rejected).item(),
                ),
            )
            for pair in _pairs()
            if pair.rejected
        ]
    figures, _ = _run(model, pairs, Training(method="dadpo", teacher_weight=0))
    assert figures["loss"] == pytest.approx(math.log(2), abs=1e-9)
    assert figures["margin"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_kl_is_torchs_own_on_chosen_answers(model, teacher, direction):
    training = Training(method="sft", kl_weight=0.3, kl_direction=direction)
    pairs = [replace(pair, for_teacher=[7, 8, *pair.prompt]) for pair in _pairs()]
    figures, _ = _run(model, pairs, training, teacher=teacher)
    model.zero_grad()
    plain, _ = _run(model, pairs, Training(method="sft"))
    model.zero_grad()
    total = 0.0
    for pair in pairs:
        ids, size = torch.tensor([pair.prompt + pair.chosen]), len(pair.chosen)
        student = torch.log_softmax(model(input_ids=ids).logits[0, -size - 1 : -1], -1)
        ids = torch.tensor([pair.for_teacher + pair.chosen])
        aimed = torch.log_softmax(teacher.model(input_ids=ids).logits[0, -size - 1 : -1], -1)
        target, given = (aimed, student) if direction == "reverse" else (student, aimed)
        kl = torch.nn.functional.kl_div(target, given, reduction="sum", log_target=True) / size
        total = total + kl / len(pairs)
    assert figures["kl"] == pytest.approx(total.item(), abs=1e-9)
    assert figures["loss"] == pytest.approx(plain["loss"] + 0.3 * total.item(), abs=1e-9)


def test_the_nll_may_be_a_mean_of_the_pairs_own_means(model):
    pairs = _pairs()
    figures, _ = _run(model, pairs, Training(method="sft", nll_reduction="pairs"))
    with torch.no_grad():
        means = [_sum(model, pair.prompt, pair.chosen) / len(pair.chosen) for pair in pairs]
    assert figures["nll"] == pytest.approx(-sum(means).item() / len(pairs), abs=1e-9)
    by_token, _ = _run(model, pairs, Training(method="sft"))
    assert abs(by_token["nll"] - figures["nll"]) > 1e-4


METHODS = {
    "dadpo": DADPO,
    "kto": KTO,
    "sft by pair, with KL": Training(method="sft", nll_reduction="pairs", kl_weight=0.4),
    "dadpo with forward KL": DADPO.model_copy(update={"kl_weight": 0.2, "kl_direction": "forward"}),
}


@pytest.mark.parametrize(("micro_batch", "workers", "share"), [(2, 1, True), (3, 2, False)])
@pytest.mark.parametrize("training", METHODS.values(), ids=METHODS)
def test_1x8_is_4x2_in_losses_and_gradients(model, teacher, training, micro_batch, workers, share):
    beside = teacher if training.kl_weight else None
    whole, whole_gradient = _run(model, _pairs(), training, teacher=beside)
    cut, gradient = _run(model, _pairs(), training, micro_batch, workers, share, beside)
    torch.testing.assert_close(gradient, whole_gradient, atol=1e-9, rtol=0)
    for name in whole.keys() - {"padding", "tokens"}:
        assert cut[name] == pytest.approx(whole[name], abs=1e-9), name
