"""The command line of Potstill: plan, run, serve, ask, eval and the rest."""

import json
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.config import RunConfig
from cluster.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, BadInputError, RunError
from cluster.jobs import commands as jobs
from cluster.jobs.server import is_job_id
from cluster.progress import complain, console, hush, say
from cluster.recipes import load_recipe
from cluster.run_folder import RunFolder
from cluster.storage import cache_folder, location, read_json

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        say(f"potstill {version('potstill')}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_tell_version, is_eager=True),
    ] = False,
) -> None:
    """Distil large language models into small ones on a Ray cluster."""


models_app = typer.Typer(help="Prepare and prune models.", no_args_is_help=True)
app.add_typer(models_app, name="models")
app.add_typer(jobs.app)

_SIGINT_EXIT = 130  # what Typer makes of Ctrl-C

Config = Annotated[Path, typer.Argument(help="A recipe, such as configs/quickstart.yaml.")]
RecipeOrTable = Annotated[Path, typer.Argument(help="A recipe, or a table from configs/tables.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Options to change: section.key=value ...")
]
Arm = Annotated[str | None, typer.Option(help="An arm from the papers, such as mixed_policy_orpo.")]
KeyVariable = Annotated[
    str | None,
    typer.Option(help="Variable with the key; default POTSTILL_API_KEY, else OPENAI_API_KEY."),
]
RunPath = Annotated[str, typer.Argument(help="The folder or URL of a run.")]


@app.command()
def plan(config: RecipeOrTable, overrides: Overrides = None, arm: Arm = None) -> None:
    """Show what a run or table would do and cost, and everything that would stop it.
    Loads no model.
    """
    from evals.runs import tell_plans
    from evals.tables.fit import refuse_misfits
    from evals.tables.plan import describe_table
    from evals.tables.spec import is_table, load_table

    if is_table(config):
        if overrides or arm:
            raise BadInputError(
                f"{config} is a table, which has its own options and arms: give none"
            )
        spec, cells = load_table(config)
        console().print(describe_table(spec, cells))
        refuse_misfits(cells)
        return
    _hush("plan")
    tell_plans(load_recipe(config, overrides, arm))


@app.command()
def run(config: Config, overrides: Overrides = None, arm: Arm = None) -> None:
    """Sample, pair, train, resample, serve and evaluate. Resumes where it stopped."""
    from evals.runs import open_stages, run_stage

    stages = load_recipe(config, overrides, arm)
    _hush("plan")  # until the run has a log
    for folder, settings in open_stages(stages):
        run_stage(folder, settings)
        _finish(folder, settings)


@app.command()
def sample(config: Config, overrides: Overrides = None, arm: Arm = None) -> None:
    """Only sample, grade and draw the pairs of the first epoch (for a recipe's first stage)."""
    from evals.runs import check_stages, open_stage, sample_stage

    stages = load_recipe(config, overrides, arm)
    _hush("plan")
    check_stages(stages)
    with open_stage(stages[0]) as folder:
        sample_stage(folder, stages[0])
        say(f"traces: {folder.root / 'completions'}, pairs: {folder.pairs(1)}")


@app.command()
def train(config: Config, overrides: Overrides = None, arm: Arm = None) -> None:
    """Sample, pair, train and resample, without evaluating."""
    from evals.runs import open_stages, train_stage

    stages = load_recipe(config, overrides, arm)
    _hush("plan")
    for folder, settings in open_stages(stages):
        train_stage(folder, settings)
        say(f"students: {folder.root / 'checkpoints'}")


def _finish(folder: RunFolder, config: RunConfig) -> None:
    from evals.table import results_table
    from serving.client import example_question, program

    console().print(results_table(folder, config))
    say(f"report: {folder.root / 'report.html'}")
    say(f"serve:  {program()} serve {config.run.folder}")
    asked = "student" if config.training.epochs else "base"
    say(f"ask:    {example_question(config, asked)}")


@app.command()
def serve(run: RunPath) -> None:
    """Serve a run's base model, teacher and every epoch's student until Ctrl-C."""
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
        str | None, typer.Option(help="Word it as in training: number, choice, boolean or open.")
    ] = None,
    api_key_env: KeyVariable = None,
) -> None:
    """Ask a served model a question and stream its answer."""
    from pipeline.rows import parse_kind
    from serving.client import ask as ask_model

    ask_model(url, question, model, kind=parse_kind(kind), api_key_env=api_key_env)


