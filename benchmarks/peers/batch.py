"""One batch for all: pairs of random ids and lengths, and models of random weights in float32."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 64
PAD = 0
IGNORED = -100


@dataclass(frozen=True)
class Pair:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Answer:
    """An answer on its own, as KTO takes it."""

    prompt: list[int]
    ids: list[int]
    desirable: bool
    moved: list[int]  # another row's answer, for the estimate of the KL


@dataclass(frozen=True)
class Batch:
    seed: int
    pairs: tuple[Pair, ...]

    @property
    def student(self) -> Any:
        return _model(10 * self.seed)

    @property
    def reference(self) -> Any:
        return _model(10 * self.seed + 1)

    @property
    def teacher(self) -> Any:
        return _model(10 * self.seed + 2)

    @property
    def answers(self) -> list[Answer]:
        """All chosen answers, desirable, then all rejected ones."""
        found = [(pair.prompt, pair.chosen, True) for pair in self.pairs]
        found += [(pair.prompt, pair.rejected, False) for pair in self.pairs]
        return [Answer(*one, moved=found[row - 1][1]) for row, one in enumerate(found)]

    def one_by_one(self) -> list["Batch"]:
        return [Batch(self.seed, (pair,)) for pair in self.pairs]


def make_batch(seed: int, pairs: int = 4) -> Batch:
    random = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=random))
        return torch.randint(3, VOCABULARY, (length,), generator=random).tolist()

    return Batch(seed, tuple(Pair(ids(3, 9), ids(2, 16), ids(2, 16)) for _ in range(pairs)))


def padded(rows: list[tuple[list[int], list[int]]]) -> tuple[dict[str, Tensor], Tensor]:
    """A model's inputs for rows of prompt and answer, and labels [B, T] of the answers alone."""
    width = max(len(prompt) + len(ids) for prompt, ids in rows)
    inputs = torch.full((len(rows), width), PAD)
    seen, labels = torch.zeros_like(inputs), torch.full_like(inputs, IGNORED)
    for row, (prompt, ids) in enumerate(rows):
        end = len(prompt) + len(ids)
        inputs[row, :end], seen[row, :end] = torch.tensor(prompt + ids), 1
        labels[row, len(prompt) : end] = torch.tensor(ids)
    return {"input_ids": inputs, "attention_mask": seen}, labels


@cache
def _model(seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,  # so that no distribution is uniform
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)
