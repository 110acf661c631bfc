"""Scoring as an anti-join: the store is asked which log-probabilities are there, models the rest.

daDPO (arXiv:2506.15717) compares sums of response log-probabilities under policy, reference and
teacher. The last two never change, so they are computed once, apart from training. Every model gets
the text in its own template and tokens: sums over whole responses compare across tokenizers.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any
from unicodedata import normalize

import pyarrow as pa

from cluster.config import RunConfig
from cluster.digests import digest_text
from cluster.errors import RunError
from cluster.progress import progress, say
from pipeline.engine import ScoreAnswer, ScoreRequest, Weights
from pipeline.fan_out import ask_patiently, made_ready, through_engines, through_models
from pipeline.models import resolve_exact
from pipeline.pool import ensure_engines, release_engines
from pipeline.rows import Score
from pipeline.sampling import Writer
from pipeline.store import ScoreStore

_SHOWN = 60  # characters of a text in an error's line


@dataclass(frozen=True)
class Answered:
    """A response to a user's message, as text."""

    message: str
    response: str
    finished: bool  # False: cut by the length limit, so that no end-of-turn token belongs to it

    @property
    def key(self) -> str:
        """Its name where its scores are kept."""
        return digest_text(self.message, self.response, str(self.finished))


def plan_scores(
    reader: Writer, texts: Iterable[Answered], max_error_share: float = 0
) -> dict[Answered, ScoreRequest]:
    """What a model is to score, in its own tokens: worked examples, message, response, end of turn.

    Keys hold weights, dtype and ids, so equal texts under equal models are scored once by any run.
    Raises RunError where the ids of more than a share of the responses do not give them back: of
    those another text is scored.
    """
    manner = repr(("score", reader.weights.digest, reader.weights.dtype))
    requests = {}
    for text in texts:
        prompt = reader.chat.prompt_ids(text.message, reader.few_shot)
        response = reader.chat.response_ids(text.response, text.finished)
        key = digest_text(manner, repr(prompt), repr(response))
        requests[text] = ScoreRequest(key, prompt, response)
    _look_for_lost_texts(reader, requests, max_error_share)
    return requests


def _look_for_lost_texts(
    reader: Writer, requests: Mapping[Answered, ScoreRequest], max_error_share: float
) -> None:
    spoken = [
        request.response_ids[:-1] if text.finished else request.response_ids
        for text, request in requests.items()
    ]
    read = zip(requests, reader.chat.texts_of(spoken), strict=True)
    lost = [(text, back) for text, back in read if not _same_text(text.response, back)]
    if not lost:
        return
    first, back = lost[0]
    given, found = _where_they_part(first.response, back)
    told = (
        f"{reader.name} reads other texts than {len(lost)} of {len(requests)} responses, because "
        f"the tokenizer of {reader.weights.reference} does not give them back. The first, to "
        f"{first.message[:_SHOWN]!r}, has {given!r}, which comes back as {found!r}"
    )
    if len(lost) <= max_error_share * len(requests):
        say(f"{told}. They are scored as they are read")
        return
    raise RunError(
        f"{told}. That is more than sampling.max_error_share={max_error_share:g} of them: take a "
        "model whose tokenizer has all their characters, leave their prompts out of task.data, or "
        "raise that share"
    )


def _same_text(text: str, back: str) -> bool:
    """Whether a tokenizer changed no more than it may.

    That is one space before the first word, which sentencepiece adds or takes, and how a character
    is composed, which Qwen's normalise (NFC). NFKC is more: it makes "x2" of "x²".
    """
    text, back = normalize("NFC", text), normalize("NFC", back)
    return text == back or text == f" {back}" or back == f" {text}"


