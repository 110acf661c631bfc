"""OpenBookQA: elementary science with four options; the book's facts are not shown.

Some of its test rows repeat a train row; the loading leaves those out.
"""

from pipeline.tasks.task import Problem, Row, Task, labelled_texts, text_of


def read(row: Row) -> Problem:
    """A question or the beginning of a sentence, its options, and the right label."""
    return Problem(
        question=text_of(row, "question_stem"),
        gold=str(row["answerKey"]).strip(),
        choices=labelled_texts(row),
    )


TASK = Task(
    name="openbookqa",
    kind="choice",
    columns=("question_stem", "choices", "answerKey"),
    read=read,
    hub_id="allenai/openbookqa",
    hub_config="main",
    hub_sizes=(4957, 500),
)
