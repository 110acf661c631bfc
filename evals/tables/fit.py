"""Whether the cells of a table find room on its nodes, from what is known without their models."""

from collections.abc import Iterator, Sequence

from cluster.config import RunConfig
from cluster.errors import BadInputError
from evals.tables.plan import distinct_stages, sizes_of
from evals.tables.spec import Cell
from pipeline.fit import check_folders, check_labels, misfits
from pipeline.hub import known_shape
from pipeline.needs import Known, nodes_of, runs_on_gpu
from pipeline.work import local_models


def refuse_misfits(cells: Sequence[Cell]) -> None:
    """Raise BadInputError for what would find no room, each with the first cell that it stops.

    Models that are seen only where the table runs are planned there, before its first cell.
    """
    found: dict[str, str] = {}
    for cell, config in distinct_stages(cells):
        nodes = nodes_of(config)
        check_folders(config, nodes)
        check_labels(config, nodes)
        for message in _misfits(config):
            found.setdefault(message, cell.name)
    if found:
        raise BadInputError("; ".join(f"{cell}: {message}" for message, cell in found.items()))


def _misfits(config: RunConfig) -> Iterator[str]:
    models = {}
    for name, section in local_models(config).items():
        made_of = config.base_student if name == "student" else None
        shape = known_shape((made_of or section).model)
        if shape is None:
            return
        models[name] = section, shape
    nodes = nodes_of(config)
    yield from misfits(
        Known(config, models, sizes_of(config), nodes, bool(runs_on_gpu(config, nodes)))
    )