def _where_they_part(text: str, back: str) -> tuple[str, str]:
    text, back = (normalize("NFC", one).removeprefix(" ") for one in (text, back))
    alike = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, back, strict=False))
    )
    start = max(0, alike - _SHOWN // 2)
    return text[start : start + _SHOWN], back[start : start + _SHOWN]


def score(
    reader: Writer, texts: Sequence[Answered], config: RunConfig, store: ScoreStore, on_gpu: bool
) -> dict[Answered, Score]:
    """The log-probability of each text under `reader`: from the store, or computed now.

    Raises RunError where one cannot be scored; what was scored is kept.
    """
    requests = plan_scores(reader, texts, config.sampling.max_error_share)
    by_key = {request.key: request for request in requests.values()}
    stored = store.keys(reader.weights.digest)
    missing = [request for key, request in by_key.items() if key not in stored]
    if reused := len(by_key) - len(missing):
        say(f"scores of {reader.name}: {reused} of {len(by_key)} reused")
    if missing:
        _compute(reader, missing, config, store, on_gpu)
    found = store.read(reader.weights.digest, set(by_key))
    return {text: found[request.key] for text, request in requests.items()}


def _compute(
    reader: Writer,
    requests: Sequence[ScoreRequest],
    config: RunConfig,
    store: ScoreStore,
    on_gpu: bool,
) -> None:
    errors = []
    with progress(f"scoring by {reader.name}", len(requests)) as bar:
        for batch in _fan_out(reader, requests, config, store, on_gpu):
            bar.advance(len(batch))
            errors += [error for error in batch["error"].to_pylist() if error]
    if errors:
        raise RunError(
            f"{reader.name} cannot score {len(errors)} of {len(requests)} responses. The first: "
            f"{errors[0]}. Raise engines.max_model_len where they are too long for it"
        )


def _fan_out(
    reader: Writer,
    requests: Sequence[ScoreRequest],
    config: RunConfig,
    store: ScoreStore,
    on_gpu: bool,
) -> Iterator[pa.Table]:
    if config.scoring.engine == "forward":
        if on_gpu:
            release_engines(config)  # they may hold the GPUs that the models would wait for
        loading = (reader.weights, store, config.scoring.forward_tokens, on_gpu)
        return through_models(requests, ScoreByForwardPass, loading, config.engines, on_gpu)
    handle = ensure_engines(config, reader.weights, on_gpu)
    asking = (handle, reader.weights.digest, store, config.engines.start_timeout_s)
    return through_engines(requests, ScoreByEngines, asking, config.engines)


class ScoreByEngines:
    """Ray Data's side of the pool: has a batch scored, and stores what came back.

    In: the columns of ScoreRequest. Out: `key`, and `error`, null for what was stored.
    """

    def __init__(self, handle: Any, digest: str, store: ScoreStore, patience_s: float) -> None:
        self._handle, self._digest = made_ready(handle), digest
        self._store, self._patience_s = store, patience_s

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Score one batch."""
        requests = _requests(batch)
        answers = ask_patiently(
            lambda: self._handle.score.remote(self._digest, requests).result(), self._patience_s
        )
        return _keep(requests, answers, self._digest, self._store)


class ScoreByForwardPass:
    """A model of transformers that scores batches itself; columns as in ScoreByEngines."""

    def __init__(self, weights: Weights, store: ScoreStore, tokens: int, on_gpu: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from pipeline.logprobs import ResponseLogProbs

        model = AutoModelForCausalLM.from_pretrained(
            resolve_exact(weights.reference, weights.digest),
            dtype=getattr(torch, weights.dtype),
            attn_implementation="sdpa",
            trust_remote_code=weights.trust_remote_code,
        )
        self._scorer = ResponseLogProbs(model.eval().to("cuda" if on_gpu else "cpu"))
        self._digest, self._store, self._tokens = weights.digest, store, tokens

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Score one batch, responses of like length together."""
        requests = sorted(_requests(batch), key=_length)
        answers: list[ScoreAnswer] = []
        while len(answers) < len(requests):
            left = requests[len(answers) :]
            # The longest of a group comes last, and all are padded to it.
            fitting = [n for n, r in enumerate(left, 1) if n * _length(r) <= self._tokens]
            answers += self._score(left[: max(fitting, default=1)])
        return _keep(requests, answers, self._digest, self._store)

    def _score(self, requests: list[ScoreRequest]) -> list[ScoreAnswer]:
        import torch

        from pipeline.logprobs import Row, collate

        rows = [Row(request.prompt_ids, [request.response_ids]) for request in requests]
        batch = collate(rows, pad_id=0).to(next(self._scorer.parameters()).device)
        with torch.inference_mode():
            sums = batch.span_sums(self._scorer(batch).double())
        return [ScoreAnswer(value) for value in sums[1::2].tolist()]  # after each prompt's span


def _requests(batch: pa.Table) -> list[ScoreRequest]:
    return [ScoreRequest(**row) for row in batch.to_pylist()]


def _length(request: ScoreRequest) -> int:
    return len(request.prompt_ids) + len(request.response_ids)


def _keep(
    requests: Sequence[ScoreRequest],
    answers: Sequence[ScoreAnswer],
    digest: str,
    store: ScoreStore,
) -> pa.Table:
    answered = list(zip(requests, answers, strict=True))
    store.write(
        Score(request.key, digest, answer.logp, len(request.response_ids))
        for request, answer in answered
        if answer.error is None
    )
    columns = [[request.key for request in requests], [answer.error for answer in answers]]
    return pa.table(columns, schema=pa.schema([("key", pa.string()), ("error", pa.string())]))
