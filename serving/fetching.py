"""Brings a model to the node of its engine. Loaded by ray.serve.llm in the replica, by name."""

import asyncio
from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase

from cluster.errors import RunError
from pipeline.models import model_digest, resolve_model


class FetchModel(CallbackBase):
    """Gives the engine a local folder of the model that it was asked for, on its own node.

    In the place of ray.serve.llm's own download, which names copies after the model id (two runs'
    "student-epoch-1" would be one) and takes 10 s and 0.7 GiB even for a local folder.
    """

    async def on_before_node_init(self) -> None:
        """Resolve, and skip the download. Raises RunError where the node has another model."""
        folder = await asyncio.to_thread(_resolve, **self.kwargs)
        engine: Any = self.llm_config.get_engine_config()
        engine.hf_model_id, engine.mirror_config = folder, None
        self.ctx.run_init_node = False


def _resolve(reference: str, digest: str | None) -> str:
    folder = resolve_model(reference)
    if digest is not None and model_digest(folder) != digest:
        raise RunError(
            f"{reference} on this node has digest {model_digest(folder)}, expected {digest}: bring "
            "the same model to every node"
        )
    return str(folder)
