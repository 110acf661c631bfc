"""Log-probabilities of responses under a Hugging Face causal language model.

A row is a prompt and the responses that share it. The prompt runs through the model once: each
response sees the prompt and itself, at the positions it would have alone. Training and scoring use
this one path.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Architectures whose shared rows are tested to equal separate ones; others get a row a response.
_ONE_MASK = frozenset({"llama", "mistral"})
_MASK_BY_LAYER_TYPE = frozenset({"gemma3_text", "qwen2", "qwen3", "smollm3"})
_PADDING = -1
_PROMPT = 0
_LOGITS_AT_ONCE = 1 << 23  # that are widened together, in 32 MiB


@dataclass(frozen=True)
class Row:
    """Token ids of a prompt, and of responses that each follow it on their own."""

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]
    score_prompt: bool = False  # whether the prompt's own tokens are scored too

    @property
    def tokens(self) -> int:
        """Positions that the row takes."""
        return len(self.prompt) + sum(len(response) for response in self.responses)


@dataclass(frozen=True)
class TokenBatch:
    """Rows as tensors. A *span* is a prompt or a response; spans are numbered through the batch,
    each row's prompt before its responses."""

    input_ids: Tensor  # [R, T]
    positions: Tensor  # [R, T], restarting after the prompt for each response
    segments: Tensor  # [R, T]: 0 in the prompt, k in the k-th response, -1 in padding
    sources: Tensor  # [N]: where in the flattened [R * T] a scored token is predicted
    targets: Tensor  # [N]: the scored tokens' ids
    spans: Tensor  # [N]: the span that a scored token belongs to
    counts: Tensor  # [S]: scored tokens of each span
    shared: bool  # whether responses of one row share its prompt

    def to(self, device: torch.device) -> "TokenBatch":
        """The same batch on another device."""
        tensors = {name: value for name, value in vars(self).items() if name != "shared"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    @property
    def tokens(self) -> int:
        """Positions that are not padding."""
        return int((self.segments != _PADDING).sum())

    @property
    def positions_computed(self) -> int:
        """Positions that the model computes, padding included."""
        return self.input_ids.numel()

    def span_sums(self, token_logps: Tensor) -> Tensor:
        """Sums over each span: [N] -> [S], 0 for a span that is not scored."""
        return token_logps.new_zeros(self.counts.numel()).index_add(0, self.spans, token_logps)


class ResponseLogProbs(nn.Module):
    """A causal language model that answers with the log-probabilities of its rows' tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, batch: TokenBatch, keep: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probabilities [N] of the scored tokens, in float32 (float64 for a float64 model).

        With `keep`, bool [N], also the logits [K, V] from which the marked tokens were predicted.
        The head, most of a small model's work, is applied only where a scored token is predicted.
        """
        logits = self.logits(batch)
        logps = target_log_probs(logits, batch.targets)
        return logps if keep is None else (logps, logits[keep])

    def logits(self, batch: TokenBatch) -> Tensor:
        """The logits [N, V] from which the scored tokens are predicted."""
        hidden = self.model.get_decoder()(
            input_ids=batch.input_ids, use_cache=False, **_placed(self.model, batch)
        ).last_hidden_state
        logits = self.model.get_output_embeddings()(hidden.flatten(0, 1)[batch.sources])
        softcap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if softcap is None else torch.tanh(_widened(logits) / softcap) * softcap


def target_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits) at the targets: [N, V], [N] -> [N], in float32 (float64 for float64).

    The logits are widened piece by piece, and of their size only their gradient is made, in their
    own precision. Autograd alone would keep four float32 arrays [N, V].
    """
    return _TargetLogProbs.apply(logits, targets)


def _widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class _TargetLogProbs(torch.autograd.Function):
    """d log softmax(z)_t / dz = onehot(t) - softmax(z)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        sums = [torch.logsumexp(_widened(logits[part]), -1) for part in _pieces(logits)]
        normaliser = torch.cat(sums)
        ctx.save_for_backward(logits, targets, normaliser)
        return logits.gather(-1, targets[:, None]).squeeze(-1).to(normaliser.dtype) - normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flowing: Tensor) -> tuple[Tensor, None]:
        logits, targets, normaliser = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for part in _pieces(logits):
            slope = (_widened(logits[part]) - normaliser[part, None]).exp_()
            slope.mul_(-flowing[part, None])
            slope.scatter_add_(-1, targets[part, None], flowing[part, None])
            gradient[part] = slope
        return gradient, None


