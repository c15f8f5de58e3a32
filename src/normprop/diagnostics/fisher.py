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

from normprop import moments as M
from normprop.diagnostics.diagnosis import Diagnosis, Subject
from normprop.diagnostics.jacobian import finite, lanczos, linearise, quietly
from normprop.diagnostics.plot import Line, Plot
from normprop.errors import ConfigError, first_line
from normprop.moments import Activation, maps
from normprop.norms.plain import ElementwiseActivation

GAMMAS = (0.1, 0.25, 0.5, 1.0, 2.0)
_TRACY_WIDOM = -1.2065335745820  # mean of the law of the largest eigenvalue, real case


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
    with quietly(model, inputs, seed) as network:
        products = linearise(_outputs(network, inputs.detach().clone()), _parameters(network), type(model).__name__)
        output, samples = products.output, len(inputs)

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


def converges(
    model: nn.Module, inputs: Tensor, rate: float, *, steps: int = 80, size: float = 1e-3, seed: int = 0
) -> bool:
    """Try whether gradient descent is stable at a learning rate, on the real network and half the mean squared error.

    The targets are the network's outputs, a little disturbed in all directions at once: so the loss is close to its
    least value, and stable descent is what the Fisher matrix decides. Unstable is a loss that rises above where it
    began, from where it may yet leap to some flatter place, or that rises in the second half of the steps, when what
    grows has overtaken what shrinks.

    Args:
        model: the network; it is left as it is.
        inputs: a batch.
        rate: learning rate.
        steps: of full gradient descent; more of them tell rates apart that are closer to the edge.
        size: of the disturbance, as a share of the root mean square of the outputs.
        seed: of the disturbance, and where random states start at each step.

    Returns:
        Whether descent was stable.

    Raises:
        ConfigError: if no parameter requires a gradient, or the rate is not positive.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])  # lambda_max 4.5
        >>> converges(model, x, 1.9 / 4.5), converges(model, x, 2.1 / 4.5)
        (True, False)
    """
    if not rate > 0:
        raise ConfigError(f"converges: the learning rate must be positive, got {rate}")
    losses = []
    with quietly(model, inputs, seed) as network:
        parameters = _parameters(network)
        target = None
        for _ in range(steps):
            torch.manual_seed(seed)  # the same masks in each step: one function descends
            output = _outputs(network, inputs.detach().clone())
            if target is None:
                generator = torch.Generator().manual_seed(seed)
                scale = output.detach().square().mean().sqrt() * size
                target = output.detach() + scale * torch.randn(output.shape, generator=generator).to(output)
            loss = (output - target).double().square().sum() / (2 * len(inputs))
            losses.append(float(loss.detach()))
            if not losses[-1] <= 1.01 * losses[0]:
                return False
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            with torch.no_grad():
                for parameter, grad in zip(parameters, grads, strict=True):
                    if grad is not None:
                        parameter.sub_(grad, alpha=rate)
    return losses[-1] <= losses[steps // 2]


def stable_rate(
    model: nn.Module, inputs: Tensor, start: float, *, resolution: float = 0.05, steps: int = 80, seed: int = 0
) -> float:
    """Measure the largest learning rate at which gradient descent is stable, by bisection.

    Args:
        model: the network; it is left as it is.
        inputs: a batch.
        start: a rate near the edge, such as :attr:`Fisher.rate`, from where to look up or down by factors.
        resolution: relative width of the bracket at which to stop.
        steps: as for :func:`converges`.
        seed: the same.

    Returns:
        The middle of the bracket; nan if none was found within a factor of 1000.

    Raises:
        ConfigError: if the start is not positive and finite.

    Example:
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> abs(stable_rate(nn.Linear(2, 1, bias=False), x, start=1.0) * 4.5 / 2 - 1) < 0.05
        True
    """
    if not (start > 0 and math.isfinite(start)):
        raise ConfigError(f"stable_rate: start must be a positive number, got {start}; give 2 / lambda_max")
    settings = {"steps": steps, "seed": seed}
    factor = 1.0 + 2 * resolution
    upwards = converges(model, inputs, start, **settings)
    low = high = start
    while converges(model, inputs, high if upwards else low, **settings) is upwards:
        if not 1e-3 < (high if upwards else low) / start < 1e3:
            return math.nan
        if upwards:
            low, high = high, high * factor
        else:
            low, high = low / factor, low
        factor = factor**1.5
    while high / low > 1.0 + resolution:
        middle = math.sqrt(low * high)
        if converges(model, inputs, middle, **settings):
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


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
        'a: lambda_max 4, so rates up to 0.5 are stable; descent was stable up to 0.5.'
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
        found=" ".join(_sentence(name, found) for name, found in results.items()),
        numbers={name: _numbers(found) for name, found in results.items()},
        figures=figures,
        source="Wei, Stokes & Schwab 2019, Mean-field Analysis of Batch Normalization; Karakida, Akaho & Amari, "
        "NeurIPS 2019",
    )


def _sentence(name: str, found: Sharpness) -> str:
    """What was found of one network."""
    own = found.fisher
    if not math.isfinite(own.largest):
        return f"{name}: lambda_max is not finite."
    if own.largest == 0:
        return f"{name}: lambda_max is 0, the outputs do not move with the parameters."
    measured = "no edge of stability was found"
    if math.isfinite(found.stable_rate):
        measured = f"descent was stable up to {found.stable_rate:.3g}"
    text = f"{name}: lambda_max {own.largest:.3g}, so rates up to {own.rate:.3g} are stable; {measured}"
    usable = {gamma: value for gamma, value in found.sweep.items() if math.isfinite(value)}
    if len(usable) > 1:
        low, high = min(usable), max(usable)
        text += f"; gains times {low:g} give {usable[low]:.3g}, times {high:g} {usable[high]:.3g}"
    return text + "."


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


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient."""
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise ConfigError(
            f"{type(model).__name__}: no parameter requires a gradient, and the Fisher matrix is over those that do; "
            "call requires_grad_(True) on what is trained"
        )
    return found


def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """The network's outputs."""
    try:
        output: Tensor = model(inputs)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ConfigError(
            f"{type(model).__name__} does not take inputs of shape {tuple(inputs.shape)}: {first_line(error)}"
        ) from error
    return output


def _gain(module: nn.Module) -> nn.Parameter | None:
    """A module's gain."""
    own = dict(module.named_parameters(recurse=False))
    return next((own[name] for name in ("gain", "weight") if name in own and own[name].ndim == 1), None)
