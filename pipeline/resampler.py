"""The mixed-policy resampler: a Ray actor that makes each epoch's pairs from what the run holds.

It keeps nothing but the run folder and the store, so a new one goes on where a killed one stopped.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cluster import storage
from cluster.config import RunConfig
from cluster.errors import BadInputError, RunError
from cluster.progress import attach, say
from cluster.publishing import is_published, publishing
from cluster.run_folder import RunFolder
from cluster.sections import Model
from cluster.session import uses_gpu
from pipeline.anchors import asked_of, fit_pairs
from pipeline.foreign import ForeignWriter, endpoint_keys, foreign_writer
from pipeline.grading import (
    NEGATIVES,
    POSITIVE,
    describe_traces,
    grade_samples,
    keep_anew,
    summary,
)
from pipeline.pairs import Pools, count_pairs, draw_pairs, draws_from_latest, pool
from pipeline.pool import release_engines
from pipeline.rows import Anchor, Pair, Prompt, Trace, from_table, to_table
from pipeline.sampling import Writer, make_writer, planned_keys, sample
from pipeline.scoring import score
from pipeline.store import SampleStore, ScoreStore
from pipeline.tasks import load_prompts, user_message
from pipeline.teachers import pool_teachers
from pipeline.verdicts.choice import choose_grader

COUNTS_FILE = "counts.json"
_STUDENT, _FRESH = "student_", "base_"  # with an epoch, names of traces
_REFERENCE = "reference"  # the student as this stage of the recipe found it


class MixedPolicyResampler:
    """Samples the teacher and the student as pairs ask for them, and draws the pairs."""

    def __init__(
        self,
        run: RunFolder,
        config: RunConfig,
        board: Any = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`environment` holds what this process may lack of the driver's: keys of endpoints."""
        attach(board)
        os.environ.update(environment or {})
        self._run, self._config = run, config
        self._on_gpu = uses_gpu(config)
        self._store = SampleStore(storage.location(config.run.store))
        self._prompts: list[Prompt] = load_prompts(config.task, "train", config.run.seed)

    def prepare_epoch(self, epoch: int) -> dict[str, int]:
        """Publish the pairs of `epoch` (1, 2, ...) unless they are there; give their counts.

        Needs the checkpoint of the epoch before where the pairs draw from its student.
        """
        folder = self._run.pairs(epoch)
        if not is_published(folder):
            pairs = self._draw_pairs(epoch)
            counts = {
                "prompts": len(self._prompts),
                "prompts_with_pairs": len({pair.prompt_id for pair in pairs}),
                **asdict(count_pairs(pairs)),
            }
            self._score(epoch, pairs)
            self._publish(epoch, pairs, counts)
            self._run.record(stage="pairs", epoch=epoch, **counts)
            say(
                f"epoch {epoch}: "
                + ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n)
            )
        if self._config.engines.between_epochs == "release":
            release_engines(self._config)
        return storage.read_json(folder / COUNTS_FILE)

    def sample_ahead(self, epoch: int) -> None:
        """Sample what the pairs of `epoch` need of the base student; an earlier one may train."""
        if epoch <= self._config.training.epochs and self._draws_from_base(epoch):
            self.traces(self._base(epoch))

    def release(self) -> None:
        """Give back the engines."""
        release_engines(self._config)

    def _draw_pairs(self, epoch: int) -> list[Pair]:
        positives = pool(self._positives(epoch))
        if not positives:
            raise RunError(
                f"no teacher has a right trace on any of {len(self._prompts)} prompts, so there "
                "is nothing to learn: look at completions/teacher.parquet; a stronger teacher, "
                "worked examples (teacher.few_shot) or easier prompts help"
            )
        wanted = self._config.pairs
        phi = wanted.phi_in(epoch)
        later = self._later_students(epoch) if self._draws_from_latest(epoch) else []
        pools = Pools(
            positives=positives,
            base=pool(self._base_negatives(epoch)) if self._draws_from_base(epoch) else {},
            later=[pool(self.traces(name)) for name in later],
        )
        messages = {prompt.prompt_id: user_message(prompt) for prompt in self._prompts}
        drawn = draw_pairs(
            messages,
            pools,
            epoch,
            phi,
            self._config.run.seed,
            wanted.positives_per_prompt,
            wanted.draw,
        )
        if not self._config.scored_by:
            return drawn
        chat = self._reader(_REFERENCE, 0).chat
        return fit_pairs(drawn, chat, self._config.training.max_length)

    def _score(self, epoch: int, pairs: list[Pair]) -> None:
        """Write what reference and teacher say of the pairs, for the methods that compare to it."""
        if not self._config.scored_by:
            return
        store = ScoreStore(storage.location(self._config.run.store))
        student, anchors = self._reader(_REFERENCE, 0), []
        for name in self._config.scored_by:
            reader = self._reader("teacher", 0) if name == "teacher" else student
            texts = asked_of(name, pairs, self._config, student.chat)
            scores = score(reader, texts, self._config, store, self._on_gpu)
            anchors += [
                Anchor(name, text.key, found.model, found.logp, found.tokens)
                for text, found in scores.items()
            ]
        storage.write_table(to_table(Anchor, anchors), self._run.scores(epoch))

    def _draws_from_latest(self, epoch: int) -> bool:
        phi = self._config.pairs.phi_in(epoch)
        return self._config.contrasts and draws_from_latest(epoch, phi)

    def _draws_from_base(self, epoch: int) -> bool:
        # phi = 1 asks for later students alone, so N_0 is not touched after the first epoch.
        alone = self._draws_from_latest(epoch) and self._config.pairs.phi_in(epoch) == 1
        return self._config.contrasts and not alone

    def _base(self, epoch: int) -> str:
        """The name of the base student's traces that the pairs of `epoch` draw from."""
        fresh = self._config.pairs.base == "fresh" and epoch > 1
        return f"{_FRESH}{epoch:03d}" if fresh else student_name(0)

    def _base_negatives(self, epoch: int) -> list[Trace]:
        if self._config.pairs.negatives_from == "student":
            return self.traces(self._base(epoch))
        usable = NEGATIVES[self._config.pairs.negatives]
        limit = self._config.sampling.max_rouge_l
        found = (keep_anew(self.traces(name), usable, limit) for name in self._config.teachers)
        return [trace for traces in found for trace in traces]

    def _later_students(self, epoch: int) -> list[str]:
        """Whose negatives the pairs of `epoch` may hold beside N_0's, the latest student first."""
        oldest = 1 if self._config.pairs.draw == "recent" else epoch - 1
        return [student_name(earlier) for earlier in range(epoch - 1, oldest - 1, -1)]

    def _positives(self, epoch: int) -> list[Trace]:
        """The pool of all teachers' right traces, teacher after teacher."""
        teachers = self._config.teachers
        traces = {name: self.traces(name) for name in teachers}
        caps = {name: teacher.traces_per_prompt for name, teacher in teachers.items()}
        pooled = pool_teachers(traces, caps, self._config.sampling.max_rouge_l)
        if len(teachers) > 1:
            counts = {name: len(entered) for name, entered in pooled.items()}
            self._run.record(stage="pool", epoch=epoch, **counts)
            shown = (f"{n} of {name} ({teachers[name].title})" for name, n in counts.items())
            say(f"positives: {', '.join(shown)}")
        return [trace for entered in pooled.values() for trace in entered]

    def traces(self, name: str) -> list[Trace]:
        """The graded traces of a teacher, of "student_NNN" or of "base_NNN", which are the base
        student's fresh ones for an epoch; sampled now if the run has none.

        Raises BadInputError where those that it has answer other prompts, or are of another model.
        """
        epoch = int(name.rpartition("_")[2]) if name.startswith(_STUDENT) else 0
        path, writer = self._run.completions(name), self._writer(name, epoch)
        if not path.exists():
            self._sample(name, epoch, writer)
        traces = from_table(Trace, storage.read_parquet(path))
        planned = planned_keys(writer, self._prompts, self._config, self._first(name))
        if {trace.key for trace in traces} != planned:
            raise BadInputError(
                f"{path} was sampled from other data, or by another model, than are now at the "
                "places that the recipe names: put those back, or set run.folder to a new folder"
            )
        return traces

    def _first(self, name: str) -> int:
        """The number of the first of these traces; those of another epoch are other draws."""
        before = int(name.removeprefix(_FRESH)) - 1 if name.startswith(_FRESH) else 0
        return before * self._config.sampling.samples

    def _sample(self, name: str, epoch: int, writer: Writer | ForeignWriter) -> None:
        teaches = name in self._config.teachers
        usable = POSITIVE if teaches else NEGATIVES[self._config.pairs.negatives]
        samples = sample(
            writer, self._prompts, self._config, self._store, self._on_gpu, self._first(name)
        )
        traces = grade_samples(
            samples,
            self._prompts,
            epoch,
            usable,
            self._config.sampling.max_rouge_l,
            choose_grader(self._config.task, self._store),
        )
        figures = describe_traces(traces)
        storage.write_table(to_table(Trace, traces), self._run.completions(name))
        self._run.record(stage="sample", model=name, epoch=epoch, **figures)
        say(f"{name}: {summary(figures)}")

    def _writer(self, name: str, epoch: int) -> Writer | ForeignWriter:
        teacher = self._config.teachers.get(name)
        if teacher and teacher.endpoint:
            return foreign_writer(name, teacher, self._config, self._prompts[0].kind)
        return self._reader(name, epoch)

    def _reader(self, name: str, epoch: int) -> Writer:
        """A model of this cluster."""
        config = self._config
        base = name == student_name(0) or name.startswith(_FRESH)
        student = config.base_student or config.student if base else config.student
        section: Model = config.teachers.get(name, student)
        reference = str(self._run.checkpoint(epoch)) if epoch else section.model
        return make_writer(name, reference, section, config, self._prompts[0].kind)

    def _publish(self, epoch: int, pairs: list[Pair], counts: dict[str, int]) -> None:
        with publishing(self._run.pairs(epoch)) as folder:
            place = storage.location(str(folder))
            storage.write_table(to_table(Pair, pairs), place / "pairs.parquet")
            storage.write_json(place / COUNTS_FILE, counts)


def student_name(epoch: int) -> str:
    """The name of a student's traces in completions/; epoch 0 is the base student."""
    return f"{_STUDENT}{epoch:03d}"


def start_resampler(run: RunFolder, config: RunConfig, board: Any) -> Any:
    """The resampler as an actor of no CPUs, restarted where it dies."""
    import ray

    actor = ray.remote(MixedPolicyResampler)
    return actor.options(num_cpus=0, max_restarts=-1, max_task_retries=3).remote(
        run, config, board, endpoint_keys(config)
    )
