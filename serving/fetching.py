"""Brings a model to the node of its engine. Loaded by ray.serve.llm in the replica, by name."""

import asyncio
from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase

from cluster import storage


class FetchModel(CallbackBase):
    """Gives the engine a local folder, verified by its digests, for the path or URL it was given.

    In the place of ray.serve.llm's own download, which names copies after the model id (two runs'
    "student-epoch-1" would be one) and takes 10 s and 0.7 GiB even for a local folder.
    """

    async def on_before_node_init(self) -> None:
        """Fetch, and skip the download."""
        source = storage.location(self.kwargs["folder"])
        folder = await asyncio.to_thread(storage.fetch_folder, source, storage.cache_folder())
        engine: Any = self.llm_config.get_engine_config()
        engine.hf_model_id, engine.mirror_config = str(folder), None
        self.ctx.run_init_node = False
