from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import pipeline.logprobs
from pipeline.logprobs import (
    ResponseLogProbs,
    Row,
    collate,
    shares_prompts,
    target_log_probs,
)

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
RESPONSES = [[20, 21, 22, 23, 2], [30, 31], [40, 41, 42, 43, 44, 45, 46]]
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "gemma3_text": {**LAYERS, "final_logit_softcapping": 5.0},
    "qwen2": {**LAYERS, "use_sliding_window": True},
    "qwen3": {**LAYERS, "use_sliding_window": True},
    "smollm3": {**LAYERS, "use_sliding_window": True, "no_rope_layers": [1, 0]},
}


def _model(model_type, **more):
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, **SHAPE, **ARCHITECTURES.get(model_type, {}), **more)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for parameter in model.parameters():  # livelier than the usual 0.02, so that errors show
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _alone(model, prompt, response):
    """The textbook way: one unpadded row, all logits."""
    ids = torch.tensor([[*prompt, *response]])
    logps = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
    start = len(prompt)
    return torch.stack([logps[i - 1, ids[0, i]] for i in range(start, ids.shape[1])])


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_responses_that_share_a_prompt_score_as_if_each_were_alone(model_type):
    model = _model(model_type)
    assert shares_prompts(model.config)
    rows = [Row(PROMPT, RESPONSES), Row(PROMPT[:4], RESPONSES[1:])]
    with torch.no_grad():
        logps = ResponseLogProbs(model)(collate(rows, pad_id=0))
        alone = torch.cat(
            [_alone(model, r.prompt, response) for r in rows for response in r.responses]
        )
    torch.testing.assert_close(logps, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_shared_rows_have_the_gradients_of_separate_ones(model_type):
    model = _model(model_type)
    gradients = []
    for rows in ([Row(PROMPT, RESPONSES)], [Row(PROMPT, [r]) for r in RESPONSES]):
        model.zero_grad()
        ResponseLogProbs(model)(collate(rows, pad_id=0)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    scale = gradients[1].abs().max()
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5 * scale


def test_a_shared_row_hides_the_responses_from_one_another():
    model = ResponseLogProbs(_model("llama"))
    with torch.no_grad():
        first = model(collate([Row(PROMPT, [RESPONSES[0], RESPONSES[1]])], 0))
        other = model(collate([Row(PROMPT, [[50, 51, 52, 53, 54], RESPONSES[1]])], 0))
    torch.testing.assert_close(first[5:], other[5:])
    assert (first[:5] - other[:5]).abs().max() > 0.1


def test_padding_does_not_reach_a_plain_batch():
    model = _model("gemma3_text")
    rows = [Row(PROMPT, [RESPONSES[2]]), Row(PROMPT[:3], [RESPONSES[1]])]
    with torch.no_grad():
        logps = ResponseLogProbs(model)(collate(rows, pad_id=0))
        alone = torch.cat([_alone(model, row.prompt, row.responses[0]) for row in rows])
    torch.testing.assert_close(logps, alone, atol=1e-5, rtol=0)


def test_span_sums_and_counts_follow_the_rows():
    rows = [Row(PROMPT, RESPONSES[:2], score_prompt=True), Row(PROMPT[:4], [RESPONSES[2]])]
    batch = collate(rows, pad_id=0)
    # prompt (its first token is predicted by nothing), two responses, an unscored prompt, one more
    assert batch.counts.tolist() == [9, 5, 2, 0, 7]
    assert batch.span_sums(torch.ones(23)).tolist() == [9, 5, 2, 0, 7]
    assert batch.targets.tolist() == [
        *PROMPT[1:], *RESPONSES[0], *RESPONSES[1], *RESPONSES[2],
    ]  # fmt: skip
    assert batch.tokens == 17 + 11
    assert batch.positions_computed == 2 * 17


def test_a_scored_prompt_is_the_textbook_log_likelihood_of_all_tokens():
    model = _model("llama")
    with torch.no_grad():
        batch = collate([Row(PROMPT, [RESPONSES[0]], score_prompt=True)], 0)
        sums = batch.span_sums(ResponseLogProbs(model)(batch))
        whole = _alone(model, PROMPT[:1], [*PROMPT[1:], *RESPONSES[0]]).sum()
    torch.testing.assert_close(sums.sum(), whole, atol=1e-4, rtol=0)


def test_bf16_models_are_scored_in_float32():
    model = _model("llama").to(torch.bfloat16)
    with torch.no_grad():
        logps = ResponseLogProbs(model)(collate([Row(PROMPT, RESPONSES)], 0))
    assert logps.dtype == torch.float32
    fractions = {value % 2**-7 for value in logps.tolist()}
    assert fractions != {0.0}, "rounded to bf16 on the way"


def test_every_token_is_predicted_from_the_one_before_it_in_its_own_text():
    batch = collate([Row(PROMPT, RESPONSES)], pad_id=0)
    flat = batch.input_ids.flatten().tolist()
    expected = [
        previous for response in RESPONSES for previous, _ in pairwise([PROMPT[-1], *response])
    ]
    assert [flat[source] for source in batch.sources] == expected


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("at_once", [1, 64, 1 << 23])  # a row at a time, three and a bit, all
def test_log_probabilities_and_their_gradients_are_torchs_own(rows, at_once, monkeypatch):
    monkeypatch.setattr(pipeline.logprobs, "_LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    targets, flowing = torch.randint(19, (rows,)), torch.randn(rows, dtype=torch.float64)
    logits = (9 * torch.randn(rows, 19, dtype=torch.float64)).requires_grad_()
    expected = torch.log_softmax(logits, -1).gather(-1, targets[:, None]).squeeze(-1)
    (wanted,) = torch.autograd.grad(expected @ flowing, logits)
    found = target_log_probs(logits, targets)
    (gradient,) = torch.autograd.grad(found @ flowing, logits)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=0)


def test_bf16_logits_are_widened_before_anything_is_added_up():
    logits = torch.randn(5, 40).to(torch.bfloat16).requires_grad_()
    targets = torch.arange(5)
    found = target_log_probs(logits, targets)
    exact = torch.log_softmax(logits.detach().double(), -1)[torch.arange(5), targets]
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=0)
    found.sum().backward()
    assert logits.grad.dtype == torch.bfloat16
