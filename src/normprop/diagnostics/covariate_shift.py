r"""How much do the inputs of hidden layers move while a network trains?

Two measures of the mean and the standard deviation of every unit (channel) of every hidden layer's input:

- the paper's own: the mean of one fixed unit's value per layer, against steps. It depends on the scale and the offset
  of the values, so it does not compare like with like: what enters a layer behind batch norm and ReLU is rectified, of
  mean 0.399 at the start; what enters a NormProp layer is centred.
- the drift, like for like: how far a unit's mean has moved, in units of its own standard deviation, and how much its
  variance has changed, from 0 for not at all to 1 for a unit that fell silent. Both stay as they are if all values are
  scaled and shifted:

.. math::
    d_t = \sqrt{\tfrac1U \sum_u \frac{(m_{tu} - m_{0u})^2}{(s_{tu}^2 + s_{0u}^2)/2}}, \qquad
    r_t = \sqrt{\tfrac1U \sum_u \Bigl(\frac{s_{tu}^2 - s_{0u}^2}{s_{tu}^2 + s_{0u}^2}\Bigr)^2}

Source:
    Arpit et al. 2016, figure 2 (the means); Ioffe & Szegedy 2015 (internal covariate shift). The drift is ours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normprop.diagnostics.diagnosis import Diagnosis, Subject, by_network, finite
from normprop.diagnostics.input_history import History, InputRecorder
from normprop.diagnostics.loss import batches_of
from normprop.diagnostics.plot import Line, Plot
from normprop.diagnostics.quiet import quietly
from normprop.errors import ConfigError
from normprop.training import constrain

_SETTLING = 40  # passes; 0.9^40 = 1.5% is left of what running statistics started with


@dataclass(frozen=True)
class LayerShift:
    """How the input of one layer moved.

    Args:
        layer: name.
        steps: of the records, (T,).
        mean: the paper's quantity: mean of one fixed unit at each record, (T,).
        drift: d of the module's text: distance of the units' means from the record at the start, in their own standard
            deviations, root mean square over units, (T,); 0 if nothing moved.
        spread: r of the module's text: change of the units' variances, between 0 and 1, (T,); 0.6 if deviations double.
        pace: as ``drift``, from each record to the next, (T - 1,).
    """

    layer: str
    steps: tuple[int, ...]
    mean: tuple[float, ...]
    drift: tuple[float, ...]
    spread: tuple[float, ...]
    pace: tuple[float, ...]

    @property
    def magnitude(self) -> float:
        """Mean over records of the fixed unit's absolute mean."""
        return sum(map(abs, self.mean)) / len(self.mean)


def shift(history: History, unit: int = 0, start: int = 0) -> tuple[LayerShift, ...]:
    """Summarise how the layers' inputs moved.

    Args:
        history: one record or more.
        unit: which unit's mean to follow, of every layer, modulo the number of its units.
        start: which record distances are taken from. The first of a network with batch norm shows, in evaluation,
            running statistics that have seen no data; then take a later one.

    Returns:
        One entry for each layer. A unit that was constant at both times and moved has an infinite drift.

    Raises:
        ConfigError: without a record there.

    Example:
        >>> means, stds = torch.tensor([[0.0], [1.0], [1.0]]), torch.full((3, 1), 0.5)
        >>> (layer,) = shift(History((0, 1, 2), {"1": means}, {"1": stds}))
        >>> layer.mean, layer.drift, layer.spread, layer.pace
        ((0.0, 1.0, 1.0), (0.0, 2.0, 2.0), (0.0, 0.0, 0.0), (2.0, 0.0))
    """
    if not 0 <= start < len(history.steps):
        raise ConfigError(
            f"covariate-shift: no record {start} among {len(history.steps)}; call record(step) in the training loop"
        )
    found = []
    for layer, means in history.means.items():
        stds = history.stds[layer]
        mean, std, variances = means[start], stds[start], stds.square()
        change = _moved((variances - variances[start]) / (variances + variances[start]), stds == std)
        found.append(
            LayerShift(
                layer=layer,
                steps=history.steps,
                mean=_floats(means[:, unit % means.shape[1]]),
                drift=_floats(_distance(means, mean, stds, std)),
                spread=_floats(change.square().mean(1).sqrt()),
                pace=_floats(_distance(means[1:], means[:-1], stds[1:], stds[:-1])),
            )
        )
    return tuple(found)


def _distance(mean: Tensor, other: Tensor, std: Tensor, other_std: Tensor) -> Tensor:
    """Root mean square over units of the distance of means, in units of the pooled standard deviation."""
    variance = (std.square() + other_std.square()) / 2
    return _moved((mean - other).square() / variance, mean == other).mean(1).sqrt()


def _moved(values: Tensor, unmoved: Tensor) -> Tensor:
    """0 where nothing moved, also where 0 / 0 says nothing."""
    return torch.where(unmoved, 0.0, values)


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())


