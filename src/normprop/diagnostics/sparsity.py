r"""Are an auto-encoder's codes sparse, and does its regulariser make them so?

A unit is sparse if few samples activate it. Training moves its mean pre-activation through the encoder's bias, so a
regulariser R makes codes sparser where :math:`\lambda\, \partial R / \partial b_j > 0`.

Source:
    Arpit, Zhou, Ngo & Govindaraju 2016 (Why regularized auto-encoders learn sparse representation?).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normprop.diagnostics.autoencoder_losses import NOISY, bias_gradient, denoising_expansion
from normprop.diagnostics.diagnosis import Diagnosis, Subject, finite
from normprop.diagnostics.plot import Line, Plot, Reference
from normprop.errors import ConfigError
from normprop.models.autoencoder import AutoEncoder

THRESHOLDS: dict[str, float] = {"relu": 0.0, "sigmoid": 0.1, "softplus": 0.1}
"""Above which code a unit counts as active, by activation: those whose output vanishes as its input falls."""


@dataclass(frozen=True)
class Sparsity:
    """What :func:`measure` found; tensors have one number per unit, (m,).

    Args:
        objective: name of the objective whose regulariser is looked at.
        coefficient: its coefficient.
        active: share of the samples that activate a unit; nan where codes are not finite.
        distance: how many standard deviations the mean pre-activation lies below the least active one.
        silent_bound: least share of silent samples by Chebyshev (theorem 2).
        reconstruction: gradient of J_AE in the encoder's bias.
        regulariser: gradient of the objective less J_AE in the encoder's bias, mean over draws of noise.
        regulariser_error: its standard error over the draws, 0 for an objective without noise.
        bound: largest size that the reconstruction's gradient can have (lemma 1).
        residual_std: root mean square of x - y over samples and features.
        expansion: what noise of variance 1 adds to J_AE: "own", "cross" and "residual" (theorem 3).
    """

    objective: str
    coefficient: float
    active: Tensor
    distance: Tensor
    silent_bound: Tensor
    reconstruction: Tensor
    regulariser: Tensor
    regulariser_error: Tensor
    bound: Tensor
    residual_std: float
    expansion: Mapping[str, float]

    @property
    def dead(self) -> Tensor:
        """Units that no sample activates."""
        return self.active == 0

    @property
    def pushed_down(self) -> Tensor:
        """Units whose bias the regulariser lowers, by more than two standard errors."""
        return self.regulariser > 2 * self.regulariser_error

    @property
    def sure(self) -> Tensor:
        """Units whose bias falls whatever the reconstruction does (theorem 1)."""
        return self.regulariser > self.bound


def activation_fraction(codes: Tensor, threshold: float) -> Tensor:
    """Share of the samples that activate each unit.

    Args:
        codes: h, (N, m).
        threshold: above which a unit is active.

    Returns:
        (m,), from 0 to 1; nan for a unit with codes that are not finite.

    Source:
        Arpit et al. 2016, section 5.

    Example:
        >>> activation_fraction(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), 0.0)
        tensor([0.5000, 1.0000])
    """
    share = (codes > threshold).to(codes.dtype).mean(0)
    return share.masked_fill(~codes.isfinite().all(0), math.nan)


def lowest_active(activation: str, threshold: float) -> float:
    """Pre-activation at which a unit's code reaches the threshold.

    Args:
        activation: "relu", "sigmoid" or "softplus".
        threshold: a code that the activation can take.

    Returns:
        The inverse of the activation at the threshold.

    Raises:
        ConfigError: if the activation never falls silent, or never takes this value.

    Source:
        Arpit et al. 2016, theorem 2.

    Example:
        >>> lowest_active("relu", 0.0), round(lowest_active("sigmoid", 0.1), 4)
        (0.0, -2.1972)
    """
    if activation not in THRESHOLDS:
        known = ", ".join(THRESHOLDS)
        raise ConfigError(f"sparsity: activation {activation!r} does not vanish as its input falls; use one of {known}")
    if activation == "relu" and threshold >= 0:
        return threshold
    if activation == "softplus" and threshold > 0:
        return threshold + math.log(-math.expm1(-threshold))
    if activation == "sigmoid" and 0 < threshold < 1:
        return math.log(threshold / (1 - threshold))
    raise ConfigError(f"sparsity: threshold {threshold} is no code of {activation!r}; use {THRESHOLDS[activation]}")


def gradient_bound(lengths: Tensor, residual_std: float, features: int) -> Tensor:
    r"""Bound the reconstruction's gradient: :math:`|\partial J_{AE} / \partial b_j| \le 2 \sigma_r \sqrt n \|W_j\|`.

    With the measured root mean square residual it holds on any data, for an activation with slopes in [0, 1].

    Args:
        lengths: of the units' weights, (m,).
        residual_std: sigma_r.
        features: n.

    Returns:
        (m,).

    Source:
        Arpit et al. 2016, lemma 1.

    Example:
        >>> gradient_bound(torch.tensor([1.0, 0.5]), 0.5, 4)
        tensor([2., 1.])
    """
    return 2 * residual_std * math.sqrt(features) * lengths


def chebyshev_bound(mean: Tensor, variance: Tensor, lowest: float) -> Tensor:
    r"""Least share of silent samples: :math:`1 - Var(a_j) / (a_{min} - E a_j)^2`, or 0 where that says nothing.

    On whitened data the variance is the squared length of the unit's weight.

    Args:
        mean: E a_j, of the pre-activations, (m,).
        variance: of the pre-activations, (m,).
        lowest: a_min, see :func:`lowest_active`.

    Returns:
        (m,), from 0 to 1.

    Source:
        Arpit et al. 2016, theorem 2.

    Example:
        >>> chebyshev_bound(torch.tensor([-2.0, 3.0]), torch.ones(2), 0.0)
        tensor([0.7500, 0.0000])
    """
    below = lowest - mean
    return torch.where(below > 0, (1 - variance / below.square()).clamp_min(0), below.clamp(0, 0))


def measure(
    subject: Subject,
    objective: str = "dae",
    coefficient: float = 0.1,
    threshold: float | None = None,
    draws: int = 8,
    generator: torch.Generator | None = None,
) -> Sparsity:
    """Measure how sparse an auto-encoder's codes are, and where its objective pushes them.

    Args:
        subject: an :class:`~normprop.models.autoencoder.AutoEncoder` and samples, which are flattened.
        objective: whose regulariser to look at.
        coefficient: of the regulariser, or variance of the noise.
        threshold: above which a unit is active; ``None`` for that of :data:`THRESHOLDS`.
        draws: of the noise, at least 2.
        generator: where noise is drawn from; ``None`` for one of its own, with the seed 0.

    Returns:
        The measurements.

    Raises:
        ConfigError: for another kind of network, or inputs or settings that do not fit.

    Example:
        >>> subject = Subject("new", AutoEncoder(4, 3), torch.randn(20, 4))
        >>> measure(subject, "mdae").regulariser
        tensor([0., 0., 0.])
    """
    autoencoder, inputs = subject.model, subject.inputs
    if not isinstance(autoencoder, AutoEncoder):
        raise ConfigError(
            f"sparsity: {subject.name} is a {type(autoencoder).__name__}; expected an "
            "AutoEncoder of normprop.models.autoencoder"
        )
    weight = autoencoder.weight
    if inputs.ndim < 2 or not len(inputs) or inputs.dtype != weight.dtype:
        raise ConfigError(
            f"sparsity: {subject.name}: inputs are {inputs.dtype} {tuple(inputs.shape)}; expected samples, "
            f"(N, {autoencoder.features}), as {weight.dtype}"
        )
    if draws < 2:
        raise ConfigError(f"sparsity: draws={draws}; expected at least 2, to tell the noise's error")
    if threshold is None:
        threshold = THRESHOLDS.get(autoencoder.activation, 0.0)
    lowest = lowest_active(autoencoder.activation, threshold)
    generator = generator or torch.Generator().manual_seed(0)
    inputs = inputs.flatten(1)
    with torch.no_grad():
        a = autoencoder.preactivation(inputs)
        codes = autoencoder.nonlinearity.function(a)
        residual_std = float((autoencoder.decode(codes) - inputs).square().mean().sqrt())
        variance, mean = torch.var_mean(a, 0, correction=0)
        terms = denoising_expansion(autoencoder, inputs)
        bound = gradient_bound(weight.norm(dim=1), residual_std, autoencoder.features)
    repeats = draws if objective in NOISY else 1
    plain = bias_gradient(autoencoder, inputs, "ae")
    regulariser = torch.stack(
        [bias_gradient(autoencoder, inputs, objective, coefficient, generator) - plain for _ in range(repeats)]
    )
    error = regulariser.std(0) / math.sqrt(repeats) if repeats > 1 else torch.zeros_like(plain)
    return Sparsity(
        objective=objective,
        coefficient=coefficient,
        active=activation_fraction(codes, threshold),
        distance=(lowest - mean) / variance.sqrt(),
        silent_bound=chebyshev_bound(mean, variance, lowest),
        reconstruction=plain,
        regulariser=regulariser.mean(0),
        regulariser_error=error,
        bound=bound,
        residual_std=residual_std,
        expansion={name: float(term) for name, term in terms._asdict().items()},
    )


def describe(results: Mapping[str, Sparsity]) -> Diagnosis:
    """Say what was found.

    Args:
        results: measurements by network.

    Returns:
        The diagnosis.

    Raises:
        ConfigError: if there are none.

    Example:
        >>> describe({"new": measure(Subject("new", AutoEncoder(4, 3), torch.randn(20, 4)))}).name
        'sparsity'
    """
    if not results:
        raise ConfigError("sparsity: no results to describe; measure at least one auto-encoder")
    broken = [name for name, result in results.items() if not _finite(result)]
    rest = {name: result for name, result in results.items() if name not in broken}
    found = []
    if rest:
        active = [f"{_percent(r.active)} in {name} ({_count(r.dead)} units dead)" for name, r in rest.items()]
        pushed = [f"{_count(r.pushed_down)} units in {name} ({_objective(r)})" for name, r in rest.items()]
        found.append(f"Share of the samples that activate a unit, on average: {', '.join(active)}.")
        found.append(f"The regulariser lowers the bias of {', '.join(pushed)}.")
    if broken:
        found.append(f"Not finite: {', '.join(broken)}.")
    return Diagnosis(
        name="sparsity",
        title="Are the codes sparse, and does the regulariser make them so?",
        look_for="Units active for few samples are sparse, units at 0 are dead; a unit above 0 in the plot of "
        "gradients has its bias lowered by the regulariser and so grows sparser.",
        found=" ".join(found),
        numbers={name: _numbers(result) for name, result in results.items()},
        figures=_figures(results),
        source="Arpit, Zhou, Ngo & Govindaraju 2016, lemma 1, theorems 1 to 3 and section 5",
    )


def _finite(result: Sparsity) -> bool:
    tensors = (result.active, result.reconstruction, result.regulariser, result.bound)
    return all(bool(values.isfinite().all()) for values in tensors)


def _percent(share: Tensor) -> str:
    return f"{100 * float(share.mean()):.3g} %"


def _count(units: Tensor) -> str:
    return f"{int(units.sum())} of {len(units)}"


def _objective(result: Sparsity) -> str:
    sure = int(result.sure.sum())
    words = f"; in {sure} of them whatever the reconstruction does" if sure else ""
    return f"{result.objective} at {result.coefficient:g}{words}"


def _numbers(result: Sparsity) -> dict[str, Any]:
    def mean(values: Tensor) -> float | None:
        return finite(float(values.to(result.active.dtype).mean()))

    return {
        "objective": result.objective,
        "coefficient": result.coefficient,
        "units": len(result.active),
        "activation_fraction": mean(result.active),
        "dead_share": mean(result.dead),
        "pushed_down_share": mean(result.pushed_down),
        "sure_share": mean(result.sure),
        "reconstruction_gradient": mean(result.reconstruction),
        "regulariser_gradient": mean(result.regulariser),
        "largest_part_of_bound": finite(float((result.reconstruction.abs() / result.bound).max())),
        "residual_std": finite(float(result.residual_std)),
        "expansion": {name: finite(float(term)) for name, term in result.expansion.items()},
    }


def _figures(results: Mapping[str, Sparsity]) -> list[Plot]:
    """Activity of the units, gradients in their biases, and silence against Chebyshev's bound."""
    activity, gradients, silence = [], [], []
    for name, result in results.items():
        shares = result.active.sort(descending=True).values.tolist()
        ranks = [100 * (rank + 0.5) / len(shares) for rank in range(len(shares))]
        activity.append(Line(name, ranks, shares, style="line"))
        gradients.append(Line(name, result.reconstruction.tolist(), result.regulariser.tolist(), style="points"))
        below = result.distance.isfinite() & (result.distance > 0)
        if below.any():
            silent = (1 - result.active)[below]
            silence.append(Line(name, result.distance[below].tolist(), silent.tolist(), style="points"))
    figures = [
        Plot("How often units are active", "units, most active first, %", "share of samples", activity),
        Plot(
            "Gradients in the biases", "by reconstruction", "by the regulariser", gradients, references=[Reference(0.0)]
        ),
    ]
    if silence:
        most = max(1.5, *(max(line.x) for line in silence))
        steps = [0.0, *(most ** (step / 60) for step in range(61))]
        bound = Line("Chebyshev's bound", steps, [1 - 1 / max(step, 1) ** 2 for step in steps], style="theory")
        label = "distance of the mean pre-activation below activity, standard deviations"
        figures.append(
            Plot("How silent units are", label, "share of silent samples", [*silence, bound], x_scale="symlog")
        )
    return figures
