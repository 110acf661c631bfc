"""The endpoint of a finished run for a cluster that keeps it up, such as a RayService."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster import storage
from cluster.config import RunConfig
from cluster.endpoint_key import refuse_open_endpoint
from cluster.errors import BadInputError
from cluster.run_folder import RunFolder
from serving.app import application
from serving.models import ServedModel, served_models

_EVERYWHERE = "0.0.0.0"


class Deployed(BaseModel):
    """What the `args` of Ray Serve's application say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    """The run's folder: a URL that every node can read."""
    models: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Model ids to serve, such as student; null serves all that `potstill serve` does."""
    accelerator: Literal["cpu", "gpu"] = "gpu"
    """What the engines run on; nodes may start only once they are asked for."""


def build(args: Deployed) -> Any:
    """The application that Ray Serve deploys by `import_path: serving.deployment:build`.

    Raises BadInputError where there is no such run, no such model in it, or no key in the
    environment.
    """
    run = RunFolder(storage.location(args.run))
    config = _reachable(run.load_config(), args)
    refuse_open_endpoint(config.serving.host)
    return application(_chosen(served_models(run, config), args), config)


def _reachable(config: RunConfig, args: Deployed) -> RunConfig:
    """The run's configuration, listening to other machines than its own."""
    serving = config.serving.model_copy(update={"host": _EVERYWHERE})
    cluster = config.cluster.model_copy(update={"accelerator": args.accelerator})
    return config.model_copy(update={"serving": serving, "cluster": cluster})


def _chosen(models: list[ServedModel], args: Deployed) -> list[ServedModel]:
    if args.models is None:
        return models
    known = {model.model_id: model for model in models}
    if unknown := [name for name in args.models if name not in known]:
        raise BadInputError(
            f"args.models has {', '.join(unknown)}, but {args.run} has {', '.join(known)}: "
            "choose of these, or leave models out for all"
        )
    return [known[name] for name in args.models]
