"""Training runs of a tiny model, and what they leave."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from upath import UPath

from cluster.config import RunConfig, parse_config
from cluster.publishing import is_published
from cluster.run_folder import RunFolder
from tests.integration.pairs import WritesPairs, publish_pairs
from training.stage import train


def config_of(folder: Path, model: Path, **training) -> RunConfig:
    settings = {
        "epochs": 2,
        "global_batch": 4,
        "micro_batch": 4,
        "learning_rate": 2e-3,
        "precision": "fp32",
        "threads_per_worker": 1,
        "resample_timeout_s": 120,
    }
    return parse_config(
        {
            "run": {"folder": str(folder), "seed": 3},
            "task": {"name": "word_problems"},
            "teacher": {"model": str(model)},
            "student": {"model": str(model)},
            "cluster": {"accelerator": "cpu"},
            "training": settings | training,
        },
        source="test",
    )


def train_run(folder: Path, model: Path, **training) -> RunFolder:
    run, config = RunFolder(UPath(folder)), config_of(folder, model, **training)
    if not is_published(run.pairs(1)):
        run.root.mkdir(parents=True, exist_ok=True)
        publish_pairs(run, 1)
    train(run, config, WritesPairs.remote(run))
    return run


def metrics_of(run: RunFolder) -> list[dict]:
    lines = (run.root / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if '"train"' in line]


def weights_of(run: RunFolder, epoch: int) -> dict[str, torch.Tensor]:
    return load_file(str(run.checkpoint(epoch) / "model.safetensors"))


def assert_same_weights(one: dict, other: dict, atol: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=atol, rtol=0, msg=name)
