"""Trainer and sampler mean the same by a log-probability."""

import os

import pytest
import torch

pytestmark = pytest.mark.integration

ANSWER = r"He starts with 3 pens. 3 + 5 = 8. The answer is \boxed{8}."


def vllm_logprobs(folder, prompt, response):
    """Log-probabilities of the response's tokens, as vLLM gives them for a prompt."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0"
    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(
        str(folder),
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    try:
        request = TokensPrompt(prompt_token_ids=prompt + response)
        output = engine.generate([request], SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
    finally:
        engine.llm_engine.engine_core.shutdown()
    scored = output.prompt_logprobs[len(prompt) :]
    return torch.tensor(
        [scores[token].logprob for scores, token in zip(scored, response, strict=True)]
    )


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gemma"])
def test_the_trainer_scores_a_response_as_vllm_does(family, request):
    from transformers import AutoModelForCausalLM

    from pipeline.chat import load_chat
    from pipeline.logprobs import ResponseLogProbs, Row, collate

    folder = request.getfixturevalue(family)
    chat = load_chat(folder)
    prompt = chat.prompt_ids("Tom has 3 pens and buys 5 more. How many pens does he have now?")
    response = chat.response_ids(ANSWER, finished=True)
    other = chat.response_ids("Anna had 9 apples.", finished=False)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        batch = collate([Row(prompt, [other, response])], chat.pad_id)
        ours = ResponseLogProbs(model)(batch)[-len(response) :]
    theirs = vllm_logprobs(folder, prompt, response)
    assert len(response) > 10
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert ours.std() > 1e-3  # not the flat scores of a model that knows nothing
