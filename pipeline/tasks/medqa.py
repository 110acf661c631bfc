"""MedQA-USMLE with four options: long clinical vignettes.

The hub has no validation part: it is carved out of train.
"""

import re

from pipeline.tasks.task import Problem, Row, Task, nested, text_of

# What an export to CSV left behind: a line end and a lone quote, and quotes doubled twice.
_STRAY_END = re.compile(r'\s*\n\s*"$')


def read(row: Row) -> Problem:
    """A vignette, its options, and the right label."""
    options = {
        str(label).strip(): _without_artefacts(str(text))
        for label, text in nested(row, "options").items()
        if text is not None  # a column of Parquet gives every row the labels of all rows
    }
    return Problem(text_of(row, "question"), str(row["answer_idx"]).strip(), options)


def _without_artefacts(option: str) -> str:
    return _STRAY_END.sub("", option.strip()).replace('"""', '"').strip()


TASK = Task(
    name="medqa",
    kind="choice",
    columns=("question", "options", "answer_idx"),
    read=read,
    hub_id="GBaker/MedQA-USMLE-4-options",
    hub_sizes=(10178, 1273),
)
