"""How sharp the landscape is at initialisation: the largest eigenvalue of the Fisher matrix, and the rate it allows.

With a Gaussian likelihood of N samples the Fisher matrix is F = (1/N) sum_(b,k) grad f_k(x_b) grad f_k(x_b)^T over the
parameters. Its spectrum but for zeros is that of K = (1/N) J J^T over the outputs, J the Jacobian of all outputs by
all parameters, so that only products with J are needed. Gradient descent on 1/(2 N) sum |f - y|^2 near f = y is stable
below the rate 2 / lambda_max.
"""

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normprop.diagnostics.diagnosis import Diagnosis, Subject, by_network, finite
from normprop.diagnostics.plot import Line, Plot
from normprop.diagnostics.products import differentiably, linearise
from normprop.diagnostics.quiet import call, trained
from normprop.diagnostics.spectrum import lanczos
from normprop.diagnostics.stable_rate import stable_rate
from normprop.errors import ConfigError

GAMMAS = (0.1, 0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Fisher:
    """What is known of the Fisher matrix of a network on a batch.

    Args:
        largest: its largest eigenvalue lambda_max.
        error: an eigenvalue lies that close to it: how far the iteration has converged.
        trace: sum of its eigenvalues, estimated from random probes.
        rank: number of eigenvalues that may differ from 0: outputs of all samples.
    """

    largest: float
    error: float
    trace: float
    rank: int

    @property
    def rate(self) -> float:
        """Largest stable learning rate of gradient descent on half the mean squared error, 2 / lambda_max."""
        return 2.0 / self.largest if self.largest else math.inf


@dataclass(frozen=True)
class Sharpness:
    """What :func:`measure` finds of a network.

    Args:
        fisher: the Fisher matrix at the network's own gains.
        stable_rate: largest rate at which gradient descent was seen to be stable.
        sweep: largest eigenvalue by the factor on all gains; empty for a network without gains.
    """

    fisher: Fisher
    stable_rate: float
    sweep: Mapping[float, float] = field(default_factory=dict)


def fisher(
    model: nn.Module, inputs: Tensor, *, steps: int = 100, tolerance: float = 1e-3, probes: int = 8, seed: int = 0
) -> Fisher:
    """Find the largest eigenvalue of the Fisher matrix, by Lanczos steps on K = J J^T / N.

    The network runs in its mode: with batch statistics the derivatives go through them.

    Args:
        model: the network; its parameters that require a gradient count; it is left as it is.
        inputs: a batch (N, ...).
        steps: largest number of products with K.
        tolerance: relative error of the largest eigenvalue at which to stop.
        probes: random vectors for the trace.
        seed: of the start and the probes, and where random states start.

    Returns:
        Largest eigenvalue, with its error, and trace.

    Raises:
        ConfigError: if no parameter requires a gradient, or the network cannot be differentiated twice.

    Source:
        Wei, Stokes & Schwab 2019, Mean-field Analysis of Batch Normalization, for the question.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)  # F = E[x x^T]
        >>> round(fisher(model, torch.tensor([[3.0, 0.0], [0.0, 1.0]])).largest, 5)
        4.5
    """
    with differentiably(model, inputs, seed) as network:
        parameters = [*trained(network).values()]
        output, samples = call(network, inputs.detach().clone()), len(inputs)
        products = linearise(output, parameters, type(model).__name__)

        def product(vectors: Tensor) -> Tensor:
            return products.jvp(products.vjp(vectors.reshape(output.shape))).reshape(1, -1) / samples

        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(1, output.numel(), generator=generator, dtype=torch.float64).to(output.device)
        nodes, _, residual = lanczos(product, start, steps, tolerance)
        squares = []
        for _ in range(probes):
            signs = torch.randint(2, output.shape, generator=generator).to(output) * 2 - 1
            squares.append(sum(float(grad.double().square().sum()) for grad in products.vjp(signs)) / samples)
    return Fisher(float(nodes[0, -1]), float(residual), sum(squares) / probes, output.numel())


def gains(model: nn.Module) -> list[str]:
    """List the modules of a network that have a gain: a parameter of one axis called "weight" or "gain".

    Args:
        model: the network.

    Returns:
        Dotted names, in the model's order.

    Example:
        >>> gains(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.PReLU()))
        ['1']
    """
    return [
        name for name, module in model.named_modules() if not isinstance(module, nn.PReLU) and _gain(module) is not None
    ]


def gamma_sweep(
    model: nn.Module,
    inputs: Tensor,
    gammas: Sequence[float] = GAMMAS,
    layers: Collection[str] | None = None,
    *,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> dict[float, Fisher]:
    """Look at the Fisher matrix with the gains multiplied by a factor.

    Where gains start at 1 the factor is gamma itself. Into tanh behind batch norm, lambda_max ~ gamma^2 as gamma -> 0.

    Args:
        model: the network; it is left as it is.
        inputs: a batch.
        gammas: factors.
        layers: dotted names of the modules whose gains are multiplied, out of :func:`gains`; ``None`` for all.
        tolerance: as for :func:`fisher`.
        seed: the same.

    Returns:
        The Fisher matrix by the factor; of a network without gains, empty.

    Raises:
        ConfigError: if a name is not that of a module with a gain.

    Source:
        Wei, Stokes & Schwab 2019; that it matters which layer: Karakida, Akaho & Amari, NeurIPS 2019.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
        >>> sweep = gamma_sweep(model, torch.randn(8, 2), (1.0, 2.0), ["1"])
        >>> [*sweep]
        [1.0, 2.0]
    """
    known = gains(model)
    chosen = known if layers is None else list(layers)
    for name in chosen:
        if name not in known:
            raise ConfigError(f"gamma_sweep: {name!r} has no gain; there are {', '.join(map(repr, known)) or 'none'}")
    found = {}
    for gamma in gammas if chosen else ():
        network = copy.deepcopy(model)
        with torch.no_grad():
            for name in chosen:
                gain = _gain(network.get_submodule(name))
                assert gain is not None
                gain.mul_(gamma)
        found[gamma] = fisher(network, inputs, tolerance=tolerance, seed=seed)
    return found


def measure(
    subject: Subject,
    *,
    samples: int = 16,
    gammas: Sequence[float] = GAMMAS,
    steps: int = 40,
    seed: int = 0,
) -> Sharpness:
    """Measure a network's sharpness: lambda_max, the stable rate that gradient descent shows, a sweep of its gains.

    Args:
        subject: the network, in the mode it is to be looked at in: training, for batch statistics; only the first
            samples of its inputs are used.
        samples: how many.
        gammas: factors on all gains.
        steps: of each descent.
        seed: of what is drawn.

    Returns:
        What was found; the stable rate is nan where lambda_max is 0 or not finite.

    Raises:
        ConfigError: as :func:`fisher`.

    Example:
        >>> found = measure(Subject("plain", nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 0.0], [0.0, 1.0]])))
        >>> round(found.fisher.largest, 4), found.sweep
        (4.5, {})
    """
    kept = subject.inputs[:samples]
    own = fisher(subject.model, kept, tolerance=1e-2, seed=seed)  # of the residual: of the eigenvalue its square
    edge = math.nan
    if own.largest > 0 and math.isfinite(own.largest):
        edge = stable_rate(subject.model, kept, own.rate, steps=steps, seed=seed)
    sweep = gamma_sweep(subject.model, kept, gammas, tolerance=1e-2, seed=seed)
    return Sharpness(own, edge, {gamma: found.largest for gamma, found in sweep.items()})


def describe(results: Mapping[str, Sharpness]) -> Diagnosis:
    """Say how sharp the networks are, and plot the sweep of gains and the stable rates.

    Args:
        results: by the name of the network.

    Returns:
        The diagnosis.

    Example:
        >>> describe({"a": Sharpness(Fisher(4.0, 0.0, 8.0, 10), 0.5)}).found
        'a: the sharpness, lambda_max, is 4, so rates up to 0.5 should be stable; descent was stable up to 0.5.'
    """
    sweeps = [Line(name, [*found.sweep], [*found.sweep.values()]) for name, found in results.items() if found.sweep]
    for name, found in results.items():
        if found.sweep:
            low = min(found.sweep)
            quadratic = [found.sweep[low] * (gamma / low) ** 2 for gamma in sorted(found.sweep)]
            sweeps.append(Line(f"{name}, gamma^2", sorted(found.sweep), quadratic, style="theory"))
    rates = [Line(name, [found.fisher.rate], [found.stable_rate], style="points") for name, found in results.items()]
    ends = [found.fisher.rate for found in results.values() if 0 < found.fisher.rate < math.inf]
    if ends:
        diagonal = [0.5 * min(ends), 2 * max(ends)]
        rates.append(Line("equal", diagonal, diagonal, style="theory"))
    figures = [
        Plot(
            "Largest stable learning rate",
            "2 / lambda_max",
            "rate up to which gradient descent was stable",
            rates,
            x_scale="log",
            y_scale="log",
        )
    ]
    if sweeps:
        figures.append(
            Plot("Sharpness by gain", "factor on all gains", "lambda_max", sweeps, x_scale="log", y_scale="log")
        )
    return Diagnosis(
        name="fisher",
        title="How sharp is the landscape, and how large a learning rate does that allow?",
        look_for="A small largest eigenvalue of the Fisher matrix means a flat landscape that stands a large rate; "
        "points on the dashed line show that it predicts where gradient descent breaks.",
        found=by_network(results, _words),
        numbers={name: _numbers(found) for name, found in results.items()},
        figures=figures,
        source="Wei, Stokes & Schwab 2019, Mean-field Analysis of Batch Normalization; Karakida, Akaho & Amari, "
        "NeurIPS 2019",
    )


def _words(found: Sharpness) -> str:
    """What was found of one network."""
    own = found.fisher
    if not math.isfinite(own.largest):
        return "the sharpness, lambda_max, is not finite."
    if own.largest == 0:
        return "the sharpness, lambda_max, is 0: the outputs do not move with the parameters."
    measured = "no edge of stability was found"
    if math.isfinite(found.stable_rate):
        measured = f"descent was stable up to {found.stable_rate:.3g}"
    text = (
        f"the sharpness, lambda_max, is {own.largest:.3g}, so rates up to {own.rate:.3g} should be stable; {measured}."
    )
    usable = {gamma: value for gamma, value in found.sweep.items() if math.isfinite(value)}
    if len(usable) > 1:
        low, high = min(usable), max(usable)
        text += f" With all gains times {low:g} it is {usable[low]:.3g}, times {high:g} it is {usable[high]:.3g}."
    return text


def _numbers(found: Sharpness) -> dict[str, Any]:
    """The numbers of one network."""
    own = found.fisher
    return {
        "largest": finite(own.largest),
        "error": finite(own.error),
        "trace": finite(own.trace),
        "rank": own.rank,
        "rate": finite(own.rate),
        "stable_rate": finite(found.stable_rate),
        "sweep": {f"{gamma:g}": finite(value) for gamma, value in found.sweep.items()},
    }


def _gain(module: nn.Module) -> nn.Parameter | None:
    """A module's gain."""
    own = dict(module.named_parameters(recurse=False))
    return next((own[name] for name in ("gain", "weight") if name in own and own[name].ndim == 1), None)
