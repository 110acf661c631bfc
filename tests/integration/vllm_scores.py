"""vLLM's log-probabilities of a response, by a program of its own, which writes them to a file.

python vllm_scores.py FOLDER '{"prompt": [ids], "response": [ids]}' OUT.json
"""

import json
import os
import subprocess
import sys
from pathlib import Path


def vllm_logprobs(folder, prompt, response, out):
    """Log-probabilities of the response's tokens, as vLLM gives them for a prompt."""
    import torch

    request = json.dumps({"prompt": prompt, "response": response})
    command = [sys.executable, __file__, str(folder), request, str(out)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return torch.tensor(json.loads(out.read_text()))


def main() -> None:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process in the place of three
    from vllm import LLM, SamplingParams, TokensPrompt

    folder, request = sys.argv[1], json.loads(sys.argv[2])
    engine = LLM(
        folder,
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        kv_cache_memory_bytes=1 << 27,
    )
    prompt = TokensPrompt(prompt_token_ids=request["prompt"] + request["response"])
    output = engine.generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
    scored = output.prompt_logprobs[len(request["prompt"]) :]
    pairs = zip(scored, request["response"], strict=True)
    Path(sys.argv[3]).write_text(json.dumps([scores[token].logprob for scores, token in pairs]))
    engine.llm_engine.engine_core.shutdown()
    # One run in some thirty aborts while the interpreter takes vLLM's threads down.
    os._exit(0)


if __name__ == "__main__":
    main()
