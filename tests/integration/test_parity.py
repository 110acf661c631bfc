"""Trainer and sampler mean the same by a log-probability."""

import pytest
import torch

from tests.integration.vllm_scores import vllm_logprobs

pytestmark = pytest.mark.integration

ANSWER = r"He starts with 3 pens. 3 + 5 = 8. The answer is \boxed{8}."


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gemma"])
def test_the_trainer_scores_a_response_as_vllm_does(family, request, tmp_path):
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
    theirs = vllm_logprobs(folder, prompt, response, tmp_path / "scores.json")
    assert len(response) > 10
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert ours.std() > 1e-3  # not the flat scores of a model that knows nothing
