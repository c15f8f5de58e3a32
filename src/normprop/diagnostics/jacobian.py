"""How much a layer, a block or a whole network stretches a small change: its Jacobian J, (outputs, inputs)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normprop import moments as M
from normprop.diagnostics.diagnosis import Diagnosis, Subject, by_network, finite
from normprop.diagnostics.plot import Line, Plot, Reference
from normprop.diagnostics.products import LayerCall, differentiably, linearise, run
from normprop.diagnostics.spectrum import Spectrum, spectrum
from normprop.nn import NormPropLayer


@dataclass(frozen=True)
class Jacobians:
    """Jacobians of the layers of a network and of the whole.

    Args:
        layers: by dotted name, each of the layer's output by its own input.
        predicted: diagonal means that the theory gives, of NormProp layers.
        network: of the network's output by its input.
    """

    layers: Mapping[str, Spectrum]
    predicted: Mapping[str, float]
    network: Spectrum


def jacobian(
    function: Callable[[Tensor], Tensor],
    inputs: Tensor,
    *,
    exact: int = 256,
    probes: int = 32,
    steps: int = 32,
    seed: int = 0,
) -> Spectrum:
    """Look at the Jacobians of a function at some samples.

    Small ones are computed row by row, or column by column, and decomposed. Of others, some rows of E[J J^T] drawn at
    random are computed, and the density of the singular values by Lanczos quadrature from a random start per sample.

    Args:
        function: a module, looked at in its mode and left as it is, or any function of one tensor.
        inputs: where, a batch (N, ...).
        exact: largest min(m, n) at which all singular values are computed.
        probes: rows of E[J J^T] that are looked at where they are not.
        steps: of the quadrature.
        seed: of what is drawn.

    Returns:
        Diagonal and the rest of E[J J^T], and the singular values.

    Raises:
        ConfigError: if the function cannot be differentiated twice, or does not take the inputs.

    Source:
        Arpit et al., Normalization Propagation, ICML 2016, section 3.4.

    Example:
        >>> found = jacobian(lambda x: 2.0 * x.relu(), torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
        >>> found.diagonal_mean, found.values.tolist()
        (3.0, [0.0, 2.0, 2.0, 2.0])
    """
    holder = function if isinstance(function, nn.Module) else nn.Identity()
    with differentiably(holder, inputs, seed) as model:
        if isinstance(function, nn.Module):
            call = run(model, inputs)[0]
        else:
            start = inputs.detach().clone().requires_grad_()
            call = LayerCall("", holder, start, function(start.clone()))
        name = type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", "function")
        return spectrum(linearise(call.output, [call.input], name), exact=exact, probes=probes, steps=steps, seed=seed)


def predicted(layer: nn.Module) -> float | None:
    """Diagonal mean of E[J J^T] of a NormProp layer whose pre-activations are as the theory has them.

    The mean over units of gain^2 E[f'(z)^2] / c1^2 with z ~ N(bias, gain^2): pi / (pi - 1) for ReLU at gain 1.

    Args:
        layer: any module.

    Returns:
        The prediction; ``None`` for other layers, and transposed convolutions.

    Source:
        Arpit et al., Normalization Propagation, ICML 2016, section 3.4.

    Example:
        >>> from normprop.nn import Linear
        >>> round(predicted(Linear(4, 4, activation="relu")), 5), predicted(nn.Linear(4, 4))
        (1.46694, None)
    """
    if not isinstance(layer, NormPropLayer) or layer._transposed:
        return None
    with torch.no_grad():
        rule, gain = M.resolve(layer.activation), layer.gain.double()
        if rule.name == "identity":
            return float(gain.square().mean())
        bias = torch.zeros_like(gain) if layer.bias is None else layer.bias.double()
        moments = rule.moments(bias, gain.abs())
        var = moments.var if layer.moments == "live" else M.of(layer.activation).var
        return float(torch.as_tensor(gain.square() * moments.squared_derivative / var).mean())


def measure(
    subject: Subject, *, samples: int = 8, exact: int = 128, probes: int = 16, steps: int = 16, seed: int = 0
) -> Jacobians:
    """Look at the Jacobian of every watched layer, and of the whole network, in one forward pass.

    Args:
        subject: the network; only the first samples of its inputs are used.
        samples: how many.
        exact: as for :func:`jacobian`.
        probes: the same.
        steps: the same.
        seed: the same; also where random states start.

    Returns:
        The Jacobians; a layer that is called more than once counts by its first call.

    Raises:
        ConfigError: if the network cannot be differentiated twice, or does not take the inputs.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 2))
        >>> _ = nn.init.eye_(model[0].weight)
        >>> found = measure(Subject("eye", model, torch.zeros(4, 3)))
        >>> found.layers["0"].values.unique().tolist(), found.network.outputs
        ([1.0], 2)
    """
    kept = subject.inputs[:samples]
    settings = {"exact": exact, "probes": probes, "steps": steps, "seed": seed}
    with differentiably(subject.model, kept, seed) as model:
        whole, calls = run(model, kept)
        first: dict[str, LayerCall] = {}
        for call in calls:
            if call.output.requires_grad:
                first.setdefault(call.name, call)
        layers = {
            name: spectrum(linearise(call.output, [call.input], name), **settings) for name, call in first.items()
        }
        theory = {name: value for name, call in first.items() if (value := predicted(call.module)) is not None}
        network = spectrum(linearise(whole.output, [whole.input], type(model).__name__), **settings)
    return Jacobians(layers, theory, network)


def describe(results: Mapping[str, Jacobians]) -> Diagnosis:
    """Say how much layers stretch, and plot it by layer, with the singular values of the whole networks.

    Args:
        results: by the name of the network.

    Returns:
        The diagnosis.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> _ = nn.init.eye_(model[0].weight)
        >>> describe({"eye": measure(Subject("eye", model, torch.zeros(4, 2)))}).found
        'eye: its 1 layer multiplies the squared length of a gradient by 1; the whole network by 1. The most that it
        stretches a small change by is 1.'
    """
    diagonals, spectra = [], []
    for name, found in results.items():
        place = {layer: index + 1 for index, layer in enumerate(found.layers)}
        diagonals.append(
            Line(name, [*place.values()], [layer.diagonal_mean for layer in found.layers.values()], style="both")
        )
        if found.predicted:
            heights = [*found.predicted.values()]
            diagonals.append(Line(f"{name}, theory", [place[at] for at in found.predicted], heights, style="theory"))
        share = found.network.weights.cumsum(0) - found.network.weights / 2
        spectra.append(Line(name, share.tolist(), found.network.values.tolist()))
    named = [[*found.layers] for found in results.values()]
    shared = bool(named) and all(names == named[0] for names in named)
    return Diagnosis(
        name="jacobian",
        title="How much does each layer stretch a small change?",
        look_for="A layer that keeps the size of gradients stands at 1; layers above 1 multiply up and make gradients "
        "explode with depth, layers below 1 make them vanish.",
        found=by_network(results, _words),
        numbers={name: _numbers(found) for name, found in results.items()},
        figures=(
            Plot(
                "Mean diagonal of E[JJ^T]",
                "layer",
                "factor on the squared length of a gradient",
                diagonals,
                y_scale="log",
                references=(Reference(1.0, "size kept"),),
                x_ticks=[(index + 1, layer) for index, layer in enumerate(named[0])] if shared else None,
            ),
            Plot(
                "Singular values of the whole network",
                "share of the singular values that are smaller",
                "singular value",
                spectra,
                y_scale="symlog",
                references=(Reference(1.0, "length kept"),),
            ),
        ),
        source="Arpit et al., Normalization Propagation, ICML 2016, section 3.4",
    )


def _words(found: Jacobians) -> str:
    """What was found of one network."""
    values = [layer.diagonal_mean for layer in found.layers.values()]
    whole = found.network
    if not all(map(math.isfinite, [*values, whole.diagonal_mean, whole.largest])):
        bad = [layer for layer, at in found.layers.items() if not math.isfinite(at.diagonal_mean)]
        return f"the derivatives are not finite{f', first at layer {bad[0]}' if bad else ''}."
    span = ""
    if values:
        mean = math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0
        layers = f"its {len(values)} layer{'s multiply' if len(values) > 1 else ' multiplies'}"
        span = f"{layers} the squared length of a gradient by {mean:.3g}"
        if len(values) > 1:
            span += f" on average ({min(values):.3g} to {max(values):.3g})"
        if found.predicted:
            theory = [*found.predicted.values()]
            low, high = f"{min(theory):.3g}", f"{max(theory):.3g}"
            span += f", where theory says {low if low == high else f'{low} to {high}'}"
        span += "; the whole network by"
    else:
        span = "the whole network multiplies the squared length of a gradient by"
    bound = "" if whole.exact else "at least "
    return (
        f"{span} {whole.diagonal_mean:.3g}. The most that it stretches a small change by is {bound}{whole.largest:.3g}."
    )


def _numbers(found: Jacobians) -> dict[str, Any]:
    """The numbers of one network."""

    def one(at: Spectrum) -> dict[str, Any]:
        return {
            "outputs": at.outputs,
            "inputs": at.inputs,
            "diagonal_mean": finite(at.diagonal_mean),
            "diagonal_error": finite(at.diagonal_error),
            "off_diagonal_rms": finite(at.off_diagonal_rms),
            "mean_square": finite(at.mean_square),
            "largest": finite(at.largest),
            "exact": at.exact,
            "coupled": at.coupled,
        }

    layers = {name: {**one(at), "predicted": found.predicted.get(name)} for name, at in found.layers.items()}
    return {"layers": layers, "network": one(found.network)}
