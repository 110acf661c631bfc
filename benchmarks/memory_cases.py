"""What benchmarks/memory.py measures: workers and engines of three models, and their estimates."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from cluster.config import RunConfig, parse_config
from cluster.memory import Batch, Memory, engine_memory, trainer_memory
from cluster.shapes import ModelShape

MEASURED = Path(__file__).with_name("memory.json")
PROMPT = 60  # tokens of a training row before its two answers


@dataclass(frozen=True)
class Case:
    """A training worker or an engine of one model."""

    name: str
    model: str
    training: dict = field(default_factory=dict)  # options of a worker; none measures an engine
    answer: int = 120  # tokens of each of a row's two answers
    kv_cache_gib: float = 0.0

    @property
    def batch(self) -> Batch:
        """A worker's micro-batch."""
        return Batch(self.training["micro_batch"], PROMPT + 2 * self.answer, 2 * self.answer)

    @property
    def config(self) -> RunConfig:
        """A run's configuration around the case."""
        engines = {"max_model_len": 1024, "enforce_eager": True}
        raw = {
            "run": {"folder": "unused"},
            "task": {"name": "word_problems"},
            "teacher": {"model": self.model},
            "student": {"model": self.model},
            "engines": engines | ({"kv_cache_gib": self.kv_cache_gib} if not self.training else {}),
        }
        if self.training:
            accumulating = {"global_batch": 2 * self.training["micro_batch"]}
            raw["training"] = {"threads_per_worker": 1} | accumulating | self.training
        return parse_config(raw, self.name)

    def estimate(self, shape: ModelShape) -> Memory:
        """What the plan says of it."""
        config = self.config
        if self.training:
            return trainer_memory(shape, config.training, self.batch, on_gpu=False)
        return engine_memory(shape, "bfloat16", config.engines, on_gpu=False)


SMOLLM, GEMMA, WIDE = "smollm2-135m-instruct", "gemma-3-270m", "qwen3-like"
CHECKPOINTED = {"gradient_checkpointing": True}
CASES = [
    Case("SmolLM2 135M, worker", SMOLLM, {"micro_batch": 4}),
    Case("SmolLM2 135M, worker, checkpointed", SMOLLM, {"micro_batch": 4} | CHECKPOINTED, 60),
    Case("Gemma 3 270M, worker", GEMMA, {"micro_batch": 2}, 90),
    Case("Gemma 3 270M, worker, checkpointed", GEMMA, {"micro_batch": 3} | CHECKPOINTED, 45),
    Case("wide 219M, worker", WIDE, {"micro_batch": 3}),
    Case("wide 219M, worker, checkpointed", WIDE, {"micro_batch": 2} | CHECKPOINTED),
    Case("SmolLM2 135M, engine", SMOLLM, kv_cache_gib=0.125),
    Case("Gemma 3 270M, engine", GEMMA, kv_cache_gib=0.0625),
    Case("wide 219M, engine", WIDE, kv_cache_gib=0.0625),
]


def folder_of(model: str, scratch: Path) -> Path:
    """The folder of a prepared model, or of one with random weights: ten wide layers, untied."""
    from pipeline.models import resolve_model

    if model != WIDE:
        return resolve_model(model)
    if not (scratch / "model.safetensors").exists():
        # In a process of its own, whose memory is no part of what is measured.
        build = f"from benchmarks.memory_cases import *; build_wide(Path({str(scratch)!r}))"
        subprocess.run([sys.executable, "-c", build], check=True)
    return scratch


def build_wide(folder: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from pipeline.models import resolve_model

    for file in resolve_model(SMOLLM).iterdir():
        if "token" in file.name or file.name.startswith(("vocab", "merges", "chat")):
            shutil.copy(file, folder)
    widths = {"hidden_size": 1024, "intermediate_size": 2816, "head_dim": 64}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 10}
    more = {"max_position_embeddings": 2048, "tie_word_embeddings": False}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=49152, **widths, **heads, **more))
    model.to(torch.bfloat16).save_pretrained(folder)


def read_measured() -> dict[str, dict]:
    """What was measured of each case: its peak above an empty process, and with what."""
    return json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
