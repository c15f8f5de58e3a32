"""Are pre-activations Gaussian? What goes into each activation of a network, unit by unit.

Everything that predicts moments by layers (Normalization Propagation, self-normalising and norm-free networks) takes
pre-activations as Gaussian. A weighted sum is nearly so if no weight dominates and its inputs are nearly independent:
the excess kurtosis of ``w . x`` for independent x of excess kurtosis k is ``k sum(w^4) / sum(w^2)^2``.

Source:
    Arpit et al. 2016, section 3 (the assumption); Jarque & Bera 1980 (standard errors); Lilliefors 1967 (the distance).
"""

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normprop import moments
from normprop.diagnostics.diagnosis import Diagnosis, Subject
from normprop.diagnostics.plot import Line, Plot
from normprop.errors import ConfigError
from normprop.functional import normalized_sum
from normprop.moments import Moments
from normprop.nn import NormPropLayer, Residual, output_moments
from normprop.nn.lstm import LSTMLayer
from normprop.norms.filter_response import ThresholdedLinearUnit
from normprop.norms.recurrent import RowLSTM
from normprop.training import random_state

T = TypeVar("T")
Look = Callable[[Tensor], T]

ACTIVATIONS = frozenset(
    ["relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "celu", "selu", "gelu", "silu", "mish", "sigmoid", "tanh",
     "softplus", "softsign", "tanhshrink", "softshrink", "hardshrink", "hardtanh", "hardsigmoid", "hardswish",
     "log_sigmoid", "logsigmoid", "threshold"]
)  # fmt: skip
"""Names of torch's functions whose inputs are pre-activations."""
_GATES = ("sigmoid", "tanh")
_LINEAR = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")

LEVELS = tuple((step + 0.5) / 101 for step in range(101))
"""Probabilities of the quantiles."""
_POSITIONS = 64


def preactivations(model: nn.Module, inputs: Tensor, look: Look[T]) -> dict[str, T]:
    """Look at everything that goes into an activation, in the order of the calls.

    Found are calls of :data:`ACTIVATIONS`, in modules and as functions, and the activations inside NormProp's layers
    and sums, whose inputs, ``gain (w x) / ||w|| + bias``, are computed anew. Sigmoid and tanh that an LSTM or a
    module with parameters of its own calls are gates and squashing normalisers, not activations.

    Args:
        model: the network, looked at in the mode that it is in; a copy runs.
        inputs: a batch, (N, ...).
        look: turns a pre-activation, (N, units, positions), into what is kept of it.

    Returns:
        By the dotted path of the module that the activation is called in, with a number from its second call on.

    Raises:
        ConfigError: if there is no activation.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
        >>> preactivations(model, torch.zeros(2, 3, 6, 6), lambda z: tuple(z.shape))
        {'1': (2, 4, 16)}
    """
    twin = copy.deepcopy(model)
    calls = _Calls(look, inputs)
    with random_state.preserved(), torch.no_grad(), ExitStack() as stack:
        for path, module in twin.named_modules():
            for handle in calls.follow(path or type(module).__name__, module):
                stack.callback(handle.remove)
        with calls:
            twin(inputs.detach().clone())
    if not calls.found:
        raise ConfigError(
            f"{type(model).__name__} calls no activation that is known ({', '.join(sorted(ACTIVATIONS))}); "
            f"give a network that does"
        )
    return calls.found


