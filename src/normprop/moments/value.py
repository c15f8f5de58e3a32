"""The value that every rule returns: the first two moments of an activation of a Gaussian."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Value = float | Tensor


@dataclass(frozen=True)
class Moments:
    """Mean, variance and mean squared derivative of f(Z) for Z ~ N(mean, std^2).

    Every field is a float, or a tensor with one element per Gaussian.

    Args:
        mean: E[f(Z)].
        var: E[f(Z)^2] - E[f(Z)]^2.
        squared_derivative: E[f'(Z)^2], nan where it was not computed.
        error: estimate of the largest absolute error in the other fields, 0 for closed forms.

    Example:
        >>> unit = Moments(mean=3.0, var=16.0)
        >>> unit.second, unit.std
        (25.0, 4.0)
    """

    mean: Value
    var: Value
    squared_derivative: Value = math.nan
    error: float = 0.0

    @property
    def second(self) -> Value:
        """Second moment E[f(Z)^2] = mean^2 + var."""
        return self.mean * self.mean + self.var

    @property
    def std(self) -> Value:
        """Standard deviation, sqrt(var)."""
        return self.var.sqrt() if isinstance(self.var, torch.Tensor) else math.sqrt(self.var)
