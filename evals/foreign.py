"""The accuracy of a teacher that others serve: its answers are bought as its traces are."""

from collections.abc import Callable, Sequence
from typing import Any

from cluster import storage
from cluster.config import RunConfig
from evals.accuracy import Answer, Asking, graded, measure_accuracy
from pipeline.foreign import foreign_solver, sample_foreign
from pipeline.rows import Prompt
from pipeline.store import SampleStore
from pipeline.verdicts.exact import Grader


def measure_foreign_teacher(
    split: str, prompts: list[Prompt], config: RunConfig, grader: Grader
) -> tuple[dict[str, Any], list[Answer]]:
    """measure_accuracy of `config.teacher` at its endpoint.

    Answers go through the store, so that none is paid for twice, and count for the spending limit.
    Raises what sample_foreign does.
    """
    endpoint = config.teacher.endpoint
    assert endpoint is not None

    def ask(_: Asking, asked: Sequence[Prompt], __: Callable[[Answer], None]) -> list[Answer]:
        writer = foreign_solver("teacher", config.teacher, config, prompts[0].kind)
        store = SampleStore(storage.location(config.run.store))
        rows = sample_foreign(writer, asked, 1, config, store)
        return [
            graded(prompt, row.text, row.finish_reason, row.error)
            for prompt, row in zip(asked, rows, strict=True)
        ]

    return measure_accuracy(
        Asking(endpoint.url, config.teacher.model, config.evaluation_tokens),
        prompts,
        task=config.task.name,
        split=split,
        grader=grader,
        max_error_share=config.sampling.max_error_share,
        ask=ask,
    )
