"""The job server of a Ray cluster: its address, its token, and what it says of a job."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster.credentials import refuse_credentials
from cluster.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, BadInputError, RunError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_OPEN_TIMEOUT_S = 10.0
_POLL_S = 1.0
# What Ray calls the jobs that nobody named.
_ID_PREFIX = "raysubmit_"
RUN_FOLDER, STORE = "potstill_run_folder", "potstill_store"


def is_job_id(text: str) -> bool:
    """Whether a text is an id that Ray gave to a job."""
    return text.startswith(_ID_PREFIX)


def resolve_address(given: str | None) -> str:
    """The URL of a cluster's job server: the one given, else of Ray's variables, else this machine.

    Raises BadInputError for what is not http:// or https://, such as the address of a Ray driver.
    """
    sources = [("--address", given), *((name, os.environ.get(name)) for name in _ADDRESS_VARIABLES)]
    source, address = next(
        ((name, value) for name, value in sources if value), ("", DEFAULT_ADDRESS)
    )
    refuse_credentials(source, address)
    if not address.startswith(("http://", "https://")):
        raise BadInputError(
            f"{source}={address} is no address of a job server: expected the URL of Ray's "
            f"dashboard, such as --address {DEFAULT_ADDRESS}"
        )
    return address.rstrip("/")


def use_token() -> None:
    """Let Ray send the token of this machine, where it has one and the user chose no mode.

    To be called before Ray is imported, which reads the mode once.
    """
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if named or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def connect(address: str) -> Any:
    """A client of the job server at a URL. Raises BadInputError where none can be had."""
    use_token()
    _refuse_silence(address)
    from ray.job_submission import JobSubmissionClient

    # It would otherwise take the address of the environment, whatever it is told.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    with plain_errors(address):
        return JobSubmissionClient(address)


def _refuse_silence(address: str) -> None:
    """Raise BadInputError unless a job server answers soon; Ray's client would wait for minutes."""
    import requests

    try:
        answer = requests.get(f"{address}/api/version", timeout=_OPEN_TIMEOUT_S)
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise BadInputError(
            f"no Ray cluster answers at {address} ({reason}): start one with `ray start --head`, "
            "open the tunnel to it with `ray dashboard ray_cluster.yaml`, or give its --address"
        ) from None
    asks_for_token = answer.status_code in (401, 403)
    if not asks_for_token and "ray_version" not in answer.text:
        raise BadInputError(
            f"what answers at {address} is no Ray dashboard (status {answer.status_code}): give "
            "the cluster's --address, whose port is 8265 unless it was told otherwise"
        )


@contextmanager
def plain_errors(address: str) -> Iterator[None]:
    """Raise what goes wrong at the job server as an error that says what to do."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        reason = str(error).partition("\n")[0]
        raise BadInputError(
            f"the cluster at {address} wants its token ({reason}): put the one with which it was "
            "started into ~/.ray/auth_token or RAY_AUTH_TOKEN, with RAY_AUTH_MODE=token or unset"
        ) from None
    except (OSError, RuntimeError) as error:
        raise RunError(f"the job server at {address} failed: {error}") from None


def find_job(client: Any, job: str) -> Any:
    """What the cluster knows of a job. Raises BadInputError where it knows no such job."""
    address = client.get_address()
    found = {details.submission_id: details for details in list_jobs(client)}
    if job not in found:
        raise BadInputError(
            f"the cluster at {address} has no job {job}: `potstill status --address {address}` "
            "lists those that it has"
        )
    return found[job]


def list_jobs(client: Any) -> list[Any]:
    """The jobs that were submitted to a cluster, the oldest first."""
    with plain_errors(client.get_address()):
        jobs = [details for details in client.list_jobs() if details.submission_id]
    return sorted(jobs, key=lambda details: details.start_time or 0)


def wait_until_ended(client: Any, job: str, timeout_s: float) -> Any:
    """What the cluster knows of a job that has ended. Raises RunError where it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not (details := find_job(client, job)).status.is_terminal():
        if time.monotonic() > deadline:
            raise RunError(f"{job} is still {details.status} after {timeout_s:.0f} s: try again")
        time.sleep(_POLL_S)
    return details


def exit_code_of(details: Any) -> int:
    """The exit code for a command that waited for a job: the run's own, where that says more."""
    if details.status == "SUCCEEDED":
        return 0
    if details.status == "STOPPED":
        return EXIT_INTERRUPTED
    code = details.driver_exit_code
    return code if code in (EXIT_BAD_INPUT, EXIT_INTERRUPTED) else 1


def describe_job(details: Any) -> list[str]:
    """What is known of a job, in lines for the user."""
    code = details.driver_exit_code
    metadata = details.metadata or {}
    lines = [
        f"job: {details.submission_id}",
        f"state: {details.status}" + (f", exit code {code}" if code is not None else ""),
        f"command: {details.entrypoint}",
        f"started: {_moment(details.start_time)}, ended: {_moment(details.end_time)}",
    ]
    if RUN_FOLDER in metadata:
        lines.append(f"run: {metadata[RUN_FOLDER]}, store: {metadata[STORE]}")
    if details.message and details.status != "SUCCEEDED":
        lines.append("Ray says: " + details.message.partition("\n")[0])
    return lines


def summarise_job(details: Any) -> str:
    """A job in one line."""
    what = (details.metadata or {}).get(RUN_FOLDER) or details.entrypoint
    return f"{details.submission_id}  {details.status}  {_moment(details.start_time)}  {what}"


def _moment(milliseconds: int | None) -> str:
    """A time of Ray's, in the zone of this machine."""
    if not milliseconds:
        return "not yet"
    return datetime.fromtimestamp(milliseconds / 1000).astimezone().isoformat(" ", "seconds")
