"""Ray Data fans rows out over a pool of engines, or over actors that hold a model themselves."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pyarrow as pa

from cluster.errors import EngineNotReadyError
from cluster.sections import Engines
from cluster.session import own_error

Answers = TypeVar("Answers")


def through_engines(
    rows: Sequence[Any], worker: type, arguments: tuple[Any, ...], engines: Engines
) -> Iterator[pa.Table]:
    """What `worker(*arguments)` makes of batches of dataclass rows, as it comes and unordered.

    Workers hold no CPUs: they send what they get to the engines and wait. What queues there is what
    lets Ray Serve start more engines.
    """
    import ray

    compute = ray.data.ActorPoolStrategy(
        size=engines.max_engines,
        max_concurrent_calls_per_actor=engines.batches_in_flight,
        max_tasks_in_flight_per_actor=engines.batches_in_flight,
        enable_true_multi_threading=True,
    )
    return _run(rows, worker, arguments, engines, compute=compute, num_cpus=0)


def through_models(
    rows: Sequence[Any], worker: type, arguments: tuple[Any, ...], engines: Engines, on_gpu: bool
) -> Iterator[pa.Table]:
    """As `through_engines`, with workers that each hold a model, and what an engine would hold."""
    import ray

    resources: dict[str, Any] = {"num_cpus": engines.cpus_per_engine}
    if on_gpu:
        resources["num_gpus"] = 1
    compute = ray.data.ActorPoolStrategy(min_size=1, max_size=engines.max_engines)
    return _run(rows, worker, arguments, engines, compute=compute, **resources)


def _run(
    rows: Sequence[Any],
    worker: type,
    arguments: tuple[Any, ...],
    engines: Engines,
    **options: Any,
) -> Iterator[pa.Table]:
    import ray

    # Ray Data else raises an error of its own, in which on its way here ours is lost.
    ray.data.DataContext.get_current().raise_original_map_exception = True
    size = engines.batch_rows
    blocks = [
        pa.Table.from_pylist([vars(row) for row in rows[start : start + size]])
        for start in range(0, len(rows), size)
    ]
    answered: Any = ray.data.from_arrow(blocks).map_batches(
        worker,
        fn_constructor_args=arguments,
        batch_size=size,
        batch_format="pyarrow",
        **options,
    )
    try:
        yield from answered.iter_batches(batch_size=None, batch_format="pyarrow")
    except ray.exceptions.RayError as error:
        ours = own_error(error)
        if ours is None:
            raise
        # Ours are one line; what Ray Data has added is how to make it try again.
        raise type(ours)(str(ours).partition("\n")[0]) from None


def made_ready(handle: Any) -> Any:
    """A handle of engines whose router is there, for threads that share it.

    Ray Serve makes it at a handle's first use, one for each thread if several are the first. All
    report under the handle's name, the idle ones too, and the pool does not grow.
    """
    return handle.options()


def ask_patiently(ask: Callable[[], Answers], patience_s: float) -> Answers:
    """What an engine answers, asked again for `patience_s` while it is replaced or reloads.

    An engine that dies takes its batch with it, and Ray Serve brings up another. One that still
    reloads has the old weights for a moment after Serve calls the pool ready.
    """
    from ray.exceptions import RayActorError
    from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

    tries = Retrying(
        retry=retry_if_exception_type((RayActorError, EngineNotReadyError)),
        stop=stop_after_delay(patience_s),
        wait=wait_exponential(max=30),
        reraise=True,
    )
    return tries(ask)
