"""Running the cells of a table: in any order, over one store, going on at any cell."""

import time
from collections.abc import Sequence
from datetime import timedelta

from upath import UPath

from cluster.lock import locked
from cluster.progress import say
from cluster.run_folder import check_recipe
from cluster.session import ray_session
from cluster.storage import location, write_text
from evals.runs import open_stage, refuse_stages, run_stage
from evals.tables.figures import is_done, is_finished
from evals.tables.layout import as_csv, lines_of, markdown, page
from evals.tables.spec import Cell, TableSpec


def fill_table(spec: TableSpec, cells: Sequence[Cell]) -> UPath:
    """Run the cells that are not done yet, and write the table after each. Returns its file.

    Ray, and the engines where cells share a pool, stay up from cell to cell. Raises BadInputError
    for what any cell would refuse, before the first one starts, and where another process fills it.
    """
    for cell in cells:
        for config in cell.stages:
            check_recipe(config)  # those that are done too: a table is of one recipe
    with locked(location(spec.folder)):
        missing = [cell for cell in cells if not is_done(cell)]
        say(f"{spec.title}: {len(cells) - len(missing)} of {len(cells)} cells are done")
        if missing:
            refuse_stages(config for cell in missing for config in cell.stages)
            with ray_session(missing[0].stages[0]):
                _run_cells(spec, cells, missing)
        return _write(spec, cells)


def _run_cells(spec: TableSpec, cells: Sequence[Cell], missing: Sequence[Cell]) -> None:
    from pipeline.pool import release_engines

    try:
        began = time.monotonic()
        for done, cell in enumerate(missing):
            left = f" ({_left(began, done, len(missing))})" if done else ""
            say(f"cell {cells.index(cell) + 1} of {len(cells)}: {cell.name}{left}")
            for config in cell.stages:
                if not is_finished(config):  # as a part of another cell
                    with open_stage(config) as folder:
                        run_stage(folder, config, keep_engines=True)
            _write(spec, cells)
    finally:
        release_engines(missing[-1].stages[-1])


def _left(began: float, done: int, missing: int) -> str:
    each = (time.monotonic() - began) / done
    return f"eta {timedelta(seconds=round(each * (missing - done)))} at the pace of those before"


def _write(spec: TableSpec, cells: Sequence[Cell]) -> UPath:
    lines, target = lines_of(spec, cells), location(spec.folder) / "table.md"
    write_text(target.with_suffix(".csv"), as_csv(spec, lines))
    write_text(target.with_suffix(".html"), page(spec, lines))
    write_text(target, markdown(spec, lines))
    return target
