"""How an engine's processes take new weights: a part that vLLM mixes into its workers."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any


class TakesWeights:
    """Methods of each vLLM worker, by `worker_extension_cls`; called through `collective_rpc`."""

    reload_weights: Callable[..., None]
    model_runner: Any

    def take_weights(self, folder: str) -> None:
        """Put the weights of a Hugging Face folder in the place of the present ones.

        vLLM prepares a reloaded tensor for one of its layers alone. On a CPU, where layers compute
        with a packed copy, an output layer tied to the embedding would keep the old weights.
        """
        self.reload_weights(weights_path=folder)
        for layer in tied_layers(self.model_runner.get_model()):
            if hasattr(layer, "quant_method"):
                layer.quant_method.process_weights_after_loading(layer)


def tied_layers(model: Any) -> list[Any]:
    """The modules that hold a parameter which another module holds too."""
    holders: dict[int, list[Any]] = defaultdict(list)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)].append(module)
    return [module for modules in holders.values() if len(modules) > 1 for module in modules]
