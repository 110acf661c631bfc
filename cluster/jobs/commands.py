"""`potstill submit`, `logs` and `stop`, and what `potstill status` says of jobs."""

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.errors import EXIT_INTERRUPTED, RunError
from cluster.jobs.parcel import mebibytes
from cluster.jobs.server import (
    connect,
    describe_job,
    exit_code_of,
    find_job,
    list_jobs,
    plain_errors,
    resolve_address,
    summarise_job,
    wait_until_ended,
)
from cluster.jobs.submit import STOP_GRACE_S, plan_job, send_job
from cluster.progress import console, hush, say
from cluster.storage import cache_folder
from cluster.waiting import waiting

app = typer.Typer()

Address = Annotated[
    str | None,
    typer.Option(
        help="URL of the cluster's dashboard; default RAY_API_SERVER_ADDRESS or RAY_ADDRESS, "
        "else http://127.0.0.1:8265."
    ),
]
JobId = Annotated[str, typer.Argument(help="A job id, as printed by `potstill submit`.")]
_STOP_LIMIT_S = STOP_GRACE_S + 60.0


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(help="A recipe inside the working folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Options to change: section.key=value ...")
    ] = None,
    arm: Annotated[str | None, typer.Option(help="An arm from the papers.")] = None,
    address: Address = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the log and exit with the job's exit code.")
    ] = False,
) -> None:
    """Run a recipe as a job on a Ray cluster, in a copy of the working folder."""
    url = _address(address)
    job = plan_job(config, overrides or [], arm, Path.cwd())
    client = connect(url)
    job_id = send_job(client, job)
    say(f"submitted {job_id} to {url} with {mebibytes(job.size)} of {job.folder}")
    say(f"state:  {_command('status', job_id, url)}")
    say(f"log:    {_command('logs', job_id, url)} --follow")
    say(f"end it: {_command('stop', job_id, url)}")
    if wait:
        _follow(client, job_id)


@app.command()
def logs(
    job: JobId,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Keep printing until the job ends; exit with its code.")
    ] = False,
) -> None:
    """Print the log of a job so far."""
    client = connect(_address(address))
    find_job(client, job)
    if follow:
        _follow(client, job)
        return
    with plain_errors(client.get_address()):
        _show(client.get_job_logs(job))


@app.command()
def stop(job: JobId, address: Address = None) -> None:
    """Stop a job. Submit it again to resume the run."""
    client = connect(_address(address))
    details = find_job(client, job)
    if not details.status.is_terminal():
        with plain_errors(client.get_address()):
            client.stop_job(job)
        with waiting(f"stopping {job}"):
            details = wait_until_ended(client, job, _STOP_LIMIT_S)
    for line in describe_job(details):
        say(line)


def tell_jobs(job: str | None, address: str | None) -> None:
    """Print the state of a job, or one line per job of the cluster."""
    client = connect(_address(address))
    if job is not None:
        lines = describe_job(find_job(client, job))
    else:
        lines = [summarise_job(details) for details in list_jobs(client)]
    for line in lines or [f"no jobs yet at {client.get_address()}"]:
        say(line)


def _address(given: str | None) -> str:
    """The cluster to talk to; what Ray prints on the way goes to a log."""
    hush(cache_folder() / "logs" / "jobs.log")
    return resolve_address(given)


def _command(name: str, job: str, url: str) -> str:
    return f"potstill {name} {job} --address {url}"


def _follow(client: Any, job: str) -> None:
    """Show a job's log until it ends, and leave with its exit code; Ctrl-C leaves it running."""
    from aiohttp import ClientError

    try:
        asyncio.run(_tail(client, job))
        details = find_job(client, job)
    except KeyboardInterrupt:
        url = client.get_address()
        say(f"{job} goes on without this command: {_command('logs', job, url)} --follow")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (ClientError, OSError, RuntimeError) as error:
        raise RunError(f"the log of {job} broke off ({error}); the job may well go on") from None
    for line in describe_job(details):
        say(line)
    raise typer.Exit(exit_code_of(details))


async def _tail(client: Any, job: str) -> None:
    async for text in client.tail_job_logs(job):
        _show(text)


def _show(text: str) -> None:
    """Print a job's own words as they are, and not as markup."""
    console().out(text, end="", highlight=False)