class _Calls(TorchFunctionMode):
    """Sees every call of torch's functions and knows which module makes it."""

    def __init__(self, look: Look[Any], inputs: Tensor) -> None:
        super().__init__()
        self.look = look
        self.found: dict[str, Any] = {}
        self.count: Counter[str] = Counter()
        self.running: list[tuple[str, nn.Module]] = []
        self.own: set[nn.Module] = set()  # modules whose activations are looked at by their hooks
        self.parts: dict[nn.Module, Tensor] = {}
        self.linear = (2, inputs.shape[:1], 1)  # the last linear map, at first the input: axes, samples, axis of units

    def follow(self, path: str, module: nn.Module) -> list[Any]:
        """Note when a module runs; of NormProp's also what goes into their activations."""

        def enter(module: Any, args: Any) -> None:
            self.running.append((path, module))
            if isinstance(module, ThresholdedLinearUnit):
                self._see(args[0], -1 - module.dims)

        def leave(module: Any, args: Any, output: Any) -> None:
            if active and isinstance(module, Residual):
                self._sum(module, args[0])
            elif active:
                self._layer(module, args)
            self.running.pop()

        active = False
        handles = [module.register_forward_pre_hook(enter)]
        if isinstance(module, NormPropLayer | Residual):
            inside: Any = module.activation
            active = moments.resolve(inside).name != "identity"
            self.own.update([module, *(inside.modules() if isinstance(inside, nn.Module) else [])])
        if isinstance(module, Residual):
            for part in filter(None, (module.shortcut, module.branch)):
                handles.append(part.register_forward_hook(lambda part, _, output: self.parts.update({part: output})))
        return [*handles, module.register_forward_hook(leave)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the input of an activation; note the shape of a linear map's output."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if name in ACTIVATIONS and self.running and not self._aside(name, self.running[-1][1]):
            value = args[0] if args else kwargs["input"]
            axes, samples, axis = self.linear
            # Tables of constants pass through activations as well: they have fewer axes or other samples.
            if value.ndim >= axes and value.shape[:1] == samples:
                self._see(value, axis if value.ndim == axes else 1)
        output = func(*args, **kwargs)
        if name in _LINEAR:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.linear = output.ndim, output.shape[:1], 1 - weight.ndim
        return output

    def _aside(self, name: str, module: nn.Module) -> bool:
        """Whether a module's call is no activation, or one that is looked at elsewhere."""
        gated = isinstance(module, LSTMLayer | RowLSTM) or next(module.parameters(recurse=False), None) is not None
        return module in self.own or (name in _GATES and gated)

    def _see(self, value: Tensor, axis: int) -> None:
        path, _ = self.running[-1]
        self.count[path] += 1
        units = value.detach().movedim(axis, 1)
        name = path if self.count[path] == 1 else f"{path} ({self.count[path]})"
        self.found[name] = self.look(units.reshape(*units.shape[:2], -1).clone())

    def _layer(self, layer: Any, args: Any) -> None:
        bare = copy.copy(layer)
        vars(bare).update(_modules={}, activation=None)  # what is left is the normalised linear map
        self._see(bare.forward(*args), 1 - layer.weight.ndim)

    def _sum(self, residual: Residual, input: Tensor) -> None:
        skip = input if residual.shortcut is None else self.parts[residual.shortcut]
        spread = [Moments(0.0, output_moments(part).var) for part in (residual.shortcut, residual.branch)]
        total = normalized_sum([skip, self.parts[residual.branch]], spread, None, residual.spatial_dims)
        self._see(total, -1 - residual.spatial_dims)


@dataclass(frozen=True)
class Statistics:
    """How some samples are distributed; float64, of shape () or (units,).

    Args:
        mean: their mean.
        std: their standard deviation, dividing by the count.
        skew: mean of z^3 for standardised values z; 0 of a Gaussian, nan of constants.
        kurtosis: mean of z^4, less 3: the excess kurtosis; 0 of a Gaussian.
        distance: largest distance between the distribution of z and that of N(0, 1), of Kolmogorov and Smirnov; of n
            Gaussian values about 0.9 / sqrt(n) or less, 19 times out of 20.
    """

    mean: Tensor
    std: Tensor
    skew: Tensor
    kurtosis: Tensor
    distance: Tensor


def statistics(values: Tensor) -> Statistics:
    """Describe samples along the last axis.

    Args:
        values: (..., n).

    Returns:
        The statistics, each (...).

    Source:
        Lilliefors 1967, for the distance.

    Example:
        >>> found = statistics(torch.tensor([-1.0, 1.0, -1.0, 1.0]))  # two points are as light-tailed as can be
        >>> found.std.item(), found.skew.item(), found.kurtosis.item(), round(found.distance.item(), 3)
        (1.0, 0.0, -2.0, 0.341)
    """
    values = values.double()
    mean, std = values.mean(-1), values.std(-1, correction=0)
    z = _standardised(values)
    expected = torch.special.ndtr(z.sort(-1).values)
    count = values.shape[-1]
    steps = torch.arange(count + 1, dtype=torch.float64, device=values.device) / count
    distance = torch.maximum(steps[1:] - expected, expected - steps[:-1]).amax(-1)
    return Statistics(mean, std, z.pow(3).mean(-1), z.pow(4).mean(-1) - 3.0, distance)


def _standardised(values: Tensor) -> Tensor:
    """Values less their mean, in units of their standard deviation; nan where they are constant."""
    centred = values - values.mean(-1, keepdim=True)
    std = centred.square().mean(-1, keepdim=True).sqrt()
    return centred / torch.where(std > 1e-6 * values.abs().amax(-1, keepdim=True), std, math.nan)


def effective(values: Tensor, power: int) -> Tensor:
    r"""Count the independent values among those of units: :math:`n = N P^2 / \sum_{pq}\rho_{pq}^k`.

    Samples are independent, positions are not. Of a Gaussian signal with correlations rho between positions the mean of
    the Hermite polynomial of degree k has the variance that n independent values would give: k = 3 for the skew, k = 4
    for the excess kurtosis. Correlations are estimated, which makes n a little too small at few samples.

    Args:
        values: (N, units, P).
        power: k.

    Returns:
        Between about N and N P, (units,).

    Example:
        >>> same = torch.randn(100, 1, 1, dtype=torch.float64).expand(100, 1, 9)  # nine copies count once
        >>> round(effective(same, 3).item(), 6)
        100.0
    """
    samples, units, positions = values.shape
    z = _standardised(values.double().transpose(0, 1).flatten(1)).view(units, samples, positions)
    total = (z.mT @ z / samples).pow(power).sum((1, 2))
    return samples * positions**2 / total.clamp_min(positions)


@dataclass(frozen=True)
class Gaussianity:
    """Pre-activations of one layer against Gaussians.

    Args:
        layer: name from :func:`preactivations`.
        units: statistics of each unit over samples and positions, (units,).
        pooled: statistics of all values together, in which differences between units count, ().
        skew_error: standard error of a Gaussian's skew, sqrt(6 / n) at the :func:`effective` n, (units,).
        kurtosis_error: standard error of a Gaussian's excess kurtosis, sqrt(24 / n), (units,).
        quantiles: of the values at :data:`LEVELS`, each unit standardised on its own.
        count: values per unit.
    """

    layer: str
    units: Statistics
    pooled: Statistics
    skew_error: Tensor
    kurtosis_error: Tensor
    quantiles: Tensor
    count: int

    @property
    def within(self) -> float:
        """Share of units whose skew and kurtosis are both within 2 standard errors; of Gaussians about 0.91."""
        near = (self.units.skew.abs() <= 2 * self.skew_error) & (self.units.kurtosis.abs() <= 2 * self.kurtosis_error)
        return near.double().mean().item()


def gaussianity(values: Tensor, layer: str = "", limit: int = 4096) -> Gaussianity:
    """Compare the values of some units with Gaussians.

    Args:
        values: (N, units, P): samples, units and positions of a map, or (N, units).
        layer: name.
        limit: values per unit at most, from positions (64 at most) and samples at equal distances.

    Returns:
        The comparison, on the CPU in float64.

    Raises:
        ConfigError: for other shapes or fewer than two samples.

    Example:
        >>> found = gaussianity(torch.randn(1000, 5, generator=torch.Generator().manual_seed(0)))
        >>> bool((found.units.skew.abs() < 3 * found.skew_error).all()), round(found.skew_error[0].item(), 4)
        (True, 0.0775)
    """
    if values.ndim not in (2, 3) or len(values) < 2 or not values.numel() or limit < 2:
        raise ConfigError(
            f"gaussianity: {layer or 'values'} of shape {tuple(values.shape)}, at most {limit} per unit; expected "
            f"(samples, units[, positions]) with at least 2 samples"
        )
    values = values.detach().unsqueeze(2) if values.ndim == 2 else values.detach()
    samples = _spread(len(values), limit)
    positions = _spread(values.shape[2], min(_POSITIONS, max(1, limit // len(samples))))
    values = values[samples.to(values.device)][..., positions.to(values.device)].cpu().double()
    units = values.transpose(0, 1).flatten(1)
    z = _standardised(units).flatten()
    z = z[z.isfinite()].sort().values
    level = torch.tensor(LEVELS, dtype=torch.float64)
    return Gaussianity(
        layer=layer,
        units=statistics(units),
        pooled=statistics(units.flatten()),
        skew_error=(6.0 / effective(values, 3)).sqrt(),
        kurtosis_error=(24.0 / effective(values, 4)).sqrt(),
        quantiles=z[(level * len(z)).long()] if len(z) else torch.full_like(level, math.nan),
        count=units.shape[1],
    )


def _spread(count: int, most: int) -> Tensor:
    """Indices at equal distances, all of them if that is not too many."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


def measure(subject: Subject, limit: int = 4096) -> tuple[Gaussianity, ...]:
    """Compare what goes into each activation of a network with Gaussians.

    Args:
        subject: the network and a batch; a hundred samples or more tell apart skews of 0.5.
        limit: values per unit at most.

    Returns:
        One comparison for each call of an activation, from the input on.

    Raises:
        ConfigError: without activations, or for fewer than two samples.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> [found.layer for found in measure(Subject("net", model, torch.randn(16, 4)))]
        ['1']
    """
    found = preactivations(subject.model, subject.inputs, lambda values: gaussianity(values, subject.name, limit))
    return tuple(dataclasses.replace(value, layer=layer) for layer, value in found.items())


def describe(results: Mapping[str, Sequence[Gaussianity]]) -> Diagnosis:
    """Say how far from Gaussian the pre-activations of some networks are.

    Args:
        results: by network name.

    Returns:
        Sentences, numbers, and plots of skew, excess kurtosis and the quantiles of the least Gaussian layers.

    Example:
        >>> values = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> describe({"net": [gaussianity(values, "0")]}).found
        'Least Gaussian layer of net: 0 (median |skew| 0.16, excess kurtosis 0.48, distance 0.03). Units within 2
        standard errors of a Gaussian in skew and kurtosis, of which 91% would be by chance: net 67%.'
    """
    least = {name: max(layers, key=_distance) for name, layers in results.items() if layers}
    sentences = [
        f"{name}: {found.layer} (median |skew| {_median(found.units.skew.abs()):.2g}, excess kurtosis "
        f"{_median(found.units.kurtosis):.2g}, distance {_distance(found):.2g})"
        for name, found in least.items()
    ]
    within = [f"{name} {100 * _within(results[name]):.0f}%" for name in least]
    ideal = torch.special.ndtri(torch.tensor(LEVELS, dtype=torch.float64)).tolist()
    return Diagnosis(
        name="gaussianity",
        title="Are pre-activations Gaussian?",
        look_for="Skew and excess kurtosis inside the band of sampling errors around 0, and quantiles on the dashed "
        "diagonal: then the moments that are predicted for Gaussians hold.",
        found=f"Least Gaussian layer of {', of '.join(sentences)}. Units within 2 standard errors of a Gaussian in "
        f"skew and kurtosis, of which 91% would be by chance: {', '.join(within)}."
        if least
        else "No pre-activations were looked at.",
        numbers={name: [_numbers(found) for found in layers] for name, layers in results.items()},
        figures=[
            _profile("Skew, band: 2 standard errors", "|skew|, median unit", results, "skew", torch.abs),
            _profile(
                "Tails, band: 2 standard errors", "excess kurtosis, median unit", results, "kurtosis", torch.clone
            ),
            Plot(
                "Quantiles in the least Gaussian layer",
                "Gaussian, standard deviations",
                "pre-activation, its unit's standard deviations",
                [Line(name, ideal, found.quantiles.tolist(), style="line") for name, found in least.items()]
                + [Line("", ideal, ideal, style="theory")],
            ),
        ],
        source="Arpit et al. 2016, Normalization Propagation, section 3",
    )


def _profile(title: str, label: str, results: Mapping[str, Sequence[Gaussianity]], field: str, pick: Any) -> Plot:
    """Median over units by layer, and the band of sampling errors of a Gaussian, the widest of the networks."""
    lines = [
        Line(name, range(1, len(layers) + 1), [_median(pick(getattr(found.units, field))) for found in layers])
        for name, layers in results.items()
    ]
    depth = max((len(layers) for layers in results.values()), default=0)
    errors = [
        [2 * _median(getattr(layers[layer], f"{field}_error")) for layers in results.values() if layer < len(layers)]
        for layer in range(depth)
    ]
    width = [max((error for error in row if math.isfinite(error)), default=math.nan) for row in errors]
    low = [-error for error in width] if pick(torch.tensor(-1.0)) < 0 else [0.0] * depth
    band = Line("", range(1, depth + 1), [0.0] * depth, low, width, style="theory")
    return Plot(title, "activation, from the input", label, [*lines, band])


def _median(values: Tensor) -> float:
    """Median of what is finite."""
    return values[values.isfinite()].quantile(0.5).item() if values.isfinite().any() else math.nan


def _distance(found: Gaussianity) -> float:
    """Median distance over units; the largest there is where no unit has one."""
    distance = _median(found.units.distance)
    return distance if math.isfinite(distance) else 1.0


def _within(layers: Sequence[Gaussianity]) -> float:
    units = [len(found.units.mean) for found in layers]
    return sum(found.within * count for found, count in zip(layers, units, strict=True)) / sum(units)


def _numbers(found: Gaussianity) -> dict[str, Any]:
    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    fields = ("mean", "std", "skew", "kurtosis", "distance")
    return {
        "layer": found.layer,
        "values per unit": found.count,
        "units": len(found.units.mean),
        "units within 2 standard errors": found.within,
        "median over units": {field: finite(_median(getattr(found.units, field))) for field in fields}
        | {"|skew|": finite(_median(found.units.skew.abs()))},
        "pooled": {field: finite(getattr(found.pooled, field).item()) for field in fields},
        "standard error": {
            "skew": finite(_median(found.skew_error)),
            "kurtosis": finite(_median(found.kurtosis_error)),
        },
    }
