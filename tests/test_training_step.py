"""The step without DeepSpeed, in float64: what is summed, and what it is divided by."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from cluster.errors import RunError
from cluster.sections import Training
from pipeline.logprobs import ResponseLogProbs
from training.batches import BatchCounts, MicroBatch, TokenPair, count_batch, micro_batches
from training.engine import TrainingEngine
from training.finite import FiniteCheck, NotFiniteError
from training.objectives import Objective
from training.schedule import count_steps, learning_rate
from training.step import Totals, accumulate, collate_pairs, describe_step
from training.stepping import Stepper

ORPO = Training(odds_ratio_weight=0.7)


def _pairs(count=8):
    random = torch.Generator().manual_seed(5)

    def ids(low, high):
        size = int(torch.randint(low, high, (1,), generator=random))
        return torch.randint(3, 300, (size,), generator=random).tolist()

    return [
        TokenPair(f"p{n}", ids(4, 9), ids(2, 12), None if n in (2, 5) else ids(2, 12))
        for n in range(count)
    ]


@pytest.fixture
def model(tiny_llama, monkeypatch):
    # Its own norm computes in float32, whatever the model's dtype is.
    monkeypatch.setattr(LlamaRMSNorm, "forward", _norm)
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)


def _norm(self, x):
    return self.weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.variance_epsilon)


def _run(
    model, pairs, training=ORPO, micro_batch=8, workers=1, share_prompts=True, check=None, **more
):
    """Sums and gradient of a global batch, cut as told."""
    model.zero_grad()
    full = training.nll_scope == "full"
    counts = count_batch(pairs, full)
    collator = partial(collate_pairs, pad_id=0, share_prompts=share_prompts, score_prompt=full)
    losses = []

    def backward(loss, micro):
        losses.append(loss.item())
        loss.backward()
        if check:
            check.add(loss, micro)

    totals, objective = Totals(), Objective(training, counts, **more)
    for rank in range(workers):
        share = micro_batches(pairs, micro_batch, workers, rank)
        scorer = ResponseLogProbs(model)
        totals.add(accumulate(scorer, share, objective, collator, backward).figures)
    gradient = torch.cat([p.grad.flatten().clone() for p in model.parameters()])
    return describe_step(totals, objective), sum(losses), gradient


def _textbook(model, pairs, training):
    """The loss of a whole batch, one row at a time, by the paper's formulas."""
    nll, contrast, tokens = 0.0, 0.0, 0
    for pair in pairs:
        logps = {}
        for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            if response is None:
                continue
            ids = torch.tensor([pair.prompt + response])
            every = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
            every = every.gather(-1, ids[0, 1:, None]).squeeze(-1)
            logps[name] = every[-len(response) :].mean()
            if name == "chosen":
                scored = every if training.nll_scope == "full" else every[-len(response) :]
                nll, tokens = nll - scored.sum(), tokens + len(scored)
        if pair.rejected is not None:
            odds = [p - torch.log(1 - torch.exp(p)) for p in logps.values()]
            contrast = contrast - torch.log(torch.sigmoid(odds[0] - odds[1]))
    return nll / tokens + training.odds_ratio_weight * contrast / len(pairs)


@pytest.mark.parametrize("scope", ["response", "full"])
def test_the_loss_is_the_papers(model, scope):
    training = Training(odds_ratio_weight=0.7, nll_scope=scope)
    figures, loss, gradient = _run(model, _pairs(), training)
    model.zero_grad()
    expected = _textbook(model, _pairs(), training)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-9)
    assert figures["loss"] == pytest.approx(expected.item(), abs=1e-9)
    plain = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradient, plain, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("micro_batch", "workers"), [(4, 1), (2, 1), (1, 1), (4, 2), (2, 2), (1, 4), (3, 2)]
)
@pytest.mark.parametrize("share_prompts", [True, False])
def test_1x8_is_4x2_in_losses_and_gradients(model, micro_batch, workers, share_prompts):
    whole, whole_loss, whole_gradient = _run(model, _pairs())
    cut, loss, gradient = _run(model, _pairs(), ORPO, micro_batch, workers, share_prompts)
    assert loss == pytest.approx(whole_loss, abs=1e-9)
    torch.testing.assert_close(gradient, whole_gradient, atol=1e-9, rtol=0)
    layout = {"padding", "tokens"}
    for name in whole.keys() - layout:
        assert cut[name] == pytest.approx(whole[name], abs=1e-9), name


