"""Filters that are not turned by what their turning does to mean and scale of the pre-activations."""

import math
from typing import Any, NamedTuple

from torch import nn

from normprop.decoupled import InputMoments
from normprop.errors import ConfigError
from normprop.nn import NormPropLayer


class Decoupling(NamedTuple):
    """Decoupled gradients of a network, until they are removed."""

    layers: dict[str, tuple[NormPropLayer, InputMoments]]

    def remove(self) -> None:
        """Give the layers their plain gradients back."""
        for layer, _ in self.layers.values():
            layer._inputs = None

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return what was measured by now, by layer."""
        return {
            name: {"mean": inputs.mean, "covariance": inputs.covariance, "known": inputs.known}
            for name, (_, inputs) in self.layers.items()
            if inputs.known
        }

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ConfigError: for a layer that there is not.
        """
        if unknown := sorted(set(state) - set(self.layers)):
            raise ConfigError(f"decouple: the state is another network's: no layer {', '.join(unknown)} here")
        for name, measured in state.items():
            layer, inputs = self.layers[name]
            inputs.mean, inputs.covariance = (measured[key].to(layer.weight) for key in ("mean", "covariance"))
            inputs.known = measured["known"]


def decouple(model: nn.Module, *, span: float = 16.0) -> Decoupling:
    r"""Take from filters' gradients what they would do to mean and scale of their pre-activations.

    .. math:: G_i \leftarrow G_i - s_i m - (G_i \cdot w_i - s_i\, m \cdot w_i) \frac{C w_i}{w_i' C w_i}

    with m and C the mean and covariance of the layer's inputs over about the last ``span`` samples, those of the batch
    included, and s the sum of the gradients of the pre-activation. It is what batch norm's backward pass does to the
    gradients of its weights; forward passes stay what they are, functions of one sample, and gains and biases, which
    set mean and scale, keep their gradients. With :class:`normprop.training.Muon` it takes residual networks past
    batch norm, with SGD it changes little, and a U-Net is worse with it (docs/results/learning.md).

    All NormProp layers take part but transposed convolutions. They train eagerly, in single or double precision or
    under autocast; per-sample gradients, a compiler and derivatives of gradients are refused.

    Args:
        model: the network.
        span: samples that the averages reach back; rows of a linear layer's input count as samples.

    Returns:
        A handle: ``remove()`` ends it, ``state_dict()`` and ``load_state_dict()`` keep what was measured.

    Raises:
        ConfigError: for a span that is not above 0.

    Source:
        Ours; gradients through batch statistics: Ioffe & Szegedy 2015.

    Example:
        >>> import torch
        >>> from normprop.nn import Linear
        >>> model = Linear(4, 3)
        >>> handle = decouple(model)
        >>> model(torch.randn(32, 4)).var(0, correction=0).sum().backward()  # a matter of scale alone
        >>> bool(model.weight.grad.abs().max() < 1e-3)
        True
        >>> handle.remove()
    """
    if not (math.isfinite(span) and span > 0):
        raise ConfigError(f"decouple: span must be a finite number of samples above 0, got {span!r}")
    layers = {
        name: (module, InputMoments(span))
        for name, module in model.named_modules()
        if isinstance(module, NormPropLayer) and not module._transposed
    }
    for layer, inputs in layers.values():
        layer._inputs = inputs
    return Decoupling(layers)
