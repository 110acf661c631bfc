"""The tasks by name. A new one is a file with a TASK, and a line here."""

from pipeline.tasks import (
    arc_challenge,
    chat,
    gsm8k,
    medqa,
    miniature,
    openbookqa,
    strategyqa,
    word_problems,
)
from pipeline.tasks.task import Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        arc_challenge.TASK,
        chat.TASK,
        gsm8k.TASK,
        medqa.TASK,
        miniature.TASK,
        openbookqa.TASK,
        strategyqa.TASK,
        word_problems.TASK,
    )
}
