"""Tied layers are prepared again after a reload; with real engines, see integration/."""

from types import SimpleNamespace

import torch

from pipeline.reloading import TakesWeights, tied_layers


def model(tied):
    layers = torch.nn.ModuleDict(
        {
            "embedding": torch.nn.Embedding(4, 2),
            "norm": torch.nn.LayerNorm(2),
            "head": torch.nn.Linear(2, 4, bias=False),
        }
    )
    if tied:
        layers["head"].weight = layers["embedding"].weight
    return layers


def test_layers_that_share_a_parameter_are_found():
    assert tied_layers(model(tied=False)) == []
    tied = model(tied=True)
    assert tied_layers(tied) == [tied["embedding"], tied["head"]]


def test_a_tied_head_is_prepared_after_the_weights_are_there():
    done, layers = [], model(tied=True)
    layers["head"].quant_method = SimpleNamespace(process_weights_after_loading=done.append)
    worker = TakesWeights()
    worker.reload_weights = lambda weights_path: done.append(weights_path)
    worker.model_runner = SimpleNamespace(get_model=lambda: layers)
    worker.take_weights("/checkpoint")
    assert done == ["/checkpoint", layers["head"]]