def test_a_pair_without_a_negative_counts_with_0_contrast(model):
    pairs = [p for p in _pairs() if p.rejected is not None]
    alone = _run(model, pairs)[0]
    more = _run(model, [*pairs, TokenPair("q", [5, 6, 7], [8, 9], None)])[0]
    assert more["without_negative"] == 1
    assert more["odds_ratio"] == pytest.approx(alone["odds_ratio"] * len(pairs) / (len(pairs) + 1))
    assert more["margin"] == pytest.approx(alone["margin"])


def test_a_batch_without_any_negative_is_plain_sft(model):
    pairs = [TokenPair(p.prompt_id, p.prompt, p.chosen, None) for p in _pairs()]
    figures, loss, gradient = _run(model, pairs)
    assert figures["loss"] == figures["nll"] == pytest.approx(loss)
    assert figures["odds_ratio"] == figures["margin"] == 0
    assert torch.isfinite(gradient).all()


def test_filler_counts_nothing(model):
    pairs = _pairs(1)
    one, loss, gradient = _run(model, pairs)
    two, padded_loss, padded_gradient = _run(model, pairs, workers=2)
    assert two == one
    assert padded_loss == loss
    assert torch.equal(padded_gradient, gradient)


def test_the_gradient_cap_is_counted_and_the_same_in_every_cut(model):
    training = Training(odds_ratio_weight=0.7, odds_gradient_cap=0.5)
    whole, _, gradient = _run(model, _pairs(), training)
    assert 0 < whole["capped"] < 6
    _, free_loss, free = _run(model, _pairs())
    assert whole["loss"] == pytest.approx(free_loss)
    assert (gradient - free).abs().max() > 1e-6
    cut, _, cut_gradient = _run(model, _pairs(), training, micro_batch=1)
    assert cut["capped"] == whole["capped"]
    assert cut["largest_gradient"] == pytest.approx(whole["largest_gradient"])
    assert whole["largest_gradient"] > 0.5, "the largest before the cap"
    torch.testing.assert_close(cut_gradient, gradient, atol=1e-9, rtol=0)


def test_shared_prompts_save_positions(model):
    pairs = [TokenPair(f"p{n}", [5] * 20, [6] * 5, [7] * 5) for n in range(4)]
    shared, separate = (_run(model, pairs, share_prompts=s)[0]["tokens"] for s in (True, False))
    assert (shared, separate) == (4 * 30, 4 * 50)


@pytest.mark.parametrize("lora_like", [False, True])
def test_a_poisoned_gradient_names_its_prompt(model, lora_like):
    pairs = _pairs()
    if lora_like:
        for parameter in model.get_input_embeddings().parameters():
            parameter.requires_grad = False
    check = FiniteCheck(model.parameters())
    _run_trainable(model, pairs, check)
    assert check.offenders() == []
    # One logit of minus infinity under a token that only p3 has: its loss alone is infinite.
    poisoned = [*pairs[:3], TokenPair("p3", [5, 6], [310, 2], [7]), *pairs[4:]]
    with torch.no_grad():
        model.get_input_embeddings().weight[310] = float("nan")
    model.get_output_embeddings().weight = torch.nn.Parameter(
        torch.nan_to_num(model.get_input_embeddings().weight.detach())
    )
    _run_trainable(model, poisoned, check)
    assert check.offenders() == ["p3"]
    assert check.offenders() == [], "the next step starts afresh"


def _run_trainable(model, pairs, check):
    objective = Objective(ORPO, BatchCounts(100, len(pairs), 2 * len(pairs)))
    collator = partial(collate_pairs, pad_id=0, share_prompts=True, score_prompt=False)

    def backward(loss, micro):
        loss.backward()
        check.add(loss, micro)

    micros = [MicroBatch((pair,)) for pair in pairs]
    accumulate(ResponseLogProbs(model), micros, objective, collator, backward)


