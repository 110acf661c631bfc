"""The loss, the schedule, and how DeepSpeed carries them out."""

import math
from typing import Annotated, Literal, TypeVar

from pydantic import Field, PositiveFloat, PositiveInt

from cluster.sections.base import (
    Execution,
    NonNegativeFloat,
    ReadBy,
    Section,
    Share,
)

T = TypeVar("T")
_Decay = Annotated[float, Field(ge=0, lt=1)]
_OfOrpo = Annotated[T, ReadBy(("orpo",))]
_OfKto = Annotated[T, ReadBy(("kto",))]
_WithNll = Annotated[T, ReadBy(("orpo", "sft"))]


class Lora(Section):
    """Low-rank training by peft; checkpoints are merged, ordinary models."""

    rank: PositiveInt = 16
    """Rank of the low-rank update of each linear layer."""
    alpha: PositiveFloat = 32
    """Scale of the update: alpha / rank."""
    dropout: _Decay = 0.0
    """Dropout before the update."""


class Training(Section):
    """The loss, the schedule, and how DeepSpeed carries them out."""

    method: Literal["orpo", "sft", "dadpo", "kto"] = "orpo"
    """orpo contrasts right with wrong traces beside the NLL; sft learns from right traces alone;
    dadpo prefers them by DPO anchored at reference and teacher; kto takes answers one by one."""
    odds_ratio_weight: _OfOrpo[NonNegativeFloat] = 1.0
    """ORPO's lambda: the weight of the odds-ratio loss beside the NLL."""
    odds_gradient_cap: _OfOrpo[PositiveFloat | None] = None
    """Cap on the gradient that one negative's odds may send back; null leaves it free."""
    reference_weight: Annotated[NonNegativeFloat, ReadBy(("dadpo", "kto"))] = 0.1
    """daDPO's beta 1, KTO's beta: how close to keep to the student as the run found it; 0 makes
    daDPO rDPO."""
    teacher_weight: Annotated[NonNegativeFloat, ReadBy(("dadpo",))] = 0.1
    """daDPO's beta 2: how much the teacher's own probabilities count; 0 makes it dDPO."""
    desirable_weight: _OfKto[NonNegativeFloat] = 1.0
    """KTO's weight of chosen answers."""
    undesirable_weight: _OfKto[NonNegativeFloat] = 1.0
    """KTO's weight of rejected answers."""
    kl_weight: NonNegativeFloat = 0.0
    """Weight of the token-level KL to the teacher on chosen answers, beside any method; above 0 it
    loads the teacher, of the same tokenizer, beside the student."""
    kl_direction: Literal["reverse", "forward"] = "reverse"
    """reverse is KL(student || teacher), forward KL(teacher || student)."""
    nll_scope: _WithNll[Literal["response", "full"]] = "response"
    """Tokens whose NLL is learned: the response alone, or the prompt as well."""
    nll_reduction: _WithNll[Literal["tokens", "pairs"]] = "tokens"
    """What the NLL is a mean over: the tokens of the global batch, or its pairs' own means."""
    epochs: Annotated[int, Field(ge=0, le=999)] = 5
    """Passes over the pairs, negatives drawn anew before each; 0 only evaluates the base student
    and the teacher."""
    steps_per_epoch: PositiveInt | None = None
    """Optimizer steps of an epoch, its pairs coming again or not all of them; null is one pass.
    Arms with different numbers of pairs compare fairly at equal steps."""
    learning_rate: PositiveFloat = 5e-6
    """Peak learning rate of AdamW."""
    warmup_share: Share = 0.05
    """Share of all steps in which the learning rate rises; a cosine follows."""
    final_rate_share: Share = 0.0
    """Share of the peak learning rate that the cosine ends at."""
    betas: tuple[_Decay, _Decay] = (0.9, 0.95)
    """AdamW's decay of its first and second moments."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay."""
    gradient_clip: PositiveFloat = 1.0
    """Largest norm of a step's gradient."""
    global_batch: PositiveInt = 32
    """Pairs in one optimizer step, over all workers and micro-batches."""
    max_length: PositiveInt = 1024
    """Tokens of prompt and response; a longer trace is cut and counted."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations; the optimizer's copy and the loss are float32."""
    lora: Lora | None = None
    """Train low-rank updates instead of all parameters."""
    micro_batch: Execution[PositiveInt] = 4
    """Pairs that one worker takes through the model at once."""
    workers: Execution[PositiveInt] = 1
    """Ray Train workers: one a GPU."""
    min_workers: Execution[PositiveInt | None] = None
    """Start with fewer where there is no room for all `workers`, down to this many, and take the
    others in when there is; null waits for all. The global batch stays the same."""
    cpus_per_worker: Execution[PositiveFloat] = 1
    """Logical CPUs that a worker holds."""
    threads_per_worker: Execution[PositiveInt | None] = None
    """Threads of a CPU worker; null shares the machine's cores among the workers."""
    zero_stage: Execution[Literal[0, 1, 2, 3]] = 0
    """DeepSpeed's ZeRO stage: what is sharded over the workers."""
    offload: Execution[Literal["none", "optimizer", "parameters"]] = "none"
    """What ZeRO moves to the host's memory; parameters includes the optimizer, at stage 3."""
    gradient_checkpointing: Execution[bool] = False
    """Recompute activations in the backward pass, for less memory and a third more time."""
    save_minutes: Execution[PositiveFloat] = 30
    """Save the trainer's state so often within an epoch; it is always saved between two epochs, and
    when the run is told to stop (SIGTERM)."""
    keep: Execution[Literal["each_epoch", "best_and_last", "last"]] = "each_epoch"
    """Whose checkpoints stay once the run is evaluated: each epoch's, those of the best epoch on
    validation and of the last, or the last one's alone. The others are removed then."""
    restarts: Execution[Annotated[int, Field(ge=0)]] = 3
    """How often training goes on by itself after a worker, or its node, was lost."""
    resample_timeout_s: Execution[PositiveFloat] = 3600
    """How long workers wait for the next epoch's pairs before they stop with a diagnosis."""

    @property
    def collective_timeout_s(self) -> int:
        """How long workers wait for one another, also while one of them saves or gets pairs."""
        return max(1800, math.ceil(self.resample_timeout_s))

    @property
    def least_workers(self) -> int:
        """The fewest workers that training runs with."""
        return self.min_workers or self.workers
