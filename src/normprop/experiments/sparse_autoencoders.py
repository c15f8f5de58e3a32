"""How sparse do regularised auto-encoders become? The training protocol of the paper, and its sweep over coefficients.

Source:
    Arpit, Zhou, Ngo & Govindaraju 2016 (Why regularized auto-encoders learn sparse representation?), section 5.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from normprop.diagnostics.autoencoder_losses import OBJECTIVES
from normprop.diagnostics.diagnosis import Diagnosis
from normprop.diagnostics.plot import Line, Plot
from normprop.diagnostics.sparsity import THRESHOLDS
from normprop.errors import ConfigError
from normprop.models.autoencoder import AutoEncoder

COEFFICIENTS = (0.0, 0.001, *(round((tenth / 10) ** 2, 2) for tenth in range(1, 11)))
"""The paper's variances of noise and factors of regularisers."""

_CHUNK = 4096  # samples measured at a time


@dataclass(frozen=True)
class Epoch:
    """One pass over the data.

    Args:
        loss: mean of the objective over the epoch, while it was trained on.
        reconstruction: J_AE on the data after the epoch.
        activation_fraction: share of the samples that activate a unit, mean over units, after the epoch.
        dead_share: share of the units that no sample activates.
    """

    loss: float
    reconstruction: float
    activation_fraction: float
    dead_share: float


@dataclass(frozen=True)
class Record:
    """One training run; ``dataclasses.asdict`` gives what JSON can store.

    Args:
        objective, activation, coefficient, unit_norm, hidden, lr, seed: as :func:`train` took them.
        epochs: what was measured after each pass, up to the last one with finite losses.
        diverged: whether the loss stopped being finite.
        seconds: of the training.
    """

    objective: str
    activation: str
    coefficient: float
    unit_norm: bool
    hidden: int
    lr: float
    seed: int
    epochs: tuple[Epoch, ...]
    diverged: bool
    seconds: float


def standardised(samples: Tensor, offset: float = 0.0) -> Tensor:
    """Give every feature mean 0 and standard deviation 1: ``(x - mean) / (std + offset)``.

    Args:
        samples: (N, ...), of floating type; flattened.
        offset: added to the standard deviations; 0.1 for MNIST, where many pixels never change. Features that do not
            change become 0 in any case.

    Returns:
        (N, n).

    Source:
        Arpit et al. 2016, section 5.

    Example:
        >>> standardised(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        tensor([[-1.,  0.],
                [ 1.,  0.]])
    """
    samples = samples.flatten(1)
    variance, mean = torch.var_mean(samples, 0, correction=0)
    scale = variance.sqrt() + offset
    return (samples - mean) / torch.where(scale > 0, scale, 1.0)


def patches(images: Tensor, count: int, size: int = 8, generator: torch.Generator | None = None) -> Tensor:
    """Cut square patches at random places of random images.

    Args:
        images: (N, C, H, W).
        count: number of patches.
        size: their height and width.
        generator: where images and places are drawn from; ``None`` for torch's own.

    Returns:
        (count, C, size, size), of the images' type.

    Raises:
        ConfigError: if there are no images, or they are smaller than a patch.

    Source:
        Arpit et al. 2016, section 5.

    Example:
        >>> patches(torch.zeros(2, 3, 32, 32), 5).shape
        torch.Size([5, 3, 8, 8])
    """
    if images.ndim != 4 or not len(images) or min(images.shape[2:]) < size:
        raise ConfigError(
            f"patches: images have shape {tuple(images.shape)}; expected (N, C, H, W), {size} pixels a side"
        )
    drawn_on = generator.device if generator is not None else images.device

    def draw(end: int) -> Tensor:
        return torch.randint(end, (count,), generator=generator, device=drawn_on).to(images.device)

    # A view of all windows; indexing it copies the chosen ones.
    windows = images.unfold(2, size, 1).unfold(3, size, 1)
    return windows[draw(len(images)), :, draw(windows.shape[2]), draw(windows.shape[3])]