def test_a_finite_loss_with_an_infinite_gradient_is_caught():
    weight = torch.nn.Parameter(torch.zeros(1))
    check = FiniteCheck([weight])
    loss = torch.sqrt(weight).sum()  # value 0, slope infinite
    loss.backward()
    check.add(loss, MicroBatch((TokenPair("p0", [1], [2], None),)))
    assert check.offenders() == ["p0"]


def test_the_loss_falls(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, margins = [], []
    for _ in range(15):
        figures, *_ = _run(model, _pairs(), Training(odds_ratio_weight=1.0))
        losses.append(figures["loss"])
        margins.append(figures["margin"])
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    assert margins[-1] > margins[0] + 1


def test_steps_count_a_partial_batch():
    assert [count_steps(pairs, 32) for pairs in (1, 32, 33, 64)] == [1, 1, 2, 2]


def test_the_rate_warms_up_to_its_peak_and_falls_to_nearly_nothing():
    rates = [learning_rate(step, 100, 1e-3, 0.1) for step in range(1, 101)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == pytest.approx(1e-3)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 1e-6
    # the middle of the 91 steps from peak to 0
    assert learning_rate(55, 100, 1e-3, 0.1) == pytest.approx(
        1e-3 * 0.5 * (1 + math.cos(math.pi * 45 / 91))
    )


def test_the_cosine_may_end_above_nothing():
    rates = [learning_rate(step, 1000, 1.0, 0.1, 0.25) for step in range(1, 1001)]
    assert max(rates) == rates[99] == 1
    assert rates[-1] == pytest.approx(0.25, abs=1e-5)
    assert rates[549] == pytest.approx(0.25 + 0.75 / 2, abs=1e-3), "halfway"


@pytest.mark.parametrize(
    ("warmup_share", "expected"),
    [
        (0.0, [0.9045, 0.6545, 0.3455, 0.0955]),  # (1 + cos(36, 72, 108, 144 degrees)) / 2
        (1.0, [0.25, 0.5, 0.75, 1]),
    ],
)
def test_the_rate_at_the_ends_of_warmup(warmup_share, expected):
    rates = [learning_rate(step, 4, 1.0, warmup_share) for step in range(1, 5)]
    assert rates == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("norm", [-1.0, math.inf, math.nan])
def test_a_norm_that_says_not_finite_stops_the_run(norm):
    with pytest.raises(NotFiniteError, match="summed over all workers, is not finite"):
        _engine_with(norm).step(1e-3)
    with pytest.raises(NotFiniteError, match="summed over all workers, is not finite"):
        _engine_with(1.0, overflow=True).step(1e-3)
    assert _engine_with(2.5).step(1e-3) == 2.5


def test_a_sum_that_is_not_finite_names_step_and_prompts():
    stepper = object.__new__(Stepper)  # whose own share is finite
    stepper._training, stepper._seed = Training(), 0
    stepper._workers = SimpleNamespace(rank=0, control=None)
    stepper._objective = lambda batch: None
    stepper._forward_backward = lambda *_: SimpleNamespace(reduce=lambda group: None)
    stepper._agree = lambda step, wishes: wishes
    stepper.engine = _engine_with(math.inf)
    batch = [TokenPair(prompt_id, [1], [2], None) for prompt_id in ("p1", "p2", "p2")]
    with pytest.raises(RunError, match=r"^step 3: the gradient, summed .* prompts p1, p2: look"):
        stepper.take(3, 9, batch, None)


def _engine_with(norm, overflow=False):
    engine = object.__new__(TrainingEngine)
    engine._clips_itself = False
    optimizer = SimpleNamespace(param_groups=[{}], overflow=overflow)
    engine.deepspeed = SimpleNamespace(
        optimizer=optimizer, step=lambda: None, get_global_grad_norm=lambda: norm
    )
    return engine
