"""The stages of a recipe as work to be done: opened, sampled, trained, evaluated, reported."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from cluster.config import RunConfig
from cluster.errors import BadInputError
from cluster.lock import locked
from cluster.progress import console, hush, say, watched_board
from cluster.refusals import refuse_disks_of_nodes
from cluster.run_folder import RunFolder, check_recipe, open_run
from cluster.session import ray_session, result_of, settled
from cluster.soundness import set_aside_damaged
from cluster.storage import location, prove_writable, write_json


def check_stages(configs: Sequence[RunConfig]) -> None:
    """Print the plan of each stage of a run that is about to start.

    Raises BadInputError for all that they would refuse, and for what is out of reach.
    """
    from pipeline.plan import describe_plan, plan_run

    plans = [plan_run(config) for config in configs]
    _refuse(plans)
    for planned in plans:
        console().print(describe_plan(planned))


def tell_plans(configs: Sequence[RunConfig]) -> None:
    """Print the plan of each stage with a rendered prompt of each model, whatever is out of reach.

    Raises BadInputError for what they refuse, after that.
    """
    from pipeline.plan import describe_plan, plan_run

    plans = [plan_run(config) for config in configs]
    for planned in plans:
        console().print(describe_plan(planned, with_prompts=True))
    _refuse(plans, with_unseen=False)


def refuse_stages(configs: Iterable[RunConfig]) -> None:
    """Raise BadInputError for all that the plans of these stages would refuse; print nothing."""
    from pipeline.plan import plan_run

    _refuse(plan_run(config) for config in configs)


def _refuse(plans: Iterable[Any], with_unseen: bool = True) -> None:
    found = [
        message
        for planned in plans
        for message in [*(planned.unseen if with_unseen else []), *planned.refusals]
    ]
    if found:
        raise BadInputError("; ".join(dict.fromkeys(found)))


def open_stages(configs: Sequence[RunConfig]) -> Iterator[tuple[RunFolder, RunConfig]]:
    """The stages, each open for one round of the loop over them, after a look at all of them."""
    check_stages(configs)
    for config in configs:
        with open_stage(config) as folder:
            yield folder, config


@contextmanager
def open_stage(config: RunConfig) -> Iterator[RunFolder]:
    """Start or go on with a stage's folder, and say what is there already.

    Raises BadInputError where another process works in it.
    """
    goes_on = check_recipe(config).config_file.exists()
    prove_writable("run.folder", location(config.run.folder))
    prove_writable("run.store", location(config.run.store))
    with locked(location(config.run.folder)):
        folder = open_run(config)
        hush(folder.log_file)
        set_aside_damaged(folder)
        if goes_on:
            say(f"going on with the run in {folder.root}")
            for line in folder.describe(config.training.epochs):
                say(f"  {line}")
        yield folder


def run_stage(folder: RunFolder, config: RunConfig, keep_engines: bool = False) -> None:
    """Sample, pair, train, resample, evaluate, remove what training.keep lets go, and report.

    With `keep_engines` they stay up where the cluster does, for a run that shares their pool.
    """
    from evals.keeping import thin_out
    from evals.report import write_report
    from evals.stage import evaluate

    with _data_plane(folder, config, keep_engines) as (config, resampler, board):
        _train(folder, config, resampler, board)
        evaluate(folder, config)
    thin_out(folder, config)
    write_report(folder, config)
    if not folder.finished_file.exists():
        write_json(folder.finished_file, {"date": datetime.now(UTC).isoformat(timespec="seconds")})


def train_stage(folder: RunFolder, config: RunConfig) -> None:
    """Sample, pair, train and resample."""
    with _data_plane(folder, config) as (config, resampler, board):
        _train(folder, config, resampler, board)


def sample_stage(folder: RunFolder, config: RunConfig) -> None:
    """Sample, and draw the pairs of the first epoch."""
    with _data_plane(folder, config) as (_, resampler, _):
        result_of(resampler.prepare_epoch.remote(1))


@contextmanager
def _data_plane(
    folder: RunFolder, config: RunConfig, keep_engines: bool = False
) -> Iterator[tuple[RunConfig, Any, Any]]:
    """Ray and what it settles, the resampler, and the board on which remote work shows itself."""
    import ray

    from pipeline.pool import release_engines
    from pipeline.resampler import start_resampler

    with ray_session(config) as all_ends, watched_board() as board:
        refuse_disks_of_nodes(config)
        config = settled(config)
        resampler = start_resampler(folder, config, board)
        try:
            yield config, resampler, board
        finally:
            if not all_ends:
                ray.kill(resampler)
                if not keep_engines:
                    release_engines(config)


def _train(folder: RunFolder, config: RunConfig, resampler: Any, board: Any) -> None:
    from training.stage import train

    if config.training.epochs == 0:
        return
    result_of(resampler.prepare_epoch.remote(1))
    train(folder, config, resampler, board)
    if config.evaluation.through == "endpoint":
        result_of(resampler.release.remote())
