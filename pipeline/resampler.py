"""The mixed-policy resampler: a Ray actor that makes each epoch's pairs from what the run holds.

It keeps nothing but the run folder and the store, so a new one goes on where a killed one stopped.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cluster import storage
from cluster.config import RunConfig
from cluster.errors import RunError
from cluster.marking import mark
from cluster.placement import beside_driver
from cluster.progress import attach, say
from cluster.publishing import is_published, publishing
from cluster.run_folder import RunFolder
from cluster.session import uses_gpu
from pipeline.anchors import asked_of, fit_pairs
from pipeline.foreign import endpoint_keys
from pipeline.grading import NEGATIVES, keep_anew
from pipeline.pairs import Pools, count_pairs, draw_pairs, draws_from_latest, pool
from pipeline.pool import release_engines
from pipeline.rows import Anchor, Pair, Prompt, Trace, to_table
from pipeline.scoring import score
from pipeline.store import ScoreStore
from pipeline.tasks import load_prompts, user_message
from pipeline.teachers import pool_teachers
from pipeline.traces import Source, Traces, base_student, student, teacher

COUNTS_FILE = "counts.json"


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
        self._prompts: list[Prompt] = load_prompts(config.task, "train", config.run.seed)
        self._traces = Traces(run, config, self._prompts, self._on_gpu)
        # The student as this stage of the recipe found it.
        self._reference = Source("reference", config.student)

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
                **asdict(count_pairs(pairs, self._config.pairs)),
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
            self._traces.of(base_student(epoch, self._config))

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
            later=[pool(self._traces.of(source)) for source in later],
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
        chat = self._traces.reader(self._reference).chat
        return fit_pairs(drawn, chat, self._config.training.max_length)

    def _score(self, epoch: int, pairs: list[Pair]) -> None:
        """Write what reference and teacher say of the pairs, for the methods that compare to it."""
        if not self._config.scored_by:
            return
        store = ScoreStore(storage.location(self._config.run.store))
        reference, anchors = self._traces.reader(self._reference), []
        for name in self._config.scored_by:
            teaches = name == "teacher"
            reader = self._traces.reader(teacher(name, self._config)) if teaches else reference
            texts = asked_of(name, pairs, self._config, reference.chat)
            scores = score(reader, texts, self._config, store, self._on_gpu)
            anchors += [
                Anchor(name, text.key, found.model, found.logp, found.tokens)
                for text, found in scores.items()
            ]
        target = self._run.scores(epoch)
        mark(target, storage.write_table(to_table(Anchor, anchors), target))

    def _draws_from_latest(self, epoch: int) -> bool:
        phi = self._config.pairs.phi_in(epoch)
        return self._config.contrasts and draws_from_latest(epoch, phi)

    def _draws_from_base(self, epoch: int) -> bool:
        # phi = 1 asks for later students alone, so N_0 is not touched after the first epoch.
        alone = self._draws_from_latest(epoch) and self._config.pairs.phi_in(epoch) == 1
        return self._config.contrasts and not alone

    def _base_negatives(self, epoch: int) -> list[Trace]:
        if self._config.pairs.negatives_from == "student":
            return self._traces.of(base_student(epoch, self._config))
        usable = NEGATIVES[self._config.pairs.negatives]
        limit = self._config.sampling.max_rouge_l
        found = (keep_anew(traces, usable, limit) for traces in self._of_teachers().values())
        return [trace for traces in found for trace in traces]

    def _later_students(self, epoch: int) -> list[Source]:
        """Whose negatives the pairs of `epoch` may hold beside N_0's, the latest student first."""
        oldest = 1 if self._config.pairs.draw == "recent" else epoch - 1
        return [student(earlier, self._config) for earlier in range(epoch - 1, oldest - 1, -1)]

    def _of_teachers(self) -> dict[str, list[Trace]]:
        config = self._config
        return {name: self._traces.of(teacher(name, config)) for name in config.teachers}

    def _positives(self, epoch: int) -> list[Trace]:
        """The pool of all teachers' right traces, teacher after teacher."""
        teachers = self._config.teachers
        caps = {name: section.traces_per_prompt for name, section in teachers.items()}
        pooled = pool_teachers(self._of_teachers(), caps, self._config.sampling.max_rouge_l)
        if len(teachers) > 1:
            counts = {name: len(entered) for name, entered in pooled.items()}
            self._run.record(stage="pool", epoch=epoch, **counts)
            shown = (f"{n} of {name} ({teachers[name].title})" for name, n in counts.items())
            say(f"positives: {', '.join(shown)}")
        return [trace for entered in pooled.values() for trace in entered]

    def _publish(self, epoch: int, pairs: list[Pair], counts: dict[str, int]) -> None:
        with publishing(self._run.pairs(epoch)) as folder:
            place = storage.location(str(folder))
            storage.write_table(to_table(Pair, pairs), place / "pairs.parquet")
            storage.write_json(place / COUNTS_FILE, counts)


def start_resampler(run: RunFolder, config: RunConfig, board: Any) -> Any:
    """The resampler as an actor of no CPUs beside the driver, restarted where it dies."""
    import ray

    actor = ray.remote(MixedPolicyResampler)
    return actor.options(num_cpus=0, max_restarts=-1, max_task_retries=3, **beside_driver()).remote(
        run, config, board, endpoint_keys(config)
    )