def measure(
    subject: Subject, steps: int = 60, rate: float = 0.05, batch_size: int = 32, every: int = 5, probe: int = 64
) -> tuple[LayerShift, ...]:
    """Train a copy of a network with SGD (momentum 0.9) on cross entropy and follow its hidden layers' inputs.

    NormProp layers are kept at unit length, as in training. Passes in training mode without updates come first, so that
    running statistics have seen data by the first record.

    Args:
        subject: the network, a batch and its labels.
        steps: updates.
        rate: learning rate.
        batch_size: samples of an update, in turn out of the subject's inputs.
        every: steps between records.
        probe: samples of the probe at most, the first of the inputs.

    Returns:
        One entry for each hidden layer.

    Raises:
        ConfigError: without labels or hidden layers, or for a batch size below 1.

    Example:
        >>> from normprop import models
        >>> _ = torch.manual_seed(0)
        >>> model = models.create("mlp", (6,), 2, norm="none", width=0.05)
        >>> found = measure(Subject("none", model, torch.randn(64, 6), torch.arange(64) % 2), steps=10)
        >>> [layer.layer for layer in found], found[0].steps, found[0].drift[0]
        (['2', '3', '4', '5'], (0, 5, 10), 0.0)
    """
    if batch_size < 1 or steps < 0:
        raise ConfigError(f"covariate-shift: batches of {batch_size}, {steps} steps; expected 1 or more, 0 or more")
    batches = batches_of(subject, batch_size)
    with quietly(subject.model, subject.inputs, grad=True) as model:
        model.train()
        recorder = InputRecorder(model, subject.inputs[:probe], every)
        with torch.no_grad():
            for step in range(_SETTLING):
                model(batches[step % len(batches)][0])
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        constrain(optimizer, model)
        recorder.record(0)
        for step in range(1, steps + 1):
            inputs, labels = batches[(step - 1) % len(batches)]
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            recorder.record(step)
    return shift(recorder.history)


def describe(results: Mapping[str, Sequence[LayerShift]]) -> Diagnosis:
    """Say how far the inputs of some networks' hidden layers moved.

    Args:
        results: by network name.

    Returns:
        Sentences, numbers, and plots against steps: drift and change of variances, root mean square over layers, and
        the paper's means of single units.

    Example:
        >>> layer = LayerShift("1", (0, 10), (0.25, -0.75), (0.0, 2.0), (0.0, 0.7), (2.0,))
        >>> describe({"batch": [layer]}).found
        'batch: by the end of training the means of hidden inputs have moved by 2 of their own standard deviations; the
        means of single units, which scale and offset decide as well, have an average size of 0.5.'
    """
    found = {name: layers for name, layers in results.items() if layers}

    def plot(title: str, label: str, field: str) -> Plot:
        lines = [Line(name, layers[0].steps, _over(layers, field)) for name, layers in found.items()]
        return Plot(title, "step", label, lines)

    return Diagnosis(
        name="covariate-shift",
        title="How much do the inputs of hidden layers move during training?",
        look_for="Curves that level off early mean that layers soon see inputs of a fixed distribution; the means of "
        "single units depend on scale and offset as well, so compare methods by the drift.",
        found=by_network(found, _words) or "No layers were followed.",
        numbers={name: [_numbers(layer) for layer in layers] for name, layers in results.items()},
        figures=[
            plot("Drift of the means, all layers", "distance from the start, standard deviations", "drift"),
            plot("Change of the variances, all layers", "relative change of variances, 0 to 1", "spread"),
            Plot(
                "Mean of one unit's value in each layer, as in the paper",
                "step",
                "mean over the probe",
                [
                    Line(name, layer.steps, layer.mean, style="line")
                    for name, layers in found.items()
                    for layer in layers
                ],
            ),
        ],
        source="Arpit et al. 2016, Normalization Propagation, figure 2",
    )


def _over(layers: Sequence[LayerShift], field: str) -> list[float]:
    """Root mean square over layers, record by record."""
    rows = zip(*(getattr(layer, field) for layer in layers), strict=True)
    return [math.sqrt(sum(value * value for value in row) / len(row)) for row in rows]


def _words(layers: Sequence[LayerShift]) -> str:
    """What was found in one network."""
    drift, size = _over(layers, "drift")[-1], sum(layer.magnitude for layer in layers) / len(layers)
    moved = f"{drift:.2g} of" if math.isfinite(drift) else "more than can be measured in"
    return (
        f"by the end of training the means of hidden inputs have moved by {moved} their own standard deviations; the "
        f"means of single units, which scale and offset decide as well, have an average size of {size:.2g}."
    )


def _numbers(layer: LayerShift) -> dict[str, Any]:
    return {"layer": layer.layer, "steps": list(layer.steps)} | {
        field: [finite(value) for value in getattr(layer, field)] for field in ("mean", "drift", "spread", "pace")
    }
