"""Sharpness of random networks: by where batch norm stands, and as mean-field theory predicts it."""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from normprop import moments as M
from normprop.diagnostics.fisher import Fisher, fisher
from normprop.errors import ConfigError
from normprop.moments import Activation, maps
from normprop.norms.plain import ElementwiseActivation

_TRACY_WIDOM = -1.2065335745820  # mean of the law of the largest eigenvalue, real case


def random_network(
    in_features: int,
    width: int,
    depth: int,
    activation: Activation = "tanh",
    batch_norm: Collection[int] = (),
    *,
    outputs: int = 1,
    weight_variance: float = 1.0,
    seed: int = 0,
) -> nn.Sequential:
    """Build a random multilayer perceptron without biases, with batch norm where wanted, for mean-field questions.

    Weights are N(0, weight_variance / fan_in). Batch norm is on batch statistics, with no eps to speak of, at gain 1
    and bias 0; gains and biases do not require a gradient, so that the Fisher matrix is that of the weights.

    Args:
        in_features: of the input.
        width: of the hidden layers.
        depth: number of hidden layers.
        activation: after each of them; the read-out is linear.
        batch_norm: linear maps that batch norm follows, by number from 0; the read-out has number ``depth``.
        outputs: of the read-out.
        weight_variance: times the fan-in.
        seed: of the weights.

    Returns:
        The network, in training mode.

    Raises:
        ConfigError: if a number in ``batch_norm`` is not that of a linear map.

    Example:
        >>> [type(part).__name__ for part in random_network(4, 8, 1, batch_norm=[1])]
        ['Linear', 'ElementwiseActivation', 'Linear', 'BatchNorm1d']
    """
    if not {*batch_norm} <= {*range(depth + 1)}:
        raise ConfigError(f"random_network: linear maps have numbers 0 to {depth}, batch_norm has {[*batch_norm]}")
    generator = torch.Generator().manual_seed(seed)
    parts: list[nn.Module] = []
    for index in range(depth + 1):
        fan_in = width if index else in_features
        fan_out = width if index < depth else outputs
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out, bias=False)
        nn.init.normal_(linear.weight, 0.0, math.sqrt(weight_variance / fan_in), generator=generator)
        parts.append(linear)
        if index in batch_norm:
            parts.append(nn.BatchNorm1d(fan_out, eps=1e-12, track_running_stats=False).requires_grad_(False))
        if index < depth:
            parts.append(ElementwiseActivation(activation))
    return nn.Sequential(*parts)


def placements(
    inputs: Tensor,
    width: int,
    depth: int,
    activation: Activation = "relu",
    *,
    weight_variance: float = 2.0,
    outputs: int = 1,
    seed: int = 0,
) -> dict[str, Fisher]:
    """Compare random networks of the same weights with batch norm nowhere, before activations, at the end, everywhere.

    With more samples an outlier stays where it is, and without one lambda_max falls, as the rest is spread over them.

    Args:
        inputs: a batch, (N, in_features).
        width: of the hidden layers.
        depth: number of hidden layers.
        activation: after each of them.
        weight_variance: times the fan-in.
        outputs: of the read-out.
        seed: of the weights.

    Returns:
        Fisher matrices under "none", "middle", "last", "all".

    Source:
        Karakida, Akaho & Amari, The Normalization Method for Alleviating Pathological Sharpness in Wide Neural
        Networks, NeurIPS 2019: batch norm of the last layer takes the outlier away, of middle layers it does not.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> found = placements(torch.randn(32, 16, generator=generator), 64, 2)
        >>> found["last"].largest < found["middle"].largest
        True
    """
    where = {"none": range(0), "middle": range(depth), "last": range(depth, depth + 1), "all": range(depth + 1)}
    settings: dict[str, Any] = {"outputs": outputs, "weight_variance": weight_variance, "seed": seed}
    return {
        name: fisher(
            random_network(inputs.shape[1], width, depth, activation, at, **settings).to(inputs), inputs, seed=seed
        )
        for name, at in where.items()
    }


