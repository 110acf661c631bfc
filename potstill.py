"""The command line of Potstill: plan, run, serve, ask, eval and the rest."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.config import RunConfig, load_config
from cluster.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, BadInputError, RunError
from cluster.progress import console, hush, say, watched_board
from cluster.run_folder import RunFolder, check_recipe, open_run
from cluster.session import ray_session, result_of, starts_own_cluster
from cluster.storage import cache_folder, location

app = typer.Typer(
    help="Distil large language models into small ones on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="Prepare and prune models.", no_args_is_help=True)
app.add_typer(models_app, name="models")

_SIGINT_EXIT = 130  # what Typer makes of Ctrl-C

Config = Annotated[Path, typer.Argument(help="A recipe, such as configs/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Options to change: section.key=value ...")
]
RunPath = Annotated[str, typer.Argument(help="The folder or URL of a run.")]


@app.command()
def plan(config: Config, overrides: Overrides = None) -> None:
    """Print what a run would do and cost, and all it would refuse. Starts no model."""
    from pipeline.plan import describe_plan, plan_run

    described = plan_run(load_config(config, overrides))
    console().print(describe_plan(described, with_prompts=True))
    if described.refusals:
        raise BadInputError("; ".join(described.refusals))


@app.command()
def run(config: Config, overrides: Overrides = None) -> None:
    """Sample, pair, train, resample, serve and evaluate; goes on where an earlier try stopped."""
    from evals.stage import evaluate

    folder, settings = _start(config, overrides)
    with _data_plane(folder, settings) as (resampler, board):
        _train(folder, settings, resampler, board)
        evaluate(folder, settings)
    _finish(folder, settings)


@app.command()
def sample(config: Config, overrides: Overrides = None) -> None:
    """Only sample and grade, and draw the pairs of the first epoch."""
    folder, settings = _start(config, overrides)
    with _data_plane(folder, settings) as (resampler, _):
        result_of(resampler.prepare_epoch.remote(1))
    say(f"traces: {folder.root / 'completions'}, pairs: {folder.pairs(1)}")


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Sample, pair, train and resample, without the evaluation."""
    folder, settings = _start(config, overrides)
    with _data_plane(folder, settings) as (resampler, board):
        _train(folder, settings, resampler, board)
    say(f"students: {folder.root / 'checkpoints'}")


def _start(path: Path, overrides: list[str] | None) -> tuple[RunFolder, RunConfig]:
    config = load_config(path, overrides)
    _preflight(config)
    goes_on = check_recipe(config).config_file.exists()
    folder = open_run(config)
    hush(folder.log_file)
    if goes_on:
        say(f"going on with the run in {folder.root}")
        for line in folder.describe(config.training.epochs):
            say(f"  {line}")
    return folder, config


def _preflight(config: RunConfig) -> None:
    from pipeline.plan import describe_plan, plan_run

    planned = plan_run(config)
    if planned.refusals:
        raise BadInputError("; ".join(planned.refusals))
    console().print(describe_plan(planned))


@contextmanager
def _data_plane(folder: RunFolder, config: RunConfig) -> Iterator[tuple[Any, Any]]:
    """Ray, the resampler and the board on which remote work shows its progress."""
    from pipeline.resampler import start_resampler, stop_resampler

    with ray_session(config), watched_board() as board:
        resampler = start_resampler(folder, config, board)
        try:
            yield resampler, board
        finally:
            if not starts_own_cluster(config):  # our own ends with all that runs on it
                stop_resampler(resampler, config)


def _train(folder: RunFolder, config: RunConfig, resampler: Any, board: Any) -> None:
    from training.stage import train as train_student

    result_of(resampler.prepare_epoch.remote(1))
    train_student(folder, config, resampler, board)
    result_of(resampler.release.remote())


def _finish(folder: RunFolder, config: RunConfig) -> None:
    from evals.report import write_report
    from evals.table import results_table
    from serving.client import example_question, program

    write_report(folder, config)
    console().print(results_table(folder, config))
    say(f"report: {folder.root / 'report.html'}")
    say(f"serve:  {program()} serve {config.run.folder}")
    say(f"ask:    {example_question(config)}")


