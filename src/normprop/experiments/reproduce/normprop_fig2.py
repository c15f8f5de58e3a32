"""Figure 2 of the paper: how far the inputs of hidden layers move during training."""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from normprop.data import batches
from normprop.diagnostics.covariate_shift import LayerShift, shift
from normprop.diagnostics.input_history import following
from normprop.diagnostics.plot import Line, Plot
from normprop.experiments.grid import Combination
from normprop.experiments.reproduce import cifar
from normprop.experiments.reproduce.context import Context
from normprop.experiments.reproduce.curves import by_method
from normprop.experiments.reproduce.reproduction import Reproduction, Table, judged, spread
from normprop.nn import DataNorm

# As printed: the plain network diverges at the rate of the others.
RATES = {"normprop-paper": 0.05, "batch": 0.05, "normprop": 0.05, "none": 1e-4}
BATCH_SIZE, _PROBE = 50, 256
_PRINTED = {"normprop-paper": "0.19", "batch": "0.33", "none": "60 to 150 in two layers"}

Runs = Mapping[str, list[list[dict[str, Any]]]]


def run(context: Context) -> Reproduction:
    """Train the paper's network with NormProp, with batch norm and without normalisation, and follow hidden inputs.

    Args:
        context: scale, data and storage.

    Returns:
        Means of single units, as in the figure, and the drift of all units in their own standard deviations.

    Source:
        Arpit et al. 2016, section 5.2, figure 2.
    """
    from normprop.training.loop import fit

    seeds = context.seed_list(2 if context.scale == "small" else 3)
    settings = cifar.settings(context, data_norm="global")
    dataset = settings.load()
    norm = DataNorm(dataset.shape).fit(batches(dataset.train, 4096, shuffle=False))
    probe = norm(next(batches(dataset.validation, _PROBE, shuffle=False))[0])

    def measure(combination: Combination) -> dict[str, Any] | None:
        followed = following(settings.builder(dataset, combination.method), probe)
        result = fit(followed.build, dataset, settings.config(combination), callback=followed.callback)
        if result.status != "complete":
            return None
        # Running statistics have seen no data at the first record, so distances are taken from the second.
        return {"layers": [dataclasses.asdict(layer) for layer in shift(followed.history(), start=1)]}

    wanted = [Combination(method, BATCH_SIZE, rate, seed) for seed in seeds for method, rate in RATES.items()]
    name = f"normprop-fig2-{context.scale}"
    found = context.measure(name, settings.identity(dataset), wanted, measure)
    runs = {method: [run["layers"] for run in of] for method, of in by_method(found, RATES).items()}
    agrees, contradicts = judged(_claims(runs))
    return Reproduction(
        name="normprop-fig2",
        title="NormProp keeps the inputs of hidden layers in place while it trains",
        paper="Arpit et al. 2016, section 5.2, figure 2",
        scale=context.scale,
        protocol=f"{cifar.described(settings)} Data normalised globally, batch size {BATCH_SIZE}, rate 0.05, and "
        f"0.0001 without normalisation; {len(seeds)} seeds; inputs of layers 2 to 9 over {_PROBE} validation images, "
        "in evaluation mode, after each epoch.",
        differs_from_paper=""
        if context.scale == "paper"
        else "The paper trains the network at full width on 50,000 images for 50 epochs.",
        table=Table(
            ("method", "size of a unit's mean", "printed", "drift of all units, in their standard deviations"),
            [
                (
                    method,
                    spread([magnitude(layers) for layers in runs[method]]),
                    _PRINTED.get(method, "–"),
                    spread([drift(layers) for layers in runs[method]]),
                )
                for method in RATES
            ],
        ),
        figures=[_units(method, runs[method][0]) for method in ("normprop-paper", "batch") if runs[method]]
        + [_drifts(runs)],
        agrees=agrees,
        contradicts=contradicts,
        notes=[
            "The means of single units are not like for like: what enters a layer behind batch norm is rectified, with "
            "mean 0.40 at the start, what enters a NormProp layer is centred. The drift is: it is measured in each "
            "unit's own standard deviation, from the end of the first epoch on."
        ],
        numbers={
            method: {"size": [magnitude(r) for r in of], "drift": [drift(r) for r in of]} for method, of in runs.items()
        },
    )


def magnitude(layers: list[dict[str, Any]]) -> float:
    """Mean over layers and records of the absolute mean of one unit, the paper's figure for each method."""
    return statistics.fmean(abs(value) for layer in layers for value in layer["mean"])


def drift(layers: list[dict[str, Any]]) -> float:
    """Mean over layers of how far the units have moved by the end."""
    return statistics.fmean(LayerShift(**layer).drift[-1] for layer in layers)


def _units(method: str, layers: list[dict[str, Any]]) -> Plot:
    lines = [
        Line(f"layer {number}", list(range(len(layer["mean"]))), layer["mean"], style="line")
        for number, layer in enumerate(layers, 2)
    ]
    return Plot(f"Mean of one unit's input in each layer, {method}", "epoch", "mean over the probe", lines)


def _drifts(runs: Runs) -> Plot:
    lines = []
    for method, found in runs.items():
        if found:
            records = zip(*(layer["drift"] for layers in found for layer in layers), strict=True)
            values = [statistics.fmean(record) for record in records]
            lines.append(Line(method, list(range(1, len(values))), values[1:]))
    return Plot("Drift of all units, like for like", "epoch", "distance from epoch 1, standard deviations", lines)


def _claims(runs: Runs) -> list[tuple[bool, str]]:
    if not (runs["normprop-paper"] and runs["batch"]):
        return [(False, "A method diverged at the printed rate with every seed.")]
    sizes = {method: statistics.fmean(map(magnitude, found)) for method, found in runs.items() if found}
    moved = {method: statistics.fmean(map(drift, found)) for method, found in runs.items() if found}
    claims = [
        (
            sizes["normprop-paper"] < sizes["batch"],
            f"The mean of one unit's input has an average size of {sizes['normprop-paper']:.2f} with normprop-paper "
            f"and of {sizes['batch']:.2f} with batch norm (the paper: 0.19 and 0.33).",
        ),
        (
            moved["normprop-paper"] < moved["batch"],
            f"Like for like, the inputs move by {moved['normprop-paper']:.2f} of their own standard deviations with "
            f"normprop-paper and by {moved['batch']:.2f} with batch norm (the paper says that NormProp's move less, "
            "and does not measure this).",
        ),
    ]
    if "none" in sizes:
        claims.append(
            (
                sizes["none"] > 5 * sizes["batch"],
                f"Without normalisation the size is {sizes['none']:.2g} (the paper: 60 to 150 in layers 2 and 4).",
            )
        )
    return claims
