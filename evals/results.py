"""The results of a run as rows: base, the student after each epoch, teacher."""

import json
from dataclasses import dataclass
from typing import Any

from cluster.config import RunConfig
from cluster.run_folder import RunFolder
from serving.models import (
    BASE,
    TEACHER,
    best_epoch,
    evaluation_name,
    published_epochs,
    student_id,
    trained_epochs,
)


@dataclass(frozen=True)
class Result:
    """A model of the run with what was measured on it."""

    label: str  # ends in brackets with details, which the terminal leaves out
    model_id: str
    test: dict[str, Any]
    validation: dict[str, Any] | None
    best: bool  # the epoch that is served as "student"


def read_results(run: RunFolder, config: RunConfig) -> list[Result]:
    """The models that were evaluated on test, in the order of the table."""
    epochs, served = trained_epochs(run, config), published_epochs(run, config)
    best = best_epoch(run, served)
    models = [(f"student before training ({config.student.model})", BASE, False)]
    models += [
        (_label(epoch, epoch in served), student_id(epoch), epoch == best) for epoch in epochs
    ]
    shots = len(config.teacher.few_shot)
    shown = f", shown {shots} worked examples" if shots else ""
    models.append((f"teacher ({config.teacher.title}{shown})", TEACHER, False))
    results = []
    for label, model_id, is_best in models:
        test = _read(run, model_id, "test")
        if test is not None:
            validation = _read(run, model_id, "validation")
            results.append(Result(label, model_id, test, validation, is_best))
    return results


def _label(epoch: int, is_there: bool) -> str:
    return f"student after epoch {epoch}{'' if is_there else ' (not kept)'}"


def _read(run: RunFolder, model_id: str, split: str) -> dict[str, Any] | None:
    file = run.evaluation(evaluation_name(model_id, split))
    return json.loads(file.read_text()) if file.exists() else None


def percent(share: float | None) -> str:
    """A share as it is printed; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.1f}"


def percent_with_error(result: dict[str, Any]) -> str:
    """An accuracy with its standard error, in percent."""
    return f"{percent(result['accuracy'])} ± {percent(result['standard_error'])}"