@app.command()
def serve(run: RunPath) -> None:
    """Serve base, teacher and every epoch's student of a run, until Ctrl-C."""
    from serving.stage import serve as serve_models

    folder, config = _existing(run)
    hush(folder.log_file)
    serve_models(folder, config)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: Annotated[str, typer.Option(help="A model id of the endpoint.")] = "student",
    url: Annotated[str, typer.Option(help="The endpoint.")] = "http://127.0.0.1:8000/v1",
    kind: Annotated[
        str | None, typer.Option(help="Word it as in training: number, choice or boolean.")
    ] = None,
) -> None:
    """Ask a served model a question, and stream its answer."""
    from pipeline.rows import parse_kind
    from serving.client import ask as ask_model

    ask_model(url, question, model, kind=parse_kind(kind))


@app.command("eval")
def evaluate_one(
    model: Annotated[str, typer.Option(help="A model folder, or an OpenAI-style URL.")],
    task: Annotated[str, typer.Option(help="A task, such as gsm8k.")],
    data: Annotated[str | None, typer.Option(help="Its data: an id, a file or a folder.")] = None,
    model_name: Annotated[str | None, typer.Option(help="The model id to ask a URL for.")] = None,
    prompts: Annotated[int | None, typer.Option(help="How many prompts; all by default.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 512,
    chat_template: Annotated[str | None, typer.Option(help="A folder's template.")] = None,
    answers: Annotated[Path | None, typer.Option(help="Write the answers here.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests under way at once.")] = 32,
    port: Annotated[int, typer.Option(help="Port on which a folder is served meanwhile.")] = 8000,
) -> None:
    """Evaluate a model on a task; the last line is one JSON object."""
    from evals.single import SingleEvaluation, evaluate_model

    hush(cache_folder() / "logs" / "eval.log")
    wanted = SingleEvaluation(
        model=model,
        task=task,
        data=data,
        model_name=model_name,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        chat_template=chat_template,
        answers=answers,
        concurrency=concurrency,
        port=port,
    )
    say(json.dumps(evaluate_model(wanted)))


@models_app.command("prepare")
def prepare(name: Annotated[str, typer.Argument(help="Such as smollm2-135m-instruct.")]) -> None:
    """Turn a model that travels as a package into a Hugging Face folder, once."""
    from pipeline.models import prepare_model

    say(f"{name}: {prepare_model(name)}")


@models_app.command("prune")
def prune(
    model: Annotated[str, typer.Argument(help="A model: folder, URL, id or packaged name.")],
    ratio: Annotated[float, typer.Option(help="Share of all parameters to remove, such as 0.2.")],
    out: Annotated[str, typer.Option(help="A new folder, or the URL of one.")],
    texts: Annotated[
        Path | None, typer.Option(help="Calibration texts of your own, one a line.")
    ] = None,
) -> None:
    """Remove the least important heads and MLP channels: a student that fits its teacher."""
    from training.pruning import prune_model

    hush(cache_folder() / "logs" / "prune.log")
    prune_model(model, ratio, out, texts)


@app.command()
def report(run: RunPath) -> None:
    """Write a run's report and model card anew, and print its table."""
    folder, config = _existing(run)
    _finish(folder, config)


@app.command()
def status(run: RunPath) -> None:
    """Print what a run has done so far."""
    folder, config = _existing(run)
    for line in folder.describe(config.training.epochs):
        say(line)
    say(f"last record: {folder.last_record()}")


def _existing(run: str) -> tuple[RunFolder, RunConfig]:
    folder = RunFolder(location(run))
    return folder, folder.load_config()


def _count_interruptions() -> list[int]:
    """The signals that asked the command to stop: what ends it then may be an error on its way."""
    received: list[int] = []

    def interrupt(number: int, _: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)
    return received


def main() -> None:
    """Run the command line: exit 2 for bad input, 75 for an interruption that can go on."""
    interruptions = _count_interruptions()
    try:
        app()
    except BadInputError as error:
        console().print(f"error: {error}", markup=False, style="red")
        sys.exit(EXIT_BAD_INPUT)
    except RunError as error:
        console().print(f"stopped: {error}", markup=False, style="red")
        sys.exit(1)
    except SystemExit as stop:
        interrupted = stop.code == _SIGINT_EXIT or (stop.code and interruptions)
        if not interrupted:
            raise
        say("interrupted: the same command goes on from here")
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
