"""What a run has to do, counted before anything is sampled: traces, pairs, steps, operations."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil

from cluster.config import RunConfig
from cluster.memory import Batch
from cluster.sections import Model, Task, Teacher
from cluster.speed import Work
from pipeline.pairs import draws_from_latest
from pipeline.tasks import TASKS
from pipeline.verdicts.choice import has_verdicts

ASSUMED_RIGHT = 0.5  # share of the teacher's traces, before any is sampled
ASSUMED_PROMPT = 200  # tokens of a prompt, before any is seen
# A forward pass takes two operations for each parameter and token, a backward pass four more, and
# recomputed activations two more.
_FORWARD, _STEP, _RECOMPUTED_STEP = 2, 6, 8

Parameters = Mapping[str, int]  # of "student" and each teacher that this cluster runs


@dataclass(frozen=True)
class Sizes:
    """How many prompts there are, and how long the longest is in tokens."""

    train: int
    validation: int
    test: int
    prompt: int = ASSUMED_PROMPT


def known_sizes(task: Task) -> Sizes | None:
    """What is known of a task's data before they are loaded; None where it is too little."""
    on_hub = TASKS[task.name].hub_sizes if task.name in TASKS and task.data is None else None
    train, test = task.train_prompts, task.test_prompts
    if on_hub:
        train, test = train or on_hub[0], test or on_hub[1]
    if train is None or test is None:
        return None
    return Sizes(train, task.validation_prompts or test, test)


def local_teachers(config: RunConfig) -> dict[str, Teacher]:
    """The teachers that this cluster runs, by the names of their traces."""
    return {name: each for name, each in config.teachers.items() if not each.endpoint}


def local_models(config: RunConfig) -> dict[str, Model]:
    """The models that this cluster runs: teachers without an endpoint, and the student."""
    return {**local_teachers(config), "student": config.student}


def resampled_epochs(config: RunConfig) -> list[int]:
    """Epochs for which the student after the one before is sampled, while trainers wait."""
    epochs = range(1, config.training.epochs + 1)
    drawn = [epoch for epoch in epochs if draws_from_latest(epoch, config.pairs.phi_in(epoch))]
    return drawn if config.contrasts else []


def asks_engines_while_training(config: RunConfig) -> bool:
    """Whether engines sample or score between two epochs, beside trainers that hold their place."""
    scores = bool(config.scored_by)
    samples = bool(resampled_epochs(config)) or base_rounds(config) > 1
    return config.training.epochs > 1 and (scores or samples)


def student_rounds(config: RunConfig) -> int:
    """How often a student, the base one or a later one, answers all training prompts."""
    return base_rounds(config) + len(resampled_epochs(config))


def base_rounds(config: RunConfig) -> int:
    """How often the base student does, whose traces are negatives."""
    if not config.contrasts or config.pairs.negatives_from != "student":
        return 0
    last = config.training.epochs if config.pairs.base == "fresh" else 1
    epochs = range(1, min(last, config.training.epochs) + 1)
    return sum(epoch == 1 or config.pairs.phi_in(epoch) < 1 for epoch in epochs)


def right_share(config: RunConfig) -> float:
    """The share of a teacher's traces that is assumed to be learned from."""
    return ASSUMED_RIGHT if has_verdicts(config.task) else 1.0


def count_pairs(config: RunConfig, sizes: Sizes) -> int:
    """Pairs of an epoch, about."""
    samples = config.sampling.samples
    caps = [each.traces_per_prompt or samples for each in config.teachers.values()]
    pooled = sum(min(samples, cap) for cap in caps)
    per_prompt = min(pooled, config.pairs.positives_per_prompt or pooled)
    return ceil(sizes.train * per_prompt * right_share(config))


def count_steps(config: RunConfig, sizes: Sizes) -> int:
    """Optimizer steps of all epochs, about."""
    training = config.training
    one_pass = ceil(count_pairs(config, sizes) / training.global_batch)
    return training.epochs * (training.steps_per_epoch or one_pass)


def longest_batch(config: RunConfig, sizes: Sizes) -> Batch:
    """A worker's largest micro-batch: rows of a prompt, and of answers as long as they may be."""
    training = config.training
    answer = _answer_tokens(config, sizes, 1.0)
    answers = round(answer * (1 + config.contrasts))
    prompt = min(sizes.prompt, training.max_length)
    scored = answers + prompt * (training.nll_scope == "full")
    return Batch(training.micro_batch, prompt + answers, scored)


def _answer_tokens(config: RunConfig, sizes: Sizes, share: float) -> float:
    room = max(1, config.training.max_length - sizes.prompt)
    return min(config.sampling.max_new_tokens * share, room)


def sampled(config: RunConfig, sizes: Sizes, parameters: int, share: float) -> Work:
    """K traces of each training prompt."""
    traces = sizes.train * config.sampling.samples
    tokens = traces * config.sampling.max_new_tokens * share
    return Work(tokens, decoding=_FORWARD * tokens * parameters)


def trained(config: RunConfig, sizes: Sizes, parameters: int, share: float) -> Work:
    """All steps of all epochs."""
    training = config.training
    answers = (1 + config.contrasts) * _answer_tokens(config, sizes, share)
    rows = count_steps(config, sizes) * training.global_batch
    tokens = rows * (sizes.prompt + answers)
    each = _RECOMPUTED_STEP if training.gradient_checkpointing else _STEP
    return Work(tokens, training=each * tokens * parameters, starts=1)


def scored(config: RunConfig, sizes: Sizes, parameters: Parameters, share: float) -> Work:
    """Chosen and rejected answers of every epoch's pairs, under reference and teacher."""
    readers = {"reference": "student", "teacher": "teacher"}
    read = sum(parameters[readers[each]] for each in config.scored_by)
    answers = 2 * config.training.epochs * count_pairs(config, sizes)
    tokens = answers * (sizes.prompt + _answer_tokens(config, sizes, share))
    return Work(tokens * len(config.scored_by), training=_FORWARD * tokens * read)


def evaluated(config: RunConfig, sizes: Sizes, parameters: Parameters, share: float) -> Work:
    """Base, teacher and each epoch's student on test, students of several on validation too."""
    return sum(
        (
            Work(tokens := answers * config.evaluation_tokens * share, _FORWARD * tokens * size)
            for answers, size in _evaluations(config, sizes, parameters)
        ),
        Work(),
    )


def _evaluations(
    config: RunConfig, sizes: Sizes, parameters: Parameters
) -> Iterator[tuple[int, int]]:
    if not has_verdicts(config.task):
        return
    epochs = config.training.epochs
    yield (1 + epochs) * sizes.test, parameters["student"]
    if epochs > 1:
        yield epochs * sizes.validation, parameters["student"]
    if config.evaluation.teacher and not config.teacher.endpoint:
        yield sizes.test, parameters["teacher"]
