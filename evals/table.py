"""The table of results for the terminal."""

from rich.table import Table

from cluster.config import RunConfig
from cluster.run_folder import RunFolder
from evals.results import Result, percent, percent_with_error, read_results


def results_table(run: RunFolder, config: RunConfig | None = None) -> Table:
    """Accuracy with its standard error, unparsed share and accuracy given a parsed answer."""
    config = config or run.load_config()
    results = read_results(run, config)
    title = f"{config.task.name}: nothing is evaluated"
    if results:
        n = results[0].test["n"]
        title = f"{config.task.name}, test, n = {n}, greedy, in percent ± standard error"
    # Without lines and within 80 columns, since it also ends up in logs.
    table = Table(
        title=title,
        title_justify="left",
        caption=_caption(results),
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("model", no_wrap=True)
    for title in ("accuracy", "95 % CI", "unparsed", "if parsed"):
        table.add_column(title, justify="right")
    with_validation = any(result.validation for result in results)
    if with_validation:
        table.add_column("validation", justify="right")
    for result in results:
        table.add_row(*_cells(result, with_validation), style="bold" if result.best else None)
    return table


def _caption(results: list[Result]) -> str | None:
    best = next((result for result in results if result.best), None)
    if best is None:
        return None
    validated = [result.validation["accuracy"] for result in results if result.validation]
    is_best = best.validation and best.validation["accuracy"] == max(validated)
    return f"* {'the best on validation, ' if is_best else ''}served as student"


def _short(label: str) -> str:
    return label.partition(" (")[0].removeprefix("student ")


def _cells(result: Result, with_validation: bool) -> list[str]:
    low, high = result.test["interval_95"]
    cells = [
        _short(result.label) + (" *" if result.best else ""),
        percent_with_error(result.test),
        f"{percent(low)}–{percent(high)}",
        percent(result.test["unparsed"]),
        percent(result.test["accuracy_given_parsed"]),
    ]
    if with_validation:
        cells.append(percent_with_error(result.validation) if result.validation else "–")
    return cells
