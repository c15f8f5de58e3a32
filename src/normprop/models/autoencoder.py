"""An auto-encoder with one hidden layer and tied weights."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.errors import ConfigError
from normprop.prepared import normalize_rows_


class Nonlinearity(NamedTuple):
    """An encoder's activation s and its derivatives, elementwise and differentiable almost everywhere."""

    function: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    curvature: Callable[[Tensor], Tensor]


def _sigmoid_slope(a: Tensor) -> Tensor:
    return torch.sigmoid(a) * torch.sigmoid(-a)


NONLINEARITIES: dict[str, Nonlinearity] = {
    "identity": Nonlinearity(lambda a: a, torch.ones_like, torch.zeros_like),
    "relu": Nonlinearity(torch.relu, lambda a: (a > 0).to(a.dtype), torch.zeros_like),
    "sigmoid": Nonlinearity(
        torch.sigmoid, _sigmoid_slope, lambda a: _sigmoid_slope(a) * (torch.sigmoid(-a) - torch.sigmoid(a))
    ),
    "softplus": Nonlinearity(F.softplus, torch.sigmoid, _sigmoid_slope),
}
"""Activations of an encoder by name; all have slopes from 0 to 1."""


class AutoEncoder(nn.Module):
    r"""Auto-encoder with one hidden layer, whose linear decoder has the encoder's weight.

    .. math:: h = s(W x + b), \qquad y = W^\top h + b_d

    Args:
        features: n, of a sample.
        hidden: m, number of units.
        activation: s: "relu", "softplus", "sigmoid" or "identity".
        decoder_bias: whether there is a b_d.
        generator: where the weight is drawn from; ``None`` for torch's own.
        device, dtype: of the parameters.

    Shape:
        (N, n) to (N, n).

    Raises:
        ConfigError: for settings or inputs that do not fit.

    Source:
        Arpit, Zhou, Ngo & Govindaraju 2016 (Why regularized auto-encoders learn sparse representation?), section 2.

    Example:
        >>> autoencoder = AutoEncoder(4, 3, "sigmoid")
        >>> autoencoder.encode(torch.randn(5, 4)).shape, autoencoder(torch.randn(5, 4)).shape
        (torch.Size([5, 3]), torch.Size([5, 4]))
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        activation: str = "relu",
        decoder_bias: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in NONLINEARITIES:
            raise ConfigError(
                f"AutoEncoder: no activation {activation!r}; choose one of {', '.join(sorted(NONLINEARITIES))}"
            )
        if features < 1 or hidden < 1:
            raise ConfigError(f"AutoEncoder: features={features} and hidden={hidden}; expected positive numbers")
        self.features = features
        self.hidden = hidden
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(hidden, features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden, device=device, dtype=dtype))
        self.decoder_bias = nn.Parameter(torch.empty(features, device=device, dtype=dtype)) if decoder_bias else None
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight uniformly within sqrt(6 / (n + m)) (Glorot & Bengio 2010) and set biases to 0.

        Args:
            generator: where the weight is drawn from; the numbers do not depend on the parameters' device.
        """
        bound = math.sqrt(6 / (self.features + self.hidden))
        drawn = torch.rand(
            self.hidden, self.features, generator=generator, device=generator.device if generator else None
        )
        self.weight.copy_(drawn.mul_(2).sub_(1).mul_(bound))
        self.bias.zero_()
        if self.decoder_bias is not None:
            self.decoder_bias.zero_()

    @torch.no_grad()
    def normalize_weight_(self) -> None:
        """Give every unit's weight the length 1, in place; zero rows stay zero.

        Example:
            >>> autoencoder = AutoEncoder(4, 3)
            >>> autoencoder.normalize_weight_()
            >>> bool(torch.allclose(autoencoder.weight.norm(dim=1), torch.ones(3)))
            True
        """
        normalize_rows_([self.weight], [False])

    @property
    def nonlinearity(self) -> Nonlinearity:
        """The activation and its derivatives."""
        return NONLINEARITIES[self.activation]

    def preactivation(self, x: Tensor) -> Tensor:
        """Compute a = W x + b, (N, m), from samples (N, n)."""
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ConfigError(
                f"AutoEncoder: input has shape {tuple(x.shape)}; expected (N, {self.features}); flatten samples first"
            )
        return F.linear(x, self.weight, self.bias)

    def encode(self, x: Tensor) -> Tensor:
        """Compute h = s(W x + b), (N, m), from samples (N, n)."""
        return self.nonlinearity.function(self.preactivation(x))

    def decode(self, h: Tensor) -> Tensor:
        """Compute y = W^T h + b_d, (N, n), from codes (N, m)."""
        return h @ self.weight if self.decoder_bias is None else torch.addmm(self.decoder_bias, h, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct samples."""
        return self.decode(self.encode(x))

    def extra_repr(self) -> str:
        """Settings, in a model's printed form."""
        return (
            f"features={self.features}, hidden={self.hidden}, activation={self.activation!r}, "
            f"decoder_bias={self.decoder_bias is not None}"
        )