@app.command("eval")
def evaluate_one(
    model: Annotated[str, typer.Option(help="A model folder, or an OpenAI-style URL.")],
    task: Annotated[str, typer.Option(help="A task, such as gsm8k.")],
    data: Annotated[str | None, typer.Option(help="Its data: a hub id, file or folder.")] = None,
    verdict: Annotated[
        str | None, typer.Option(help="For an open task: task.verdict as YAML, {by: judge, ...}.")
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="The model id at the URL.")] = None,
    prompts: Annotated[int | None, typer.Option(help="How many prompts; default all.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens per answer.")] = 512,
    chat_template: Annotated[str | None, typer.Option(help="Template for a model folder.")] = None,
    answers: Annotated[str | None, typer.Option(help="Path or URL to write answers to.")] = None,
    concurrency: Annotated[int, typer.Option(help="Concurrent requests.")] = 32,
    port: Annotated[int, typer.Option(help="Port for serving a model folder.")] = 8000,
    api_key_env: KeyVariable = None,
) -> None:
    """Evaluate a model on a task. The last line is one JSON object."""
    from evals.single import SingleEvaluation, evaluate_model

    _hush("eval")
    wanted = SingleEvaluation(
        model=model,
        task=task,
        data=data,
        verdict=verdict,
        model_name=model_name,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        chat_template=chat_template,
        answers=answers,
        concurrency=concurrency,
        port=port,
        api_key_env=api_key_env,
    )
    say(json.dumps(evaluate_model(wanted)))


@models_app.command("prepare")
def prepare(
    reference: Annotated[
        str, typer.Argument(help="Such as smollm2-135m-instruct, a folder or a Hugging Face id.")
    ],
    out: Annotated[
        str | None, typer.Option(help="A new folder, as path or URL; default the cache.")
    ] = None,
) -> None:
    """Convert or build a model once, as an ordinary Hugging Face folder.

    For models shipped as Python packages, miniatures, InternLM2 models that come with their own
    code, and models with pickled weights, such as Vicuna.
    """
    from pipeline.conversion import convert_model
    from pipeline.models import prepare_model
    from pipeline.packaged import PACKAGED_MODELS
    from training.miniature import MINIATURES, prepare_miniature

    _hush("prepare")
    packaged = prepare_model if reference in PACKAGED_MODELS else convert_model
    make = prepare_miniature if reference in MINIATURES else packaged
    say(f"{reference}: {make(reference, out)}")


@models_app.command("prune")
def prune(
    model: Annotated[str, typer.Argument(help="A model: folder, URL, id or packaged name.")],
    ratio: Annotated[float, typer.Option(help="Share of all parameters to remove, such as 0.2.")],
    out: Annotated[str, typer.Option(help="A new folder, as path or URL.")],
    texts: Annotated[
        str | None, typer.Option(help="A file with your own calibration texts, one per line.")
    ] = None,
) -> None:
    """Remove the least important heads and MLP channels, to make a student from its teacher."""
    from training.pruning import prune_model

    _hush("prune")
    prune_model(model, ratio, out, texts)


@app.command()
def table(
    spec: Annotated[Path, typer.Argument(help="A table, such as configs/tables/miniature.yaml.")],
) -> None:
    """Run arms x students x tasks x seeds over one store and write the table.
    Resumes where it stopped.
    """
    from evals.tables.run import fill_table
    from evals.tables.spec import load_table

    loaded = load_table(spec)
    _hush("plan")
    written = fill_table(*loaded)
    console().print(written.read_text(), markup=False)
    say(f"table: {written}; as a page and as CSV beside it")


@app.command()
def report(run: RunPath) -> None:
    """Rewrite a run's report and model card, and print its table."""
    from evals.report import write_report

    folder, config = _existing(run)
    write_report(folder, config)
    _finish(folder, config)


@app.command()
def status(
    what: Annotated[
        str | None,
        typer.Argument(help="A run's folder or URL, or a job's id; default all jobs."),
    ] = None,
    address: jobs.Address = None,
) -> None:
    """Print the progress of a run, or the state of a job (a raysubmit_ID, or with --address)."""
    if what is None or address or is_job_id(what):
        jobs.tell_jobs(what, address)
    else:
        _tell_run(what)


def _tell_run(run: str) -> None:
    from evals.table import results_table

    folder, config = _existing(run)
    for line in folder.describe(config.training.epochs):
        say(line)
    if folder.finished_file.exists():
        say(f"finished: {read_json(folder.finished_file)['date']}")
        console().print(results_table(folder, config))
    else:
        say(f"last record: {folder.last_record()}")


def _hush(command: str) -> None:
    hush(cache_folder() / "logs" / f"{command}.log")


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
    """Run the command line: exit 2 for bad input, 75 for an interruption that can be resumed."""
    interruptions = _count_interruptions()
    try:
        app()
    except BadInputError as error:
        complain(f"error: {' '.join(str(error).split())}")  # one line, whatever a library says
        sys.exit(EXIT_BAD_INPUT)
    except RunError as error:
        complain(f"stopped: {error}")
        sys.exit(1)
    except SystemExit as stop:
        interrupted = stop.code == _SIGINT_EXIT or (stop.code and interruptions)
        if not interrupted or stop.code == EXIT_INTERRUPTED:  # then the command has said it
            raise
        complain("interrupted: the same command goes on from here")
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
