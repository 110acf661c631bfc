"""GSM8K: grade-school mathematics, whose worked answers end in "#### 1,234".

The hub has no validation part: it is carved out of train.
"""

from pipeline.tasks.task import Problem, Row, Task, text_of


def read(row: Row) -> Problem:
    """A question and the number behind the last "####" of its answer."""
    return Problem(text_of(row, "question"), str(row["answer"]).rpartition("####")[2].strip())


TASK = Task(
    name="gsm8k",
    kind="number",
    columns=("question", "answer"),
    read=read,
    hub_id="openai/gsm8k",
    hub_config="main",
    hub_sizes=(7473, 1319),
)
