"""Figure 4 of the paper: NormProp at batch sizes 1, 50, 100 and 250."""

import statistics

from normprop.diagnostics.plot import Plot
from normprop.experiments.reproduce import cifar
from normprop.experiments.reproduce.context import Context, Scale
from normprop.experiments.reproduce.curves import accuracy, accuracy_line
from normprop.experiments.reproduce.reproduction import Reproduction, Table, judged, spread

# Rates at 50 and 100 are printed; at 1 and 250 they are not, so one seed chooses; at 1 a run is long.
RATES: dict[Scale, dict[int, tuple[float, ...]]] = {
    "small": {1: (0.0005,), 50: (0.05,), 100: (0.08,), 250: (0.1, 0.2)},
    "paper": {1: (0.0005, 0.001), 50: (0.05,), 100: (0.08,), 250: (0.1, 0.2)},
}
# Read off the figure: accuracy after the first and the last epoch.
_PRINTED = {1: ("69", "90"), 50: ("63", "90"), 100: ("65", "90"), 250: ("48", "88")}
_METHOD = "normprop-paper"


def run(context: Context) -> Reproduction:
    """Train the paper's network at four batch sizes.

    Args:
        context: scale, data and storage.

    Returns:
        Test accuracy against epoch.

    Source:
        Arpit et al. 2016, section 5.4, figure 4.
    """
    rates = RATES[context.scale]
    seeds = context.seed_list(2 if context.scale == "small" else 3)
    settings = cifar.settings(context, data_norm="global")
    cells = [(_METHOD, size) for size in rates]
    trained = context.tuned(cifar.study(context, settings), settings, cells, rates, seeds)
    runs = {size: trained[_METHOD, size] for size in rates}
    curves = {size: accuracy(records) for size, records in runs.items()}
    epochs = settings.training.epochs
    rows = [
        (
            str(size),
            f"{runs[size][0].combination.lr:g}" if runs[size] else "every rate diverged",
            spread(curves[size].get(1, [])),
            _PRINTED[size][0],
            spread(curves[size].get(epochs, [])),
            _PRINTED[size][1],
        )
        for size in rates
    ]
    agrees, contradicts = judged(_claims(curves, epochs))
    return Reproduction(
        name="normprop-fig4",
        title="NormProp learns equally well at any batch size down to 1",
        paper="Arpit et al. 2016, section 5.4, figure 4",
        scale=context.scale,
        protocol=f"{cifar.described(settings)} Data normalised globally, {len(seeds)} seeds; rates "
        + "; ".join(f"{', '.join(f'{rate:g}' for rate in tried)} at {size}" for size, tried in rates.items())
        + ", chosen by the validation error of the first seed where there are several.",
        differs_from_paper="The paper trains the network at full width on 50,000 images for 50 epochs; its first epoch "
        "has five times as many steps as that here."
        if context.scale == "small"
        else "",
        table=Table(
            ("batch size", "rate", "first epoch, %", "printed", f"epoch {epochs}, %", "printed (epoch 50)"), rows
        ),
        figures=[
            Plot("Test accuracy", "epoch", "%", [accuracy_line(f"batch {size}", runs[size]) for size in rates]),
        ],
        agrees=agrees,
        contradicts=contradicts,
        numbers={str(size): {str(epoch): values for epoch, values in curves[size].items()} for size in rates},
    )


def _claims(curves: dict[int, dict[int, list[float]]], epochs: int) -> list[tuple[bool, str]]:
    ends = {size: statistics.fmean(curve[epochs]) for size, curve in curves.items() if curve.get(epochs)}
    starts = {size: statistics.fmean(curve[1]) for size, curve in curves.items() if curve.get(1)}
    if len(ends) < len(curves):
        return [(False, "At some batch size every run diverged.")]
    best = max(ends.values())
    return [
        (
            best - ends[1] <= 1.0,
            f"Batch size 1 ends at {ends[1]:.1f} %, the best batch size at {best:.1f} % (the paper: both about 90).",
        ),
        (
            abs(best - ends[250]) <= 3.0,
            f"Batch size 250 ends {best - ends[250]:.1f} points below the best (the paper: about 2).",
        ),
        (
            min(starts, key=lambda size: starts[size]) == 250 and max(starts, key=lambda size: starts[size]) == 1,
            "After the first epoch: "
            + ", ".join(f"{value:.1f} % at {size}" for size, value in starts.items())
            + " (the paper: best at 1, worst at 250).",
        ),
    ]
