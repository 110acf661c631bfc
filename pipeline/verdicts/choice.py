"""Which verdict a task has: chosen once, by the task and by `task.verdict`."""

from collections.abc import Sequence

from cluster import sections
from cluster.errors import BadInputError
from pipeline.rows import Prompt
from pipeline.store import SampleStore
from pipeline.tasks.catalogue import TASKS
from pipeline.verdicts.exact import Grader, grade_exactly
from pipeline.verdicts.function import function_grader, load_function
from pipeline.verdicts.judge import check_judge, judge_grader
from pipeline.verdicts.sandbox import Limits
from pipeline.verdicts.unit_tests import check_sandbox, check_tests, unit_tests_grader


def has_verdicts(task: sections.Task) -> bool:
    """Whether answers can be right or wrong: not where an open task chooses no verdict."""
    return TASKS[task.name].kind != "open" or task.verdict is not None


def choose_grader(task: sections.Task, store: SampleStore) -> Grader:
    """What gives the answers of a task their verdicts; a judge's replies are kept in `store`.

    Raises BadInputError where what it needs is not there.
    """
    match task.verdict:
        case sections.FunctionVerdict() as verdict:
            return function_grader(verdict)
        case sections.UnitTestsVerdict() as verdict:
            return unit_tests_grader(verdict)
        case sections.JudgeVerdict() as verdict:
            return judge_grader(verdict, store)
    return grade_exactly


def check_verdict(task: sections.Task, prompts: Sequence[Prompt]) -> None:
    """Raise BadInputError for all that would stop the grading of answers to `prompts`.

    Asks the judge one question where there is one, and starts the sandbox once.
    """
    if task.verdict is not None and TASKS[task.name].kind != "open":
        raise BadInputError(
            f"task.verdict is for open tasks such as chat; {task.name} has exact answers: remove "
            "it, or set task.name to chat"
        )
    match task.verdict:
        case sections.FunctionVerdict() as verdict:
            load_function(verdict.function)
        case sections.UnitTestsVerdict() as verdict:
            check_tests(prompts)
            check_sandbox(Limits(verdict.time_limit_s, verdict.memory_limit_mib))
        case sections.JudgeVerdict() as verdict:
            check_judge(verdict)
