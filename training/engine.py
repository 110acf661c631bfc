"""The student inside DeepSpeed: the model, its trainable parameters, AdamW, and ZeRO."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.config import RunConfig
from cluster.sections import Lora, Training
from pipeline.chat import Chat, check_same_tokenizer, load_chat
from pipeline.logprobs import ResponseLogProbs
from training.finite import NotFiniteError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_student(folder: Path, config: RunConfig, workers: int) -> Any:
    """The base student in the training precision, with LoRA where configured.

    At ZeRO stage 3 each of the workers gets its part while it loads.
    """
    from transformers import AutoModelForCausalLM

    with _partitioned_at_once(config.training, workers):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[config.training.precision],
            attn_implementation="sdpa",
            trust_remote_code=config.student.trust_remote_code,
        )
    if config.training.lora:
        _add_lora(model, config.training.lora)
    if config.training.gradient_checkpointing:
        # With LoRA the embeddings need no gradient, and reentrant checkpoints would then send none.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


@contextmanager
def _partitioned_at_once(training: Training, workers: int) -> Iterator[None]:
    """At stage 3, models that load within the block are never whole on any device.

    DeepSpeed would else move the whole model there before it takes it apart.
    """
    if training.zero_stage < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    _deepspeed()  # which transformers is about to start
    # transformers looks whether one is alive.
    alive = HfDeepSpeedConfig(deepspeed_config(training, workers))
    yield
    del alive


def load_teacher(config: RunConfig, student: Chat, device: Any) -> ResponseLogProbs | None:
    """The frozen teacher, in its own dtype, where the method compares token by token.

    Raises BadInputError where its tokenizer is not the student's.
    """
    from transformers import AutoModelForCausalLM

    from pipeline.models import resolve_model

    if not config.training.kl_weight:
        return None
    folder = resolve_model(config.teacher.model)
    trusted = config.teacher.trust_remote_code
    check_same_tokenizer(load_chat(folder, config.teacher.chat_template, trusted), student)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, config.teacher.dtype),
        attn_implementation="sdpa",
        trust_remote_code=trusted,
    )
    return ResponseLogProbs(model.eval().requires_grad_(False).to(device))


def _add_lora(model: Any, lora: Lora) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # it takes any number
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name


class TrainingEngine:
    """DeepSpeed's engine with the few things that a training step needs of it."""

    def __init__(self, model: Any, training: Training, workers: int) -> None:
        self.model = model
        self.workers = workers
        self.adam = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            # DeepSpeed's bf16 wrapper takes an optimizer step when it starts, on gradients of 0.
            lr=0.0,
            betas=training.betas,
            weight_decay=training.weight_decay,
            fused=True,
        )
        self._clips_itself = training.precision == "fp32" and training.zero_stage == 0
        if self._clips_itself:
            self.adam.register_step_pre_hook(self._clip)
        self._norm = 0.0
        self._training = training
        self.deepspeed = _initialize(ResponseLogProbs(model), self.adam, training, workers)
        for state in self.adam.state.values():
            state["step"].zero_()

    @property
    def scorer(self) -> nn.Module:
        """The model as a function of a TokenBatch; a call of it prepares the backward pass."""
        return self.deepspeed

    def backward(self, loss: Tensor) -> None:
        """Add up gradients; undo DeepSpeed's averaging over workers, as losses are shares."""
        self.deepspeed.backward(loss * self.workers, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """Clip, step and clear the gradients. Returns their norm before clipping.

        Raises NotFiniteError where the reduced gradient is not: DeepSpeed 0.19 skips such a step
        (`overflow`) at every stage, and without ZeRO in float32 we stop before it.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.step()
        norm = self._norm if self._clips_itself else float(self.deepspeed.get_global_grad_norm())
        # DeepSpeed's norms are inf, NaN or -1 where a gradient is not finite.
        if getattr(self.deepspeed.optimizer, "overflow", False) or not 0 <= norm < math.inf:
            raise NotFiniteError("the gradient, summed over all workers, is not finite")
        return norm

    def _clip(self, *_: Any) -> None:
        # DeepSpeed clips plain float32 too, but keeps the norm to itself.
        parameters = self.adam.param_groups[0]["params"]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._training.gradient_clip)
        self._norm = float(norm)
        if not torch.isfinite(norm):
            raise NotFiniteError("the gradient, summed over all workers, is not finite")


def _initialize(scorer: nn.Module, adam: Any, training: Training, workers: int) -> Any:
    engine, *_ = _deepspeed().initialize(
        model=scorer, optimizer=adam, config=deepspeed_config(training, workers)
    )
    return engine


def _deepspeed() -> Any:
    import deepspeed

    # At its start DeepSpeed compiles an all-reduce for CPUs. It takes a minute and a C++ compiler,
    # and a worker that is killed meanwhile leaves a lock on which the next one waits for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_config(training: Training, workers: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for ours.

    We own the accumulation boundary, since a last batch may hold fewer micro-batches.
    """
    plain = training.precision == "fp32" and training.zero_stage == 0
    zero: dict[str, Any] = {"stage": training.zero_stage}
    if training.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if training.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": training.global_batch // (training.micro_batch * workers),
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if plain else training.gradient_clip,
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }


def use_threads(training: Training, workers_here: int) -> None:
    """Share the machine's cores among its CPU workers; Ray hands each a single thread."""
    threads = training.threads_per_worker or max(1, (os.cpu_count() or 1) // workers_here)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
