"""Waiting until the application, or one model of it, answers; and what to say where it does not."""

import threading
import time
from pathlib import Path

from cluster.endpoint_key import endpoint_key
from cluster.errors import RunError
from serving.models import ServedEngine

_POLL_S = 1.0
_MESSAGE_LIMIT = 2000
_FAILURES = 3


def deployment_name(engine: ServedEngine) -> str:
    """What ray.serve.llm calls the deployment of an engine."""
    return f"LLMServer:{engine.engine_id}"


def wait_until_running(app_name: str, engines: list[ServedEngine], timeout_s: float) -> None:
    """Return once the application of this name runs, its resident engines included.

    Raises RunError with a diagnosis where it fails, or is not ready in `timeout_s`.
    """
    from ray import serve

    deadline = time.monotonic() + timeout_s
    while True:
        app = serve.status().applications.get(app_name)
        if app is not None and app.status == "RUNNING":
            return
        _refuse_failure(app_name, engines)
        if time.monotonic() > deadline:
            raise RunError(_diagnosis(app_name, engines, f"not ready after {timeout_s:.0f} s"))
        time.sleep(_POLL_S)


def wait_until_answering(
    app_name: str, url: str, model_id: str, engine: ServedEngine, timeout_s: float
) -> None:
    """Return once `model_id` answers; its request starts an engine that is on demand.

    Raises RunError with a diagnosis where the engine fails, or takes over `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    answered, failures = threading.Event(), list[str]()
    asker = threading.Thread(
        target=_ask_until, args=(url, model_id, answered, failures), daemon=True
    )
    asker.start()
    try:
        while not answered.wait(_POLL_S):
            _refuse_failure(app_name, [engine])
            if len(failures) >= _FAILURES:
                raise RunError(
                    _diagnosis(app_name, [engine], f"{model_id} cannot answer: {failures[-1]}")
                )
            if time.monotonic() > deadline:
                raise RunError(_diagnosis(app_name, [engine], f"no answer after {timeout_s:.0f} s"))
    finally:
        answered.set()  # ends the thread


def _ask_until(url: str, model_id: str, answered: threading.Event, failures: list[str]) -> None:
    import openai

    client = openai.OpenAI(base_url=url, api_key=endpoint_key() or "none", max_retries=0)
    while not answered.is_set():
        try:
            client.chat.completions.create(
                model=model_id, messages=[{"role": "user", "content": "Hello"}], max_tokens=1
            )
        except openai.InternalServerError as error:
            # An engine that dies of a request is started again, for ever.
            failures += [str(error)] if error.status_code == 500 else []
            time.sleep(_POLL_S)
        except (openai.APIConnectionError, openai.RateLimitError):
            time.sleep(_POLL_S)
        except openai.APIStatusError as error:
            if error.status_code == 408:
                continue
            answered.set()  # it refuses this request, so it is up
        else:
            answered.set()


def _refuse_failure(app_name: str, engines: list[ServedEngine]) -> None:
    from ray import serve

    app = serve.status().applications.get(app_name)
    if app is None:
        return
    names = {deployment_name(engine) for engine in engines}
    failed = app.status == "DEPLOY_FAILED" or any(
        deployment.status in ("UNHEALTHY", "DEPLOY_FAILED")
        for name, deployment in app.deployments.items()
        if name in names
    )
    if failed:
        raise RunError(_diagnosis(app_name, engines, "failed to start"))


def _diagnosis(app_name: str, engines: list[ServedEngine], what: str) -> str:
    import ray
    from ray import serve

    app = serve.status().applications[app_name]
    lines = [f"the endpoint is {app.status}: {what}"]
    for engine in engines:
        deployment = app.deployments.get(deployment_name(engine))
        if deployment is not None and deployment.status != "HEALTHY":
            lines.append(
                f"{engine.engine_id} ({engine.model.reference}) is {deployment.status}: "
                f"{deployment.message[-_MESSAGE_LIMIT:] or 'no message'}"
            )
    free = {name: ray.available_resources().get(name, 0) for name in ("CPU", "GPU")}
    lines.append(f"free in the cluster: {free}; the engines' logs: {serve_logs()}")
    return "\n".join(lines)


def serve_logs() -> Path:
    """Where Ray Serve's replicas of this node write their logs."""
    from ray.serve._private.logging_utils import get_serve_logs_dir

    return Path(get_serve_logs_dir())
