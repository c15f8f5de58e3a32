"""A multilayer perceptron."""

import math
from collections.abc import Sequence

from torch import nn

from normprop import norms
from normprop.moments import Activation


def mlp(
    in_features: int | Sequence[int],
    num_classes: int,
    norm: str = "normprop",
    width: float = 1.0,
    depth: int = 4,
    hidden_features: int = 256,
    activation: Activation = "relu",
) -> nn.Module:
    """Build a multilayer perceptron with ``depth`` hidden layers.

    Args:
        in_features: number of input features, or the shape of a sample.
        num_classes: number of outputs.
        norm: name of the method (:func:`normprop.norms.names`).
        width: multiplies the number of hidden features.
        depth: number of hidden layers.
        hidden_features: features of a hidden layer at width 1.
        activation: activation of the hidden layers.

    Returns:
        A network from (N, *sample) to logits (N, num_classes).

    Example:
        >>> import torch
        >>> mlp((1, 8, 8), 10, depth=2)(torch.randn(1, 1, 8, 8)).shape
        torch.Size([1, 10])
    """
    features = in_features if isinstance(in_features, int) else math.prod(in_features)
    hidden = max(1, round(hidden_features * width))
    build = norms.block(norm, dims=0)
    layers: list[nn.Module] = [nn.Flatten()]
    for index in range(depth):
        layers.append(build(hidden if index else features, hidden, activation=activation))
    layers.append(norms.head(norm, dims=0)(hidden if depth else features, num_classes))
    return norms.finish(norm, nn.Sequential(*layers))
