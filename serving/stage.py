"""`potstill serve`: the endpoint of a run, until the user stops it."""

import threading

from cluster.config import RunConfig
from cluster.endpoint_key import KEY_VARIABLE, endpoint_key, refuse_open_endpoint
from cluster.progress import say
from cluster.refusals import refuse_taken_port
from cluster.run_folder import RunFolder
from cluster.session import ray_session, starts_own_cluster
from serving.app import Endpoint, start_serving, stop_serving
from serving.client import example_question
from serving.models import STUDENT, engines_of, served_models


def serve(run: RunFolder, config: RunConfig, stop: threading.Event | None = None) -> None:
    """Serve all models of a run until Ctrl-C, or until `stop` is set.

    Raises BadInputError for a port in use and for an open host without a key, RunError where an
    engine does not start.
    """
    refuse_open_endpoint(config.serving.host)
    models = served_models(run, config)
    if starts_own_cluster(config):
        refuse_taken_port(config.serving.host, config.serving.port)
    residents = {engine.engine_id for engine in engines_of(models).values() if engine.resident}
    with ray_session(config):
        say(f"starting {', '.join(sorted(residents))} (about a minute)")
        try:
            endpoint = start_serving(models, config)
            _describe(endpoint, config)
            (stop or threading.Event()).wait()
        except KeyboardInterrupt:
            say("stopping")
        finally:
            stop_serving(config)


def _describe(endpoint: Endpoint, config: RunConfig) -> None:
    engines = engines_of(list(endpoint.models))
    say(f"serving at {endpoint.url}, until Ctrl-C:")
    for model in endpoint.models:
        engine = engines[model.model_id]
        state = "loaded" if engine.resident else "starts with its first request"
        alias = f" (= {engine.engine_id})" if engine.engine_id != model.model_id else ""
        trusted = "; runs code that came with it (trust_remote_code)"
        code = trusted if model.trust_remote_code else ""
        say(f"  {model.model_id}{alias}: {state}{code}")
    if endpoint_key():
        say(f"each request needs the key in {KEY_VARIABLE}, as Authorization: Bearer KEY")
    ids = {model.model_id for model in endpoint.models}
    asked = STUDENT if STUDENT in ids else endpoint.models[0].model_id
    say(f"ask it: {example_question(config, asked, endpoint.url)}")
