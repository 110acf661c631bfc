"""A tiny run whose folder and store lie in s3://bucket."""

from pathlib import Path

import yaml

from tests.integration.runs import Recipe, write_problems

PROMPTS = {"train": 12, "validation": 4, "test": 4}
SAMPLES = 4


def write_bucket_recipe(home: Path, model: Path, port: int) -> Recipe:
    """A run of two epochs on problems whose answers are 3 or 8."""
    home.mkdir(exist_ok=True)
    write_problems(home / "data", PROMPTS)
    section = {"model": str(model), "dtype": "float32"}
    engines = {"max_model_len": 256, "kv_cache_gib": 0.2, "enforce_eager": True, "batch_rows": 8}
    config = {
        "run": {"folder": "s3://bucket/run", "store": "s3://bucket/store"},
        "task": {"name": "gsm8k", "data": str(home / "data")},
        "teacher": section,
        "student": section,
        "sampling": {"samples": SAMPLES, "max_new_tokens": 40, "max_rouge_l": 0.99},
        "training": {
            "epochs": 2,
            "steps_per_epoch": 5,
            "global_batch": 2,
            "micro_batch": 2,
            "max_length": 256,
            "precision": "fp32",
            "threads_per_worker": 1,
        },
        "engines": engines,
        "evaluation": {"through": "engines"},
        "serving": {"port": port},
    }
    recipe = Recipe(home / "recipe.yaml")
    recipe.file.write_text(yaml.safe_dump(config))
    return recipe