def _pieces(logits: Tensor) -> Iterator[slice]:
    rows, vocabulary = logits.shape
    step = max(1, _LOGITS_AT_ONCE // vocabulary)
    return (slice(start, start + step) for start in range(0, max(rows, 1), step))


def shares_prompts(model_config: Any) -> bool:
    """Whether several responses may share a row under this architecture."""
    return model_config.model_type in _ONE_MASK | _MASK_BY_LAYER_TYPE


def collate(rows: Sequence[Row], pad_id: int) -> TokenBatch:
    """Rows as one batch, padded on the right to the longest."""
    width = max(row.tokens for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    positions = torch.zeros((len(rows), width), dtype=torch.long)
    segments = torch.full((len(rows), width), _PADDING, dtype=torch.long)
    scored = _Scored([], [], [], [])
    for index, row in enumerate(rows):
        start = len(row.prompt)
        input_ids[index, :start] = torch.tensor(row.prompt)
        positions[index, :start] = torch.arange(start)
        segments[index, :start] = _PROMPT
        scored.add_prompt(row, index * width)
        for number, response in enumerate(row.responses, start=1):
            stop = start + len(response)
            input_ids[index, start:stop] = torch.tensor(response, dtype=torch.long)
            positions[index, start:stop] = torch.arange(len(response)) + len(row.prompt)
            segments[index, start:stop] = number
            scored.add_response(row, response, index * width, start)
            start = stop
    shared = any(len(row.responses) > 1 for row in rows)
    return TokenBatch(input_ids, positions, segments, *scored.tensors(), shared)


@dataclass
class _Scored:
    """Grows the index of scored tokens, span by span."""

    sources: list[int]
    targets: list[int]
    spans: list[int]
    counts: list[int]

    def add_prompt(self, row: Row, offset: int) -> None:
        # Nothing predicts the first token.
        scored = row.prompt[1:] if row.score_prompt else []
        self._add(list(range(offset, offset + len(scored))), scored)

    def add_response(self, row: Row, response: Sequence[int], offset: int, start: int) -> None:
        # The prompt's last token predicts every response's first.
        first = offset + len(row.prompt) - 1
        rest = range(offset + start, offset + start + len(response) - 1)
        self._add([first, *rest] if response else [], response)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = self.sources, self.targets, self.spans, self.counts
        sources, targets, spans, counts = (torch.tensor(ids, dtype=torch.long) for ids in found)
        return sources, targets, spans, counts

    def _add(self, sources: list[int], targets: Sequence[int]) -> None:
        self.sources += sources
        self.targets += targets
        self.spans += [len(self.counts)] * len(targets)
        self.counts.append(len(targets))


def _placed(model: Any, batch: TokenBatch) -> dict[str, Any]:
    """Where tokens stand, and what they see: nothing to say where rows are plain.

    A causal model sees no padding to the right, and without a mask fast kernels serve.
    """
    if not batch.shared:
        return {}
    return {"position_ids": batch.positions, "attention_mask": _masks(model, batch)}


def _masks(model: Any, batch: TokenBatch) -> Tensor | dict[str, Tensor]:
    """Masks [R, 1, T, T] to be added to the scores, made once for all layers of a type."""
    config = model.config
    assert shares_prompts(config), f"{config.model_type} has no tested shared rows"
    seen = _shared_mask(batch.segments)
    full = _added(seen, model.dtype)
    window = getattr(config, "sliding_window", None)
    sliding = _added(seen & _within(batch.positions, window), model.dtype) if window else full
    if config.model_type in _ONE_MASK:
        return sliding
    by_type = {"full_attention": full, "sliding_attention": sliding}
    return {layer_type: by_type[layer_type] for layer_type in set(config.layer_types)}


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    # A boolean mask would be converted, and kept, by each layer for itself.
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, float("-inf"))


def _shared_mask(segments: Tensor) -> Tensor:
    seen, by = segments[:, None, :], segments[:, :, None]
    width = segments.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    # Padding sees itself through `seen == by`: a row of the softmax with nothing seen is NaN.
    return (((seen == by) | (seen == _PROMPT)) & causal)[:, None]


def _within(positions: Tensor, window: int) -> Tensor:
    distance = positions[:, :, None] - positions[:, None, :]
    return (distance < window)[:, None]
