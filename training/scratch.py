"""Tiny chat models from nothing: a tokenizer of generated texts, random weights, then lessons."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

from pipeline.chat import Chat
from training.schedule import learning_rate

Lesson = tuple[str, str]  # a user message, and the answer to learn

_BETAS, _WEIGHT_DECAY, _CLIP = (0.9, 0.95), 0.1, 1.0
_WARMUP_SHARE = 0.03
_NO_LABEL = -100  # what PyTorch's cross-entropy skips


@dataclass(frozen=True)
class Course:
    """How long and how fast a model learns."""

    steps: int
    batch: int  # lessons a step
    learning_rate: float  # at its highest: it rises over the first 3 %, then falls along a cosine


def train_tokenizer(
    texts: Iterable[str], pieces: str, vocabulary: int, special_tokens: list[str], template: str
) -> Any:
    """A byte-level BPE tokenizer, which gives any text back; merges stay inside `pieces`, a regex.

    The first special token pads, the last one ends a turn.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special_tokens[0],
        eos_token=special_tokens[-1],
        additional_special_tokens=special_tokens[1:-1],
        chat_template=template,
    )


def teach(
    model: Any,
    chat: Chat,
    lessons: Iterator[Lesson],
    course: Course,
    on_step: Callable[[float], None],
) -> None:
    """Train all weights of `model` on the next lessons, by the mean NLL of the answers' tokens.

    Plain AdamW in float32; `on_step` gets each step's loss in nats. The same lessons and weights
    give the same model, on the same number of threads.
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=_BETAS, weight_decay=_WEIGHT_DECAY)
    model.train()
    for step in range(1, course.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, course.steps, course.learning_rate, _WARMUP_SHARE)
        ids, labels = _batch(chat, list(islice(lessons, course.batch)))
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        optimizer.zero_grad()
        on_step(loss.item())
    model.eval()


def _batch(chat: Chat, lessons: list[Lesson]) -> tuple[Tensor, Tensor]:
    """Ids and labels, [B, T] each. Padding is on the right, where no earlier token sees it."""
    ids, labels = [], []
    for message, answer in lessons:
        prompt = chat.prompt_ids(message)
        response = chat.response_ids(answer, finished=True)
        ids.append(torch.tensor(prompt + response))
        labels.append(torch.tensor([_NO_LABEL] * len(prompt) + response))
    return (
        pad_sequence(ids, batch_first=True, padding_value=chat.pad_id),
        pad_sequence(labels, batch_first=True, padding_value=_NO_LABEL),
    )
