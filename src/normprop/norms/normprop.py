"""``normprop`` and ``normprop-paper``: Normalization Propagation in our recipe and as printed.

Ours starts a network with biases and branch gains by its depth (:mod:`normprop.nn.initial`); the paper's with biases 0.
No statistics of activations: train and eval are the same function, and a sample's output depends on that sample alone.

Use it when batches are small, statistics cannot be shared or per-sample gradients are needed.
Do not use it on inputs that are not normalised: put a DataNorm first.

Source:
    Arpit et al. 2016.
"""

from functools import partial
from typing import Any

from torch import nn

from normprop import nn as np_nn
from normprop.moments import Activation
from normprop.norms.registry import Method
from normprop.recipes import DEFAULT, PAPER, Recipe

LAYERS: tuple[type[np_nn.NormPropLayer], ...] = (np_nn.Linear, np_nn.Conv1d, np_nn.Conv2d, np_nn.Conv3d)


def block(recipe: Recipe, dims: int, *args: Any, activation: Activation = "relu", **kwargs: Any) -> nn.Module:
    """Build the layer with a recipe's settings; it is its own block."""
    return LAYERS[dims](*args, activation=activation, **recipe, **kwargs)


def head(recipe: Recipe, dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Build the last layer: normalised weights, gain and bias, no activation."""
    return block(recipe, dims, *args, activation=None, **kwargs)


_SOURCE = "Arpit et al. 2016, Normalization Propagation"
METHODS = {
    "normprop": Method(
        f"ours, after {_SOURCE}",
        partial(block, DEFAULT),
        partial(head, DEFAULT),
        np_nn.Residual,
        finish=np_nn.init_by_depth_,
    ),
    "normprop-paper": Method(_SOURCE, partial(block, PAPER), partial(head, PAPER), np_nn.Residual),
}
