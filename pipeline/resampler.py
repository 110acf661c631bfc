"""The mixed-policy resampler: a Ray actor that makes each epoch's pairs from what the run holds.

It keeps nothing but the run folder and the store, so a new one goes on where a killed one stopped.
"""

from dataclasses import asdict
from typing import Any

from cluster import storage
from cluster.config import RunConfig
from cluster.errors import BadInputError, RunError
from cluster.progress import attach, say
from cluster.run_folder import RunFolder
from cluster.sections import Model
from cluster.session import uses_gpu
from cluster.storage import is_published, publish_folder, staging_folder, write_table
from pipeline.engine import release_engines
from pipeline.grading import NEGATIVES, POSITIVE, describe_traces, grade_samples, summary
from pipeline.pairs import Pools, count_pairs, draw_pairs, draws_from_latest, pool
from pipeline.rows import Pair, Prompt, Trace, from_table, to_table
from pipeline.sampling import Writer, make_writer, plan_requests, sample
from pipeline.store import SampleStore
from pipeline.tasks import load_prompts, user_message
from pipeline.verdicts.choice import choose_grader

COUNTS_FILE = "counts.json"


class MixedPolicyResampler:
    """Samples the teacher and the student as pairs ask for them, and draws the pairs."""

    def __init__(self, run: RunFolder, config: RunConfig, board: Any = None) -> None:
        attach(board)
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
            self._publish(epoch, pairs, counts)
            self._run.record(stage="pairs", epoch=epoch, **counts)
            say(
                f"epoch {epoch}: "
                + ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n)
            )
        if self._config.engines.between_epochs == "release":
            release_engines(self._config)
        return storage.read_json(folder / COUNTS_FILE)

    def release(self) -> None:
        """Give back the engines."""
        release_engines(self._config)

    def _draw_pairs(self, epoch: int) -> list[Pair]:
        positives = pool(self.traces("teacher"))
        if not positives:
            raise RunError(
                f"the teacher has no right trace on any of {len(self._prompts)} prompts, so there "
                "is nothing to learn: look at completions/teacher.parquet; a stronger teacher, "
                "worked examples (teacher.few_shot) or easier prompts help"
            )
        phi = self._config.pairs.phi
        contrasts = self._config.training.method == "orpo"
        latest = contrasts and draws_from_latest(epoch, phi)
        # phi = 1 asks for the latest student alone, so N_0 is not touched after the first epoch.
        base = contrasts and not (latest and phi == 1)
        pools = Pools(
            positives=positives,
            base=pool(self.traces(student_name(0))) if base else {},
            latest=pool(self.traces(student_name(epoch - 1))) if latest else {},
        )
        messages = {prompt.prompt_id: user_message(prompt) for prompt in self._prompts}
        return draw_pairs(
            messages,
            pools,
            epoch,
            phi,
            self._config.run.seed,
            self._config.pairs.positives_per_prompt,
        )

    def traces(self, name: str) -> list[Trace]:
        """The graded traces of "teacher" or "student_NNN", sampled now if the run has none.

        Raises BadInputError where those that it has answer other prompts, or are of another model.
        """
        epoch = 0 if name == "teacher" else int(name.rpartition("_")[2])
        path, writer = self._run.completions(name), self._writer(name, epoch)
        if not path.exists():
            self._sample(name, epoch, writer)
        traces = from_table(Trace, storage.read_table(path))
        config = self._config
        asked = plan_requests(writer, self._prompts, config.sampling.samples, config.run.seed)
        if {trace.key for trace in traces} != {request.key for request in asked}:
            raise BadInputError(
                f"{path} was sampled from other data, or by another model, than are now at the "
                "places that the recipe names: put those back, or set run.folder to a new folder"
            )
        return traces

    def _sample(self, name: str, epoch: int, writer: Writer) -> None:
        usable = POSITIVE if name == "teacher" else NEGATIVES[self._config.pairs.negatives]
        samples = sample(writer, self._prompts, self._config, self._store, self._on_gpu)
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

    def _writer(self, name: str, epoch: int) -> Writer:
        kind = self._prompts[0].kind
        section: Model = self._config.teacher if name == "teacher" else self._config.student
        reference = str(self._run.checkpoint(epoch)) if epoch else section.model
        return make_writer(name, reference, section, self._config, kind)

    def _publish(self, epoch: int, pairs: list[Pair], counts: dict[str, int]) -> None:
        folder = self._run.pairs(epoch)
        staging = staging_folder(folder)
        write_table(to_table(Pair, pairs), storage.location(str(staging / "pairs.parquet")))
        storage.write_json(storage.location(str(staging / COUNTS_FILE)), counts)
        publish_folder(staging, folder)


def student_name(epoch: int) -> str:
    """The name of a student's traces in completions/; epoch 0 is the base student."""
    return f"student_{epoch:03d}"


def start_resampler(run: RunFolder, config: RunConfig, board: Any) -> Any:
    """The resampler as an actor of no CPUs, restarted where it dies."""
    import ray

    actor = ray.remote(MixedPolicyResampler)
    return actor.options(num_cpus=0, max_restarts=-1, max_task_retries=3).remote(run, config, board)


def stop_resampler(resampler: Any, config: RunConfig) -> None:
    """End the actor, and give back its engines, which else outlive the run on a joined cluster."""
    import ray

    ray.kill(resampler)
    release_engines(config)
