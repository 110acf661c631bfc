"""Ray Train and DeepSpeed on tiny models: parity of layouts, resume, checkpoints, and refusals."""

import json
import os
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file
from upath import UPath

from cluster import storage
from cluster.config import RunConfig, parse_config
from cluster.run_folder import RunFolder
from pipeline.rows import Pair, to_table
from training.stage import train

pytestmark = pytest.mark.integration

PAIRS = 11  # 3 batches of 4, the last one partial


@pytest.fixture(scope="module", autouse=True)
def ray_cluster():
    os.environ["DS_ACCELERATOR"] = "cpu"
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"DS_ACCELERATOR": "cpu", "RAY_TRAIN_V2_ENABLED": "1"}},
    )
    yield
    ray.shutdown()


def _pair(index: int, epoch: int) -> Pair:
    rejected = None if index % 4 == 3 else f"It is {index * 7 + epoch}."
    return Pair(
        prompt_id=f"p{index}",
        prompt=f"Tom has {index} pens and buys 5 more. How many pens?",
        chosen=f"{index} + 5 = {index + 5}. " * (1 + index % 3) + f"\\boxed{{{index + 5}}}",
        rejected=rejected,
        chosen_model="teacher",
        chosen_epoch=0,
        rejected_model=rejected and "student",
        rejected_epoch=0 if rejected else None,
        rejected_fallback=False,
        chosen_finished=True,
        rejected_finished=True if rejected else None,
    )


def _publish_pairs(run: RunFolder, epoch: int, count: int = PAIRS) -> None:
    staging = storage.staging_folder(run.pairs(epoch))
    table = to_table(Pair, [_pair(index, epoch) for index in range(count)])
    storage.write_table(table, UPath(staging / "pairs.parquet"))
    storage.publish_folder(staging, run.pairs(epoch))


@ray.remote(num_cpus=0)
class WritesPairs:
    """In the place of the real resampler."""

    def __init__(self, run: RunFolder, counts: dict[int, int] | None = None, delay: float = 0):
        self.run, self.counts, self.delay = run, counts or {}, delay

    def prepare_epoch(self, epoch: int) -> dict[str, int]:
        import time

        time.sleep(self.delay)
        assert storage.is_published(self.run.checkpoint(epoch - 1)), "asked before its checkpoint"
        _publish_pairs(self.run, epoch, self.counts.get(epoch, PAIRS))
        return {}


def _config(folder: Path, model: Path, **training) -> RunConfig:
    settings = {
        "epochs": 2,
        "global_batch": 4,
        "micro_batch": 4,
        "learning_rate": 1e-2,
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


def _train(folder: Path, model: Path, **training) -> RunFolder:
    run, config = RunFolder(UPath(folder)), _config(folder, model, **training)
    if not storage.is_published(run.pairs(1)):
        run.root.mkdir(parents=True, exist_ok=True)
        _publish_pairs(run, 1)
    train(run, config, WritesPairs.remote(run))
    return run


def _metrics(run: RunFolder) -> list[dict]:
    lines = (run.root / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if '"train"' in line]


def _weights(run: RunFolder, epoch: int) -> dict[str, torch.Tensor]:
    return load_file(str(run.checkpoint(epoch) / "model.safetensors"))


def _assert_same_weights(one: dict, other: dict, atol: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=atol, rtol=0, msg=name)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tiny_llama) -> RunFolder:
    """One worker, whole batches, float32: what the other layouts are held against."""
    return _train(tmp_path_factory.mktemp("reference"), tiny_llama)


def test_smoke(reference):
    print((reference.root / "metrics.jsonl").read_text())
    assert storage.is_published(reference.checkpoint(2))
