"""StrategyQA: yes/no questions whose reasoning steps have to be found.

The hub has no validation part: it is carved out of train.
"""

from pipeline.tasks.task import Problem, Row, Task, text_of


def read(row: Row) -> Problem:
    """A question and its answer: true or false, as a boolean or in letters."""
    return Problem(text_of(row, "question"), str(row["answer"]).strip())


TASK = Task(
    name="strategyqa",
    kind="boolean",
    columns=("question", "answer"),
    read=read,
    hub_id="ChilleD/StrategyQA",
    hub_sizes=(1603, 687),
)
