"""ARC-Challenge: science questions with 3 to 5 options, labelled A to E or 1 to 5."""

from pipeline.tasks.task import Problem, Row, Task, labelled_texts, text_of


def read(row: Row) -> Problem:
    """A question, its options under the item's own labels, and the right label."""
    return Problem(
        question=text_of(row, "question"),
        gold=str(row["answerKey"]).strip(),
        choices=labelled_texts(row),
    )


TASK = Task(
    name="arc_challenge",
    kind="choice",
    columns=("question", "choices", "answerKey"),
    read=read,
    hub_id="allenai/ai2_arc",
    hub_config="ARC-Challenge",
    hub_sizes=(1119, 1172),
)
