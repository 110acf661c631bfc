"""The graded traces of a run: whose they are, where they lie, and how they come there."""

from collections.abc import Sequence
from dataclasses import dataclass

from upath import UPath

from cluster import storage
from cluster.config import RunConfig
from cluster.errors import BadInputError
from cluster.marking import mark
from cluster.progress import say
from cluster.publishing import set_aside
from cluster.run_folder import RunFolder
from cluster.sections import Model, Teacher
from pipeline.foreign import ForeignWriter, foreign_writer
from pipeline.grading import NEGATIVES, POSITIVE, describe_traces, grade_samples, summary
from pipeline.rows import Prompt, Trace, from_table, to_table
from pipeline.sampling import Writer, make_writer, planned_keys, sample
from pipeline.store import SampleStore
from pipeline.verdicts.choice import choose_grader


@dataclass(frozen=True)
class Source:
    """Who writes traces, and which of all that it could write."""

    name: str  # of the file in completions/
    section: Model
    epoch: int = 0  # the student after it writes; 0 where the section's own model does
    first: int = 0  # the number of each prompt's first sample; other numbers are other draws


def teacher(name: str, config: RunConfig) -> Source:
    """A teacher, by its name in the recipe."""
    return Source(name, config.teachers[name])


def student(epoch: int, config: RunConfig) -> Source:
    """The student after an epoch 1, 2, ..., who writes N_e."""
    return Source(f"student_{epoch:03d}", config.student, epoch)


def base_student(epoch: int, config: RunConfig) -> Source:
    """The base student, as it writes the negatives N_0 that the pairs of `epoch` draw from."""
    section = config.base_student or config.student
    if config.pairs.base == "fresh" and epoch > 1:
        first = (epoch - 1) * config.sampling.samples
        return Source(f"base_{epoch:03d}", section, first=first)
    return Source("student_000", section)


class Traces:
    """The traces that a run has, and those that it samples because it has them not."""

    def __init__(
        self, run: RunFolder, config: RunConfig, prompts: Sequence[Prompt], on_gpu: bool
    ) -> None:
        self._run, self._config = run, config
        self._prompts, self._on_gpu = prompts, on_gpu
        self._store = SampleStore(storage.location(config.run.store))

    def of(self, source: Source) -> list[Trace]:
        """The graded traces of a source, sampled now if the run has none.

        Those of a student that was made again, and is not the same to the last bit, are set aside.
        Raises BadInputError where those that it has answer other prompts, or are of another model.
        """
        path, writer = self._run.completions(source.name), self.writer(source)
        planned = planned_keys(writer, self._prompts, self._config, source.first)
        if source.epoch and path.exists() and _keys(self._read(path)) != planned:
            set_aside(path)
        if not path.exists():
            self._sample(source, writer)
        traces = self._read(path)
        if _keys(traces) != planned:
            raise BadInputError(
                f"{path} was sampled from other data, or by another model, than are now at the "
                "places that the recipe names: put those back, or set run.folder to a new folder"
            )
        return traces

    def _read(self, path: UPath) -> list[Trace]:
        return from_table(Trace, storage.read_parquet(path))

    def _sample(self, source: Source, writer: Writer | ForeignWriter) -> None:
        config, prompts = self._config, self._prompts
        teaches = isinstance(source.section, Teacher)
        samples = sample(writer, prompts, config, self._store, self._on_gpu, source.first)
        traces = grade_samples(
            samples,
            prompts,
            source.epoch,
            POSITIVE if teaches else NEGATIVES[config.pairs.negatives],
            config.sampling.max_rouge_l,
            choose_grader(config.task, self._store),
        )
        figures = describe_traces(traces)
        target = self._run.completions(source.name)
        mark(target, storage.write_table(to_table(Trace, traces), target))
        record = self._run.record_ahead if source.first else self._run.record
        record(stage="sample", model=source.name, epoch=source.epoch, **figures)
        say(f"{source.name}: {summary(figures)}")

    def writer(self, source: Source) -> Writer | ForeignWriter:
        """Who writes these traces: a model of this cluster, or one that others serve."""
        if isinstance(source.section, Teacher) and source.section.endpoint:
            kind = self._prompts[0].kind
            return foreign_writer(source.name, source.section, self._config, kind)
        return self.reader(source)

    def reader(self, source: Source) -> Writer:
        """A model of this cluster."""
        model = str(self._run.checkpoint(source.epoch)) if source.epoch else source.section.model
        kind = self._prompts[0].kind
        return make_writer(source.name, model, source.section, self._config, kind)


def _keys(traces: Sequence[Trace]) -> set[str]:
    return {trace.key for trace in traces}
