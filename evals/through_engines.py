"""Evaluation through the warm sampling engines: greedy samples, kept in the store."""

from dataclasses import replace

from cluster import storage
from cluster.config import RunConfig
from cluster.run_folder import RunFolder
from cluster.session import uses_gpu
from evals.accuracy import Answer, graded
from pipeline.rows import Prompt, Sample
from pipeline.sampling import Writer, make_writer, sample
from pipeline.store import SampleStore
from serving.models import BASE, TEACHER


def answers_of(
    model_id: str, epoch: int, prompts: list[Prompt], run: RunFolder, config: RunConfig
) -> list[Answer]:
    """A model's greedy answers, in the order of `prompts`; those that the store has are reused.

    `epoch` is that of a student, 0 for base and teacher. Needs a running Ray.
    """
    one = config.model_copy(update={"sampling": config.sampling.model_copy(update={"samples": 1})})
    writer = _greedy(_writer(model_id, epoch, prompts, run, config), config)
    store = SampleStore(storage.location(config.run.store))
    samples = sample(writer, prompts, one, store, uses_gpu(config))
    return [_answer(prompt, found) for prompt, found in zip(prompts, samples, strict=True)]


def _writer(
    model_id: str, epoch: int, prompts: list[Prompt], run: RunFolder, config: RunConfig
) -> Writer:
    section = config.teacher if model_id == TEACHER else config.student
    trained = model_id not in (BASE, TEACHER)
    reference = str(run.checkpoint(epoch)) if trained else section.model
    return make_writer(model_id, reference, section, config, prompts[0].kind)


def _greedy(writer: Writer, config: RunConfig) -> Writer:
    decoding = replace(
        writer.decoding, temperature=0.0, top_p=1.0, max_new_tokens=config.evaluation_tokens
    )
    return replace(writer, decoding=decoding)


def _answer(prompt: Prompt, found: Sample) -> Answer:
    return graded(prompt, found.text, found.finish_reason, found.error)
