"""Figure 3 of the paper: NormProp against batch norm, validation accuracy during training."""

import itertools
import statistics

from normprop.diagnostics.plot import Plot
from normprop.experiments.grid import Combination
from normprop.experiments.reproduce import cifar
from normprop.experiments.reproduce.context import Context
from normprop.experiments.reproduce.curves import accuracy, accuracy_line, by_method
from normprop.experiments.reproduce.reproduction import Reproduction, Table, judged, spread

METHODS = ("normprop-paper", "batch", "normprop")
BATCH_SIZE, RATE = 50, 0.05
# Read off the figure: accuracy of NormProp and batch norm after these of 50 epochs.
_PRINTED = {5: ("79", "69"), 10: ("80", "72"), 20: ("85", "79"), 30: ("87", "81"), 50: ("90", "90")}
_PAPER_EPOCHS = 50


def run(context: Context) -> Reproduction:
    """Train the paper's network with NormProp and with batch norm.

    Args:
        context: scale, data and storage.

    Returns:
        Test accuracy against epoch, and its changes from epoch to epoch.

    Source:
        Arpit et al. 2016, section 5.3, figure 3.
    """
    seeds = context.seed_list(3)
    settings = cifar.settings(context, data_norm="batch")
    wanted = [Combination(method, BATCH_SIZE, RATE, seed) for seed in seeds for method in METHODS]
    trained = context.train(cifar.study(context, settings), settings, wanted)
    runs = by_method(trained, METHODS)
    curves = {method: accuracy(records) for method, records in runs.items()}
    epochs = settings.training.epochs
    shown = {epoch * epochs // _PAPER_EPOCHS: printed for epoch, printed in _PRINTED.items()}
    rows = [
        (
            str(epoch),
            *(spread(curves[method].get(epoch, [])) for method in METHODS),
            *(f"{value} (epoch {epoch * _PAPER_EPOCHS // epochs})" for value in printed),
        )
        for epoch, printed in shown.items()
    ]
    agrees, contradicts = judged(_claims(curves, list(shown)))
    small = context.scale == "small"
    return Reproduction(
        name="normprop-fig3",
        title="NormProp learns more steadily than batch norm and is ahead until the end",
        paper="Arpit et al. 2016, section 5.3, figure 3",
        scale=context.scale,
        protocol=f"{cifar.described(settings)} Data normalised by the batch, batch size {BATCH_SIZE}, rate {RATE}, "
        f"{len(seeds)} seeds.",
        differs_from_paper="The paper trains the network at full width on 50,000 images for 50 epochs; epochs are "
        "compared at the same share of the run."
        if small
        else "",
        table=Table(("epoch", *(f"{m}, %" for m in METHODS), "printed, NormProp", "printed, batch norm"), rows),
        figures=[Plot("Test accuracy", "epoch", "%", [accuracy_line(method, runs[method]) for method in METHODS])],
        agrees=agrees,
        contradicts=contradicts,
        notes=[
            "The paper's caps, called 95 % confidence intervals, are as wide as a binomial interval on 10,000 test "
            "images; the bands here are standard deviations over seeds."
        ],
        numbers={method: {str(epoch): values for epoch, values in curve.items()} for method, curve in curves.items()},
    )


def roughness(curve: dict[int, list[float]]) -> float:
    """Mean fall of accuracy from one epoch to the next, over epochs and seeds, in points; a rise counts as 0.

    Args:
        curve: accuracies of each seed, by epoch.

    Returns:
        0 for a curve that never falls.

    Example:
        >>> roughness({1: [50.0], 2: [48.0], 3: [60.0]})
        1.0
    """
    seeds = list(zip(*curve.values(), strict=True))
    return statistics.fmean(max(0.0, before - after) for s in seeds for before, after in itertools.pairwise(s))


def _claims(curves: dict[str, dict[int, list[float]]], epochs: list[int]) -> list[tuple[bool, str]]:
    ours, batch = curves["normprop-paper"], curves["batch"]
    if epochs[-1] not in ours or epochs[-1] not in batch:
        return [(False, "A method diverged at the printed rate with every seed.")]
    falls = roughness(ours), roughness(batch)
    leads = [statistics.fmean(ours[e]) - statistics.fmean(batch[e]) for e in epochs]
    ahead = sum(lead > 0 for lead in leads[:-1])
    return [
        (
            falls[0] < falls[1],
            f"Accuracy falls from one epoch to the next by {falls[0]:.2f} points on average with normprop-paper and by "
            f"{falls[1]:.2f} with batch norm (the paper: NormProp is steadier).",
        ),
        (
            ahead == len(leads) - 1,
            f"Before the end normprop-paper is ahead of batch norm at {ahead} of {len(leads) - 1} epochs compared, by "
            f"{min(leads[:-1]):+.1f} to {max(leads[:-1]):+.1f} points (the paper: ahead at all, by 6 to 10).",
        ),
        (
            abs(leads[-1]) <= 1.0,
            f"At the end the difference is {leads[-1]:+.1f} points (the paper: none, both about 90).",
        ),
    ]
