"""Which models of a run are served, under which ids, and which epoch's student is the best."""

import json
from dataclasses import dataclass, replace

from cluster.config import RunConfig
from cluster.publishing import is_published
from cluster.run_folder import RunFolder
from cluster.sections import Model
from pipeline.chat import load_chat
from serving.routes import Route

BASE, TEACHER, STUDENT = "base", "teacher", "student"


@dataclass(frozen=True)
class ServedModel:
    """One model id of the endpoint. Ids hold no ":", which ray.serve.llm reads as a LoRA's."""

    model_id: str
    reference: str  # what resolve_model takes; each engine resolves it on its own node
    digest: str | None = None  # that the resolved folder must have; None is not checked
    dtype: str = "bfloat16"
    chat_template: str | None = None  # Jinja text; None is the folder's own
    trust_remote_code: bool = False
    few_shot: tuple[tuple[str, str], ...] = ()  # (user message, answer) turns before the caller's
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # the chat template's end of turn
    resident: bool = True  # False: started by its first request, stopped when idle

    @property
    def engine_key(self) -> tuple[str, str, str | None, bool]:
        """What two ids must have in common to share an engine."""
        weights = self.digest or self.reference
        return weights, self.dtype, self.chat_template, self.trust_remote_code


@dataclass(frozen=True)
class ServedEngine:
    """One engine, named after the first id that it answers for."""

    engine_id: str
    model: ServedModel
    resident: bool


def student_id(epoch: int) -> str:
    """The model id of the student after an epoch."""
    return f"student-epoch-{epoch}"


def evaluation_name(model_id: str, split: str) -> str:
    """The name of a result in the run folder's evals/."""
    return f"{model_id}_{split}"


def engines_of(models: list[ServedModel]) -> dict[str, ServedEngine]:
    """Model id -> its engine; ids of equal weights, dtype and template share one."""
    by_key: dict[tuple[str, str, str | None, bool], ServedEngine] = {}
    for model in models:
        first = by_key.get(model.engine_key)
        if first is None:
            by_key[model.engine_key] = ServedEngine(model.model_id, model, model.resident)
        elif model.resident:
            by_key[model.engine_key] = replace(first, resident=True)
    return {model.model_id: by_key[model.engine_key] for model in models}


def routes_of(models: list[ServedModel]) -> dict[str, Route]:
    """Model id -> what the ingress does with its requests."""
    engines = engines_of(models)
    return {
        model.model_id: Route(
            engines[model.model_id].engine_id, model.few_shot, model.stop, model.stop_token_ids
        )
        for model in models
    }


def published_epochs(run: RunFolder, config: RunConfig) -> list[int]:
    """Epochs whose checkpoint is in the run folder."""
    trained = trained_epochs(run, config)
    return [epoch for epoch in trained if is_published(run.checkpoint(epoch))]


def trained_epochs(run: RunFolder, config: RunConfig) -> list[int]:
    """These, and the epochs whose checkpoint training.keep has let go."""
    return [epoch for epoch in range(1, config.training.epochs + 1) if run.was_published(epoch)]


def best_epoch(run: RunFolder, epochs: list[int]) -> int | None:
    """The epoch with the highest validation accuracy, the earlier of equals.

    The last of `epochs` where not every one was evaluated on validation; None where there is none.
    """
    accuracies = {}
    for epoch in epochs:
        result = run.evaluation(evaluation_name(student_id(epoch), "validation"))
        if result.exists():
            accuracies[epoch] = json.loads(result.read_text())["accuracy"]
    if len(accuracies) < len(epochs):
        return epochs[-1]
    return max(accuracies, key=lambda epoch: (accuracies[epoch], -epoch), default=None)


def served_models(run: RunFolder, config: RunConfig) -> list[ServedModel]:
    """Base, teacher, the student after each published epoch, and "student", the best of them.

    With serving.resident="best", only base and best student are resident. A teacher behind an
    endpoint is served there, and is left out.
    """
    from pipeline.tasks import TASKS, worked_examples

    everything = config.serving.resident == "all"
    base = model_of_section(BASE, config.student)
    models = [base]
    if not config.teacher.endpoint:
        shots = worked_examples(config.teacher, TASKS[config.task.name].kind)
        teacher = model_of_section(TEACHER, config.teacher)
        models.append(replace(teacher, few_shot=shots, resident=everything))
    epochs = published_epochs(run, config)
    students = {
        epoch: replace(
            base,
            model_id=student_id(epoch),
            reference=str(run.checkpoint(epoch)),
            digest=None,
            chat_template=None,  # a checkpoint carries the template that it was trained with
            resident=everything,
        )
        for epoch in epochs
    }
    models += students.values()
    best = best_epoch(run, epochs)
    if best is not None:
        models.append(replace(students[best], model_id=STUDENT, resident=True))
    return models


def in_turn(models: list[ServedModel]) -> list[ServedModel]:
    """The models, none of them resident: where they are asked one after the other, they load so."""
    return [replace(model, resident=False) for model in models]


def model_of_section(model_id: str, section: Model) -> ServedModel:
    """A resident model of a section of the configuration."""
    from pipeline.models import model_digest, resolve_model

    folder = resolve_model(section.model)
    chat = load_chat(folder, section.chat_template, section.trust_remote_code)
    return ServedModel(
        model_id=model_id,
        reference=section.model,
        digest=model_digest(folder),
        dtype=section.dtype,
        chat_template=None if chat.template == chat.tokenizer.chat_template else chat.template,
        trust_remote_code=section.trust_remote_code,
        stop=section.stop,
        stop_token_ids=(chat.end_of_turn_id,),
    )
