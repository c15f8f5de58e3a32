"""Modules with a rule of their own: contracted to one node, and compared with what they do."""

import pytest
import torch
from torch import nn

from normprop import nn as np_nn
from normprop.graph.capture import capture
from normprop.graph.contract import calls, contract
from normprop.graph.propagate import propagate
from normprop.graph.record import record
from normprop.graph.rules import module_rule
from tests.graph.rules.monte_carlo import compare, moments, shaken


def predicted(layer, channels):
    """Give a layer predicted moments of an input that are not those which will arrive."""
    generator = torch.Generator().manual_seed(5)
    law = moments(channels, generator)
    layer.predict(law.mean, law.var)
    return layer


def fitted(norm):
    norm.fit(torch.randn(50, 4, 6, 6, generator=torch.Generator().manual_seed(3)) * 2 + 1)
    return norm


SETTINGS = {"fixed": {"moments": "fixed"}, "live": {}}
LAYERS = {
    **{
        f"{activation} {name}": (np_nn.Conv2d(4, 6, 3, padding=1, activation=activation, **settings), (4, 6, 6))
        for activation in ("relu", "tanh", None, "leaky_relu")
        for name, settings in SETTINGS.items()
    },
    "prelu": (np_nn.Conv2d(4, 6, 3, activation=nn.PReLU(6)), (4, 6, 6)),
    "strided": (np_nn.Conv2d(4, 6, 3, stride=2, groups=2, activation="silu"), (4, 7, 7)),
    "circular": (np_nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 6, 6)),
    "same": (np_nn.Conv1d(4, 6, 3, padding="same", activation="relu"), (4, 9)),
    "volume": (np_nn.Conv3d(4, 6, 2, activation="relu"), (4, 3, 3, 3)),
    "linear": (np_nn.Linear(4, 6, activation="relu"), (4,)),
    "tokens": (np_nn.Linear(4, 6, activation="gelu"), (5, 4)),
    "transposed": (np_nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, activation="relu"), (4, 5, 5)),
    "predicted norm": (predicted(np_nn.PredictedNorm(4), 4), (4, 6, 6)),
    "predicted conv": (np_nn.PredictedConv2d(4, 6, 3, padding=1), (4, 6, 6)),
    "predicted linear": (np_nn.PredictedLinear(4, 6), (4,)),
    "predicted transposed": (np_nn.PredictedConvTranspose2d(4, 6, 3, stride=2), (4, 5, 5)),
    "data": (fitted(np_nn.DataNorm((4, 1, 1))), (4, 6, 6)),
    "data, every element": (fitted(np_nn.DataNorm((4, 6, 6))), (4, 6, 6)),
    "data of a batch": (np_nn.DataNorm((4, 1, 1), mode="batch"), (4, 6, 6)),
}


def completed(layer):
    """A layer made for conversion, as conversion leaves it: with moments and a gain."""
    if isinstance(layer, np_nn.PredictedLayer):
        predicted(layer, 4)
        layer.gain = nn.Parameter(torch.ones(6))
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    layer, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(completed(layer))
    model = shaken(model, generator)
    law = moments(4, generator)
    channel = 0 if name != "tokens" else 1
    size = [-1 if i == channel else 1 for i in range(len(shape))]
    mean, std = (torch.as_tensor(part).reshape(size) for part in (law.mean, law.std))
    x = torch.randn(4000, *shape, generator=generator, dtype=torch.float64) * std + mean
    # What circular padding is made of, when recorded, overwrites parts of a tensor.
    graph = capture(model, x[:3]) if name == "circular" else record(model, (x[:3],), {}).settled()
    graph = contract(graph, calls(graph, lambda module: module_rule(module) is not None))
    assert [node.op for node in graph.nodes] == ["input", "module"]
    given = law if name != "tokens" else None
    if given is None:
        x = torch.randn(4000, *shape, generator=generator, dtype=torch.float64)
    signal = propagate(graph, {0: given}).signal(1)
    with torch.no_grad():
        output = model(x)
    # At the border an activation sees other moments than inside, which are averaged before it; the rest is exact.
    border = model[0].__class__.__name__.startswith("Conv") and any(model[0].padding)
    wrong = compare(signal, output, **({"var": 0.3, "mean": 0.2} if border else {"var": 0.003, "mean": 0.003}))
    assert not wrong, wrong
