"""Brings a model to the node of its engine. Loaded by ray.serve.llm in the replica, by name."""

import asyncio
from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase

from pipeline.models import resolve_exact


class FetchModel(CallbackBase):
    """Gives the engine a local folder of the model that it was asked for, on its own node.

    In the place of ray.serve.llm's own download, which names copies after the model id (two runs'
    "student-epoch-1" would be one) and takes 10 s and 0.7 GiB even for a local folder.
    """

    async def on_before_node_init(self) -> None:
        """Resolve, and skip the download. Raises RunError where the node has another model."""
        folder = str(await asyncio.to_thread(resolve_exact, **self.kwargs))
        engine: Any = self.llm_config.get_engine_config()
        engine.hf_model_id, engine.mirror_config = folder, None
        self.ctx.run_init_node = False