def fit(
    autoencoder: AutoEncoder,
    data: Tensor,
    objective: str,
    coefficient: float,
    *,
    unit_norm: bool,
    epochs: int,
    lr: float,
    batch_size: int = 50,
    momentum: float = 0.9,
    generator: torch.Generator | None = None,
) -> tuple[Epoch, ...]:
    r"""Train an auto-encoder in place by SGD with momentum.

    Args:
        autoencoder: the network, of an activation that can fall silent.
        data: (N, n), normalised, on its device.
        objective: name, a key of :data:`~normprop.diagnostics.autoencoder_losses.OBJECTIVES`.
        coefficient: of the regulariser, or variance of the noise.
        unit_norm: give every unit's weight length 1 at the start and after each step.
        epochs: passes over the data.
        lr: learning rate.
        batch_size: samples per step; the last of a pass may be fewer.
        momentum: of SGD.
        generator: where order and noise are drawn from; ``None`` for torch's own.

    Returns:
        What was measured after each pass; fewer than ``epochs`` if the loss stopped being finite.

    Raises:
        ConfigError: for settings or data that cannot work.

    Example:
        >>> rows = fit(AutoEncoder(4, 3), torch.randn(100, 4), "dae", 0.1, unit_norm=True, epochs=2, lr=0.01)
        >>> len(rows)
        2
    """
    _check(autoencoder, data, objective, epochs, lr, batch_size)
    loss_of = OBJECTIVES[objective]
    optimizer = torch.optim.SGD(autoencoder.parameters(), lr=lr, momentum=momentum, fused=True)
    if unit_norm:
        autoencoder.normalize_weight_()
    rows = []
    for _ in range(epochs):
        drawn_on = generator.device if generator is not None else data.device
        order = torch.randperm(len(data), generator=generator, device=drawn_on).to(data.device)
        total = data.new_zeros(())
        for index in order.split(batch_size):
            loss = loss_of(autoencoder, data[index], coefficient, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if unit_norm:
                autoencoder.normalize_weight_()
            total += loss.detach() * len(index)
        row = _measure(autoencoder, data, float(total / len(data)))
        if not (math.isfinite(row.loss) and math.isfinite(row.reconstruction)):
            break
        rows.append(row)
    return tuple(rows)


def train(
    objective: str,
    activation: str,
    coefficient: float,
    unit_norm: bool,
    data: Tensor,
    epochs: int = 50,
    hidden: int = 1000,
    lr: float = 0.001,
    seed: int = 0,
) -> Record:
    """Build an auto-encoder and train it as the paper does: batches of 50, momentum 0.9.

    Args:
        objective: "ae", "dae", "edae", "mdae", "cae" or "sae".
        activation: "relu", "softplus" or "sigmoid".
        coefficient: of the regulariser, or variance of the noise.
        unit_norm: keep every unit's weight at length 1.
        data: (N, n), normalised (:func:`standardised`).
        epochs: passes over the data.
        hidden: number of units.
        lr: learning rate; the paper's are 0.001 and 0.005.
        seed: of weights, order and noise; torch's own generator is left alone.

    Returns:
        The run's record.

    Raises:
        ConfigError: for settings or data that cannot work.

    Source:
        Arpit et al. 2016, section 5.

    Example:
        >>> record = train("mdae", "relu", 0.1, True, torch.randn(100, 6), epochs=1, hidden=4)
        >>> record.diverged, len(record.epochs)
        (False, 1)
    """
    if data.ndim != 2 or not data.is_floating_point():
        raise ConfigError(
            f"sparse auto-encoders: data are {data.dtype} {tuple(data.shape)}; expected samples, (N, n), as "
            "standardised() gives them"
        )
    generator = torch.Generator().manual_seed(seed)
    autoencoder = AutoEncoder(
        data.shape[1], hidden, activation, generator=generator, device=data.device, dtype=data.dtype
    )
    start = time.perf_counter()
    rows = fit(
        autoencoder, data, objective, coefficient, unit_norm=unit_norm, epochs=epochs, lr=lr, generator=generator
    )
    return Record(
        objective=objective,
        activation=activation,
        coefficient=coefficient,
        unit_norm=unit_norm,
        hidden=hidden,
        lr=lr,
        seed=seed,
        epochs=rows,
        diverged=len(rows) < epochs,
        seconds=time.perf_counter() - start,
    )


def sweep(
    objective: str,
    activation: str,
    unit_norm: bool,
    data: Tensor,
    coefficients: Sequence[float] = COEFFICIENTS,
    epochs: int = 50,
    hidden: int = 1000,
    lr: float = 0.001,
    seed: int = 0,
    progress: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Train at every coefficient from the same start, on the same batches.

    Args:
        objective, activation, unit_norm, data, epochs, hidden, lr, seed: see :func:`train`.
        coefficients: to try, in this order.
        progress: called with each record as it comes.

    Returns:
        A record for each coefficient.

    Raises:
        ConfigError: for settings or data that cannot work.

    Example:
        >>> records = sweep("dae", "relu", True, torch.randn(50, 6), [0.0, 1.0], epochs=1, hidden=4)
        >>> [record.coefficient for record in records]
        [0.0, 1.0]
    """
    records = []
    for coefficient in coefficients:
        records.append(train(objective, activation, coefficient, unit_norm, data, epochs, hidden, lr, seed))
        if progress is not None:
            progress(records[-1])
    return records


def describe(sweeps: Mapping[str, Sequence[Record]]) -> Diagnosis:
    """Say how sparsity goes with the coefficient.

    Args:
        sweeps: records by name, such as that of the objective.

    Returns:
        The diagnosis.

    Raises:
        ConfigError: if there are none.

    Example:
        >>> describe({"dae": sweep("dae", "relu", True, torch.randn(50, 6), [0, 1], epochs=1, hidden=4)}).name
        'sparse-autoencoders'
    """
    sweeps = {name: sorted(records, key=lambda record: record.coefficient) for name, records in sweeps.items()}
    ended = {name: [record for record in records if record.epochs] for name, records in sweeps.items()}
    if not sweeps or not all(sweeps.values()):
        raise ConfigError("sparse auto-encoders: no runs to describe; give at least one record for every name")
    lost = [f"{sum(r.diverged for r in records)} of {len(records)} in {name}" for name, records in sweeps.items()
            if any(r.diverged for r in records)]  # fmt: skip
    found = "; ".join(_trend(name, records) for name, records in ended.items() if records)
    return Diagnosis(
        name="sparse-autoencoders",
        title="Does more regularisation make the codes sparser?",
        look_for="A curve that falls steadily means a regulariser that controls sparsity; a flat one, one that does "
        "not reach the biases; where dead units rise, sparsity has gone too far.",
        found=" ".join(
            [f"Share of the samples that activate a unit: {found}."] * bool(found)
            + [f"Diverged: {', '.join(lost)}."] * bool(lost)
        ),
        numbers={
            name: [
                {"coefficient": r.coefficient, "diverged": r.diverged}
                | {key: getattr(r.epochs[-1], key) if r.epochs else None for key in Epoch.__dataclass_fields__}
                for r in records
            ]
            for name, records in sweeps.items()
        },
        figures=[
            _plot("Activity of the units", "share of samples", "activation_fraction", ended),
            _plot("Dead units", "share of units", "dead_share", ended),
            _plot("Error of reconstruction", "squared error of a sample", "reconstruction", ended),
        ],
        source="Arpit, Zhou, Ngo & Govindaraju 2016, section 5, figures 1 to 5",
    )


def _trend(name: str, records: Sequence[Record]) -> str:
    """Activity from the smallest to the largest coefficient, and how often it falls on the way."""
    active = [record.epochs[-1].activation_fraction for record in records]
    first, last, dead = records[0].coefficient, records[-1].coefficient, records[-1].epochs[-1].dead_share
    end = f"({100 * dead:.3g} % of the units dead)"
    if len(active) == 1:
        return f"{100 * active[0]:.3g} % in {name} at {first:g} {end}"
    falls = sum(later < earlier for earlier, later in pairwise(active))
    return (
        f"{100 * active[0]:.3g} % in {name} at {first:g}, {100 * active[-1]:.3g} % at {last:g} {end}, "
        f"falling at {falls} of {len(active) - 1} steps"
    )


def _plot(title: str, label: str, key: str, sweeps: Mapping[str, Sequence[Record]]) -> Plot:
    lines = [
        Line(name, [r.coefficient for r in records], [getattr(r.epochs[-1], key) for r in records])
        for name, records in sweeps.items()
    ]
    return Plot(title, "coefficient, or variance of the noise", label, lines)


@torch.no_grad()
def _measure(autoencoder: AutoEncoder, data: Tensor, loss: float) -> Epoch:
    """Look at the codes of all samples, some thousands at a time."""
    threshold = THRESHOLDS[autoencoder.activation]
    error, active = data.new_zeros(()), torch.zeros(autoencoder.hidden, dtype=torch.int64, device=data.device)
    for samples in data.split(_CHUNK):
        codes = autoencoder.encode(samples)
        active += (codes > threshold).sum(0)
        error += (autoencoder.decode(codes) - samples).square().sum()
    shares = torch.stack([error / len(data), (active / len(data)).mean(), (active == 0).float().mean()])
    reconstruction, fraction, dead = shares.tolist()
    return Epoch(loss, reconstruction, fraction, dead)


def _check(autoencoder: AutoEncoder, data: Tensor, objective: str, epochs: int, lr: float, batch_size: int) -> None:
    """Refuse what cannot work before any time is spent."""
    if objective not in OBJECTIVES:
        raise ConfigError(f"sparse auto-encoders: no objective {objective!r}; choose one of {', '.join(OBJECTIVES)}")
    if autoencoder.activation not in THRESHOLDS:
        raise ConfigError(
            f"sparse auto-encoders: activation {autoencoder.activation!r} never falls silent; use one of "
            f"{', '.join(THRESHOLDS)}"
        )
    if not len(data) or data.dtype != autoencoder.weight.dtype:
        raise ConfigError(
            f"sparse auto-encoders: data are {data.dtype} {tuple(data.shape)}; expected samples, (N, n), as "
            f"{autoencoder.weight.dtype}"
        )
    if epochs < 1 or batch_size < 1 or not 0 < lr < math.inf:
        raise ConfigError(
            f"sparse auto-encoders: epochs={epochs}, batch_size={batch_size}, lr={lr}; expected positive numbers"
        )
