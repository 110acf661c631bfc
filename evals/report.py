"""A run's report (report.html, one file without a script) and its model card (README.md)."""

import json
from pathlib import Path
from typing import Any

import yaml

from cluster import storage
from cluster.config import RunConfig
from cluster.run_folder import RunFolder
from evals.audit import audit_run, read_pairs
from evals.charts import accuracy_chart, share, training_curves
from evals.results import Result, percent, percent_with_error, read_results
from evals.stage import answers_file
from pipeline.rows import Pair
from pipeline.verdicts.choice import has_verdicts
from serving.models import evaluation_name

_TEMPLATES = Path(__file__).parent / "templates"
_SAMPLES = 4


def write_report(run: RunFolder, config: RunConfig) -> None:
    """Write report.html and README.md from the files of the run, as far as it has come."""
    results = read_results(run, config)
    facts = {
        "config": config,
        "results": results,
        "best": next((result for result in results if result.best), None),
        "base": next((result for result in results if result.model_id == "base"), None),
        "environment": _environment(run),
        "folder": run.root.name,
        "graded": has_verdicts(config.task),
    }
    page = _render("report.html", facts | _details(run, config, results), escape=True)
    (run.root / "report.html").write_text(page, encoding="utf-8")
    card = _render("model_card.md", facts, escape=False)
    (run.root / "README.md").write_text(card, encoding="utf-8")


def _details(run: RunFolder, config: RunConfig, results: list[Result]) -> dict[str, Any]:
    from markupsafe import Markup

    charts = [accuracy_chart(results)] if results else []
    charts += training_curves(_training_steps(run))
    return {
        "charts": [Markup(chart) for chart in charts],  # made by Vega, which escapes texts
        "audit": audit_run(run, config),
        "pairs": _sample_pairs(run, config),
        "answers": _sample_answers(run, results),
        "config_text": yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
    }


def _render(name: str, facts: dict[str, Any], escape: bool) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "with_error": percent_with_error}
    environment.globals |= {"share": share}
    return environment.get_template(name).render(**facts)


def _training_steps(run: RunFolder) -> list[dict[str, Any]]:
    """Steps in order; of a step that a resumed run took again, the later line."""
    steps = {line["step"]: line for line in run.records() if line.get("stage") == "train"}
    return [steps[step] for step in sorted(steps)]


def _environment(run: RunFolder) -> dict[str, Any]:
    file = run.root / "environment.json"
    return (
        json.loads(file.read_text())
        if file.exists()
        else {"packages": {}, "platform": "unknown", "commit": None}
    )


def _sample_pairs(run: RunFolder, config: RunConfig) -> list[Pair]:
    for epoch in range(config.training.epochs, 0, -1):
        if pairs := read_pairs(run, epoch):
            contrasted = [pair for pair in pairs if pair.rejected is not None]
            by_prompt = {pair.prompt_id: pair for pair in contrasted or pairs}
            return list(by_prompt.values())[:_SAMPLES]
    return []


def _sample_answers(run: RunFolder, results: list[Result]) -> list[dict[str, Any]]:
    """The same test problems as base and best student answered them."""
    shown = [result for result in results if result.model_id == "base" or result.best]
    samples = []
    for result in shown:
        file = answers_file(run.evaluation(evaluation_name(result.model_id, "test")))
        if file.exists():
            rows = storage.read_parquet(file).sort_by("prompt_id").slice(0, _SAMPLES).to_pylist()
            samples += [{"model": result.label, **row} for row in rows]
    return sorted(samples, key=lambda sample: sample["prompt_id"])