def predicted_largest(
    activation: Activation,
    samples: int,
    in_features: int,
    width: int,
    depth: int,
    *,
    weight_variance: float = 1.0,
) -> float:
    """Predict lambda_max of :func:`random_network` without batch norm and with one output, on N(0, 1) inputs.

    Derivation, ours. With width -> infinity before anything else, K = Theta / N with the tangent kernel of two inputs
    of correlation c,

        Theta(c) = sum_(l=0..L) n_l Q_l(c) prod_(m=l+1..L) s chi_m(c),

    n_l the width of layer l, Q_0 = c, Q_l = E[f(u) f(v)] and chi_l = E[f'(u) f'(v)] over Gaussians u, v of covariance
    s Q_(l-1), s the weight variance times the fan-in; the factor of layer l is (h_l . h_l') (delta . delta'). Inputs of
    n_0 independent features correlate by about 1/sqrt(n_0) only, so to first order

        N K = Theta(0) 1 1^T + Theta'(0) X X^T / n_0 + (Theta(1) - Theta(0) - Theta'(0)) I.

    The first term makes an outlier at Theta(0) + (Theta(1) - Theta(0)) / N. The edge of the rest follows from that of
    X X^T, (sqrt(n_0 - 1) + sqrt(N))^2 less what the Tracy-Widom law takes off on average. The larger of the two is
    returned: the outlier where f has a mean, as ReLU, and the edge where f is odd, as tanh. The number of samples must
    be small against the width, or the hidden features spread the edge further: by some 10 % at N = width / 16.

    Args:
        activation: see :func:`normprop.moments.resolve`.
        samples: N.
        in_features: n_0.
        width: n_1 to n_L.
        depth: L, the number of hidden layers.
        weight_variance: s.

    Returns:
        The prediction.

    Raises:
        ConfigError: if a number is too small.
        MomentError: if the activation's moments are not reliable.

    Source:
        Ours; the kernel as in Karakida et al. 2019 (AISTATS), the linearisation as in El Karoui 2010, the edge as in
        Johnstone 2001.

    Example:
        >>> round(predicted_largest("identity", 100, 100, 400, 0), 3)  # X X^T / N
        3.839
    """
    for name, value, least in (("samples", samples, 1), ("in_features", in_features, 2), ("width", width, 1)):
        if value < least:
            raise ConfigError(f"predicted_largest: {name} must be {least} or more, got {value}")

    def kernel(c: float) -> float:
        diagonal, cross, total = 1.0, c, in_features * c  # Q_l(1), Q_l(c), the sum so far
        for _ in range(depth):
            variance = weight_variance * diagonal
            correlation = max(-1.0, min(1.0, cross / diagonal))
            diagonal, cross, slope = _maps(activation, variance, correlation)
            total = total * weight_variance * slope + width * cross
        return total

    step = 1e-3
    at_zero, at_one = kernel(0.0), kernel(1.0)
    slope = (kernel(step) - kernel(-step)) / (2 * step)
    outlier = at_zero + (at_one - at_zero) / samples
    roots = math.sqrt(in_features - 1), math.sqrt(samples)
    spread = sum(roots) * (1 / roots[0] + 1 / roots[1]) ** (1 / 3)
    largest = (sum(roots) ** 2 + _TRACY_WIDOM * spread) / in_features
    edge = (at_one - at_zero - slope + slope * largest) / samples
    return float(max(outlier, edge))


def _maps(activation: Activation, variance: float, correlation: float) -> tuple[float, float, float]:
    """E[f(u)^2], E[f(u) f(v)] and E[f'(u) f'(v)] for Gaussians of one variance.

    From the maps of NormProp layers, which subtract the mean c2 and divide by the deviation c1 of f at N(0, 1).
    """
    unit, own = M.of(activation), M.of(activation, 0.0, math.sqrt(variance))
    second = float(maps.second_moment(variance, activation)) * float(unit.var)
    centred = maps.correlation(correlation, activation, q=variance) * second
    cross = centred + 2 * float(unit.mean) * float(own.mean) - float(unit.mean) ** 2
    slope = maps.correlation_slope(correlation, activation, q=variance) * second / variance
    return float(own.second), cross, slope
