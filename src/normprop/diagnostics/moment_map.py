"""The map of means and variances of self-normalising networks, and what three theorems claim of it.

Inputs of mean mu and variance nu, weights of sum omega and squared sum tau give a pre-activation of mean mu omega and
variance nu tau, taken as Gaussian, and its activation has mean mu~ and variance nu~.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from normprop import moments
from normprop.moments import Activation, Value

Range = tuple[float, float]


def moment_map(
    mean: Value, var: Value, omega: Value = 0.0, tau: Value = 1.0, activation: Activation = "selu"
) -> tuple[Value, Value]:
    """Mean and variance of a unit's output, E f and Var f at N(mean omega, var tau).

    In closed form for SELU and every activation that has one, else by quadrature.

    Args:
        mean: mu of the inputs, a number or a tensor.
        var: nu, their variance, not negative.
        omega: sum of the unit's weights.
        tau: sum of their squares.
        activation: see :func:`normprop.moments.resolve`.

    Returns:
        mu~ and nu~; tensors, differentiable, if one of the arguments is one.

    Raises:
        ConfigError: if the pre-activation's variance is negative or not finite.

    Source:
        Klambauer et al. 2017, the map g of means and variances.

    Example:
        >>> mean, var = moment_map(0.0, 1.0)
        >>> abs(mean) < 1e-15, round(var, 12)
        (True, 1.0)
        >>> round(moment_map(0.0, 1.0, activation="tanh")[1], 7)
        0.3942945
    """
    spread = var * tau
    std = spread.sqrt() if isinstance(spread, Tensor) else math.sqrt(spread) if spread >= 0 else math.nan
    found = moments.of(activation, mean * omega, std)
    return found.mean, found.var


def jacobian(
    mean: float = 0.0, var: float = 1.0, omega: float = 0.0, tau: float = 1.0, activation: Activation = "selu"
) -> Tensor:
    """Derivative of :func:`moment_map` in mean and variance of the inputs.

    Where its spectral norm is below 1 at a fixed point, deep networks are drawn to that point.

    Args:
        mean, var, omega, tau, activation: as there, numbers.

    Returns:
        (2, 2), float64: rows are mu~ and nu~, columns mu and nu.

    Source:
        Klambauer et al. 2017, theorem 1.

    Example:
        >>> bool(torch.linalg.matrix_norm(jacobian(), 2) < 1)
        True
    """
    with torch.enable_grad():
        at = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (mean, var)]
        outputs = moment_map(at[0], at[1], omega, tau, activation)
        rows = [torch.autograd.grad(torch.as_tensor(output), at, retain_graph=True) for output in outputs]
    return torch.stack([torch.stack(row) for row in rows])


@dataclass(frozen=True)
class Domain:
    """A box of inputs and weights, and what a theorem claims of the map there.

    Args:
        claim: "maps into itself" (mean and variance stay in the box), "variance falls" or "variance rises".
        mean, var, omega, tau: ranges of mu, nu, omega and tau.
    """

    claim: Literal["maps into itself", "variance falls", "variance rises"]
    mean: Range
    var: Range
    omega: Range
    tau: Range


_SMALL = (-0.1, 0.1)
DOMAINS: Mapping[str, Domain] = {
    "theorem 1": Domain("maps into itself", _SMALL, (0.8, 1.5), _SMALL, (0.95, 1.1)),
    "theorem 2": Domain("variance falls", (-1.0, 1.0), (3.0, 16.0), _SMALL, (0.8, 1.25)),
    "theorem 3, first box": Domain("variance rises", _SMALL, (0.02, 0.16), _SMALL, (0.8, 1.25)),
    "theorem 3, second box": Domain("variance rises", _SMALL, (0.02, 0.24), _SMALL, (0.9, 1.25)),
}
"""The domains of the paper's three theorems on SELU networks."""


@dataclass(frozen=True)
class Image:
    """What the map makes of a domain, on a grid.

    Args:
        mean: smallest and largest mu~.
        var: smallest and largest nu~.
        ratio: smallest and largest nu~ / nu.
        holds: whether the claim is true at every point.
    """

    mean: Range
    var: Range
    ratio: Range
    holds: bool


@torch.no_grad()
def image(domain: Domain, points: int = 9, activation: Activation = "selu") -> Image:
    """Map a domain and check its claim.

    Args:
        domain: the box.
        points: per axis, both ends included, at least 2.
        activation: f.

    Returns:
        What the map makes of it.

    Source:
        Klambauer et al. 2017, theorems 1 to 3.

    Example:
        >>> [image(domain).holds for domain in DOMAINS.values()]
        [True, True, True, True]
    """
    axes = [
        torch.linspace(*ends, points, dtype=torch.float64)
        for ends in (domain.mean, domain.var, domain.omega, domain.tau)
    ]
    mean, var, omega, tau = torch.cartesian_prod(*axes).unbind(1)
    new_mean, new_var = (torch.as_tensor(value) for value in moment_map(mean, var, omega, tau, activation))
    ratio = new_var / var
    means, variances, ratios = ((value.min().item(), value.max().item()) for value in (new_mean, new_var, ratio))
    inside = all(
        box[0] <= low and high <= box[1] for (low, high), box in ((means, domain.mean), (variances, domain.var))
    )
    holds = {"maps into itself": inside, "variance falls": ratios[1] < 1, "variance rises": ratios[0] > 1}
    return Image(means, variances, ratios, holds[domain.claim])
