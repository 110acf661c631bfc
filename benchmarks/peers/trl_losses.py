"""TRL's losses on a batch: its trainers, its collators, its `compute_loss`.

A trainer wants a data set and a tokenizer to begin with; they have no part in the loss.
"""

import os
import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.peers.batch import IGNORED, PAD, Batch, padded
from benchmarks.peers.our_losses import mixed_reference

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def orpo(batch: Batch, weight: float) -> Tensor:
    """ORPOTrainer: NLL of prompt and answer, the mean over the tokens of the batch it is given."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = _trainer(ORPOTrainer, ORPOConfig, batch.student, beta=weight)
    rows = [
        {"prompt_input_ids": pair.prompt, "prompt_attention_mask": [1] * len(pair.prompt)}
        | _labelled("chosen", pair.prompt, pair.chosen)
        | _labelled("rejected", pair.prompt, pair.rejected)
        for pair in batch.pairs
    ]
    return trainer.compute_loss(batch.student, trainer.data_collator(rows))


def orpo_one_by_one(batch: Batch, weight: float) -> Tensor:
    """ORPOTrainer with gradient accumulation: its Trainer takes the mean over micro-batches."""
    return torch.stack([orpo(single, weight) for single in batch.one_by_one()]).mean()


def dpo(batch: Batch, beta: float) -> Tensor:
    """DPOTrainer, loss_type "sigmoid", against the reference model."""
    trainer, inputs = _dpo_trainer(batch, beta)
    return trainer.compute_loss(batch.student, inputs)


def dpo_with_mixed_reference(batch: Batch, beta1: float, beta2: float) -> Tensor:
    """DPOTrainer given precomputed sums: those of the mixture with which DPO is daDPO."""
    trainer, inputs = _dpo_trainer(batch, beta1 + beta2)
    trainer.precompute_ref_logps = True
    chosen, rejected = mixed_reference(batch, beta1, beta2)
    inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return trainer.compute_loss(batch.student, inputs)


def kto(batch: Batch, beta: float, weights: tuple[float, float]) -> Tensor:
    """KTOTrainer, loss_type "kto", with the KL that it estimates itself."""
    from trl import KTOConfig, KTOTrainer

    options = {"desirable_weight": weights[0], "undesirable_weight": weights[1]}
    trainer = _trainer(
        KTOTrainer, KTOConfig, batch.student, ref_model=batch.reference, beta=beta, **options
    )
    rows = [
        {
            "prompt_ids": answer.prompt,
            "completion_ids": answer.ids,
            "KL_completion_ids": answer.moved,
            "label": answer.desirable,
        }
        for answer in batch.answers
    ]
    return trainer.compute_loss(batch.student, trainer.data_collator(rows))


def kl_per_token(batch: Batch, direction: str) -> Tensor:
    """GKDTrainer's divergence of logits: beta 1 is KL(student || teacher), beta 0 the other."""
    from trl.experimental.gkd import GKDTrainer

    inputs, labels = padded([(pair.prompt, pair.chosen) for pair in batch.pairs])
    logits = [model(**inputs).logits[:, :-1] for model in (batch.student, batch.teacher)]
    beta = {"reverse": 1, "forward": 0}[direction]
    return GKDTrainer.generalized_jsd_loss(*logits, labels=labels[:, 1:], beta=beta)


def _dpo_trainer(batch: Batch, beta: float) -> tuple[Any, dict[str, Tensor]]:
    from trl import DPOConfig, DPOTrainer

    trainer = _trainer(DPOTrainer, DPOConfig, batch.student, ref_model=batch.reference, beta=beta)
    rows = [
        {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
        for pair in batch.pairs
    ]
    return trainer, trainer.data_collator(rows)


def _labelled(side: str, prompt: list[int], ids: list[int]) -> dict[str, list[int]]:
    return {
        f"{side}_input_ids": prompt + ids,
        f"{side}_attention_mask": [1] * len(prompt + ids),
        f"{side}_labels": [IGNORED] * len(prompt) + ids,
    }


def _trainer(
    trainer: Callable, config: Callable, model: Any, ref_model: Any = None, **options: Any
) -> Any:
    more = {} if ref_model is None else {"ref_model": ref_model}
    # CI: no telemetry.
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, CI="1"):
        settings = config(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            remove_unused_columns=False,
            report_to="none",
            **options,
        )
        return trainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_list(_ROWS),
            processing_class=_tokenizer(),
            **more,
        )


_ROWS = [
    {"prompt": "3 ", "chosen": "4", "rejected": "5", "completion": "4", "label": desirable}
    for desirable in (True, False)
]


def _tokenizer() -> PreTrainedTokenizerFast:
    words = models.WordLevel({str(number): number for number in range(8)}, unk_token="1")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=str(PAD), eos_token="2")
