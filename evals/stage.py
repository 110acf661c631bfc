"""The evaluation stage of a run: every model, through an endpoint or the warm engines."""

import time
from dataclasses import dataclass
from typing import Any

from upath import UPath

from cluster import storage
from cluster.config import RunConfig
from cluster.endpoint_key import KEY_VARIABLE
from cluster.marking import mark
from cluster.progress import progress, say
from cluster.run_folder import RunFolder
from cluster.session import ray_session
from evals.accuracy import (
    Answer,
    Asking,
    answers_table,
    measure_accuracy,
    result_of_answers,
    with_verdicts,
)
from evals.foreign import measure_foreign_teacher
from evals.through_engines import answers_of
from pipeline.rows import Prompt
from pipeline.store import SampleStore
from pipeline.tasks import load_prompts
from pipeline.verdicts.choice import choose_grader, has_verdicts
from pipeline.verdicts.exact import Grader
from serving.app import Endpoint, start_serving, stop_serving
from serving.models import (
    BASE,
    TEACHER,
    evaluation_name,
    in_turn,
    published_epochs,
    served_models,
    student_id,
)

# An engine that is done is stopped soon, since the next one wants its memory.
_IDLE_S = 10.0


@dataclass(frozen=True)
class _Job:
    model_id: str
    split: str
    epoch: int  # of a student; 0 for base and teacher

    @property
    def name(self) -> str:
        return evaluation_name(self.model_id, self.split)


def answers_file(result: UPath) -> UPath:
    """Where the answers behind a result lie."""
    return result.with_suffix(".parquet")


def evaluate(run: RunFolder, config: RunConfig) -> None:
    """Evaluate base, teacher and every epoch's student on test, students on validation too.

    Results that are there are kept. A teacher behind an endpoint answers there, last. Starts Ray
    where it does not run. A task without verdicts has nothing to measure.
    """
    if not has_verdicts(config.task):
        say(f"evaluation: nothing to measure, since {config.task.name} has no task.verdict")
        return
    jobs = _jobs(run, config)
    missing = [job for job in jobs if not run.evaluation(job.name).exists()]
    if not config.evaluation.teacher:
        say("the teacher is not evaluated, since evaluation.teacher is false")
    if len(missing) < len(jobs):
        say(f"evaluation: {len(jobs) - len(missing)} of {len(jobs)} results reused")
    foreign = [job for job in missing if job.model_id == TEACHER and config.teacher.endpoint]
    if ours := [job for job in missing if job not in foreign]:
        with ray_session(config):
            if config.evaluation.through == "engines":
                for job in ours:
                    _sample_job(job, run, config)
            else:
                _serve_jobs(ours, run, config)
    for job in foreign:
        _ask_job(job, run, config)


def _serve_jobs(jobs: list[_Job], run: RunFolder, config: RunConfig) -> None:
    """Through the endpoint; models load one after the other unless serving.resident="all"."""
    wanted = {job.model_id for job in jobs}
    models = [model for model in served_models(run, config) if model.model_id in wanted]
    if config.serving.resident == "best":
        models = in_turn(models)
    try:
        endpoint = start_serving(models, config, idle_s=_IDLE_S)
        for job in jobs:
            _serve_job(job, endpoint, run, config)
    finally:
        stop_serving(config)


def _jobs(run: RunFolder, config: RunConfig) -> list[_Job]:
    teacher = [TEACHER] if config.evaluation.teacher else []
    epochs = {student_id(epoch): epoch for epoch in published_epochs(run, config)}
    # With one epoch there is no best one to choose.
    chosen = epochs if len(epochs) > 1 and _prompts(config, "validation") else {}
    return [
        _Job(model_id, split, epochs.get(model_id, 0))
        for model_id in (BASE, *teacher, *epochs)
        for split in ("validation", "test")
        if split == "test" or model_id in chosen
    ]


def _prompts(config: RunConfig, split: Any) -> list[Prompt]:
    return load_prompts(config.task, split, config.run.seed)


def _serve_job(job: _Job, endpoint: Endpoint, run: RunFolder, config: RunConfig) -> None:
    prompts = _prompts(config, job.split)
    say(f"evaluating {job.model_id} on {len(prompts)} {job.split} prompts")
    endpoint.warm(job.model_id)
    _keep(job, run, *measure(endpoint.url, job.model_id, job.split, prompts, config))


def _sample_job(job: _Job, run: RunFolder, config: RunConfig) -> None:
    prompts, start = _prompts(config, job.split), time.monotonic()
    say(f"evaluating {job.model_id} on {len(prompts)} {job.split} prompts")
    answers = answers_of(job.model_id, job.epoch, prompts, run, config)
    answers = with_verdicts(answers, prompts, _grader(config))
    result = result_of_answers(prompts, answers, config.task.name, job.split, start)
    facts = {"model": job.model_id, "max_tokens": config.evaluation_tokens}
    _keep(job, run, result | facts, answers)


def _ask_job(job: _Job, run: RunFolder, config: RunConfig) -> None:
    prompts = _prompts(config, job.split)
    say(f"evaluating {config.teacher.title} on {len(prompts)} {job.split} prompts")
    _keep(job, run, *measure_foreign_teacher(job.split, prompts, config, _grader(config)))


def _keep(job: _Job, run: RunFolder, result: dict[str, Any], answers: list[Answer]) -> None:
    target = run.evaluation(job.name)
    behind = answers_file(target)
    mark(behind, storage.write_table(answers_table(answers), behind))
    # After the answers: they are there where it is.
    mark(target, storage.write_json(target, result))
    say(summary(result))


def _grader(config: RunConfig) -> Grader:
    return choose_grader(config.task, SampleStore(storage.location(config.run.store)))


def measure(
    url: str,
    model_id: str,
    split: str,
    prompts: list[Prompt],
    config: RunConfig,
    key_variable: str = KEY_VARIABLE,
) -> tuple[dict[str, Any], list[Answer]]:
    """measure_accuracy with the limits of `config`, and a progress bar."""
    asking = Asking(
        url=url,
        model=model_id,
        max_tokens=config.evaluation_tokens,
        concurrency=config.evaluation.concurrency,
        timeout_s=config.evaluation.request_timeout_s,
        key_variable=key_variable,
    )
    right = seen = 0
    with progress(f"{model_id} {split}", len(prompts)) as bar:

        def on_answer(answer: Answer) -> None:
            nonlocal right, seen
            right, seen = right + (answer.verdict == "right"), seen + 1
            bar.advance(1, **({"accuracy": right / seen} if answer.verdict else {}))

        return measure_accuracy(
            asking,
            prompts,
            task=config.task.name,
            split=split,
            grader=_grader(config),
            max_error_share=config.sampling.max_error_share,
            on_answer=on_answer,
        )


def summary(result: dict[str, Any]) -> str:
    """A result in one line."""
    return (
        f"{result['model']} {result['split']}: accuracy {result['accuracy']:.1%} "
        f"± {result['standard_error']:.1%} (n={result['n']}), unparsed {result['unparsed']:.1%}, "
        f"cut {result['cut']:.1%}, {result['errors']} errors, {result['seconds']:.0f} s"
    )
