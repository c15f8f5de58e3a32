"""Figure 1 of the paper: global against batch normalisation of the data."""

import statistics

from normprop.diagnostics.plot import Plot
from normprop.experiments.grid import Combination
from normprop.experiments.reproduce import cifar
from normprop.experiments.reproduce.context import Context
from normprop.experiments.reproduce.curves import accuracy, accuracy_line, complete
from normprop.experiments.reproduce.reproduction import Reproduction, Table, judged, spread
from normprop.experiments.trial import TrialRecord

RATES = {50: 0.05, 100: 0.08}
_PRINTED = {("batch", 50): "90.35 (the best)"}
_METHOD = "normprop-paper"


def run(context: Context) -> Reproduction:
    """Train the paper's network with both normalisations of the data at batch sizes 50 and 100.

    Args:
        context: scale, data and storage.

    Returns:
        Test accuracy against epoch, and after the last.

    Source:
        Arpit et al. 2016, section 5.1, figure 1.
    """
    seeds = context.seed_list(3)
    runs: dict[tuple[str, int], list[TrialRecord]] = {}
    for data_norm in ("global", "batch"):
        settings = cifar.settings(context, data_norm=data_norm)
        wanted = [Combination(_METHOD, size, rate, seed) for seed in seeds for size, rate in RATES.items()]
        trained = context.train(cifar.study(context, settings), settings, wanted)
        for size in RATES:
            runs[data_norm, size] = [trained[c] for c in wanted if c.batch_size == size]
    final = {key: accuracy(records).get(settings.training.epochs, []) for key, records in runs.items()}
    return Reproduction(
        name="normprop-fig1",
        title="Normalising the data by the batch or by the whole training set makes little difference",
        paper="Arpit et al. 2016, section 5.1, figure 1",
        scale=context.scale,
        protocol=f"{cifar.described(settings)} Rate 0.05 at batch size 50 and 0.08 at 100, {len(seeds)} seeds.",
        differs_from_paper=""
        if context.scale == "paper"
        else "The paper trains the network at full width on 50,000 images for 50 epochs and halves the rate every 10.",
        table=Table(
            ("data normalisation", "batch size", "test accuracy, %", "printed", "diverged"),
            [
                (
                    data_norm,
                    str(batch_size),
                    spread(final[data_norm, batch_size]),
                    _PRINTED.get((data_norm, batch_size), "about 90, off the figure"),
                    f"{len(records) - len(complete(records))} of {len(records)}",
                )
                for (data_norm, batch_size), records in runs.items()
            ],
        ),
        figures=[
            Plot(
                "Test accuracy",
                "epoch",
                "%",
                [accuracy_line(f"{norm}, batch {size}", records) for (norm, size), records in runs.items()],
            )
        ],
        **_claims(final),
        numbers={f"{norm} {size}": values for (norm, size), values in final.items()},
    )


def _claims(final: dict[tuple[str, int], list[float]]) -> dict[str, list[str]]:
    """What the figure shows, checked."""
    means = {key: statistics.fmean(values) for key, values in final.items() if values}
    if len(means) < len(final):
        return {"contradicts": ["Some of the four runs diverged at the printed rates."]}
    gap = max(means.values()) - min(means.values())
    noise = statistics.fmean(statistics.stdev(v) if len(v) > 1 else 0.0 for v in final.values())
    best = max(means, key=lambda key: means[key])
    agrees, contradicts = judged(
        [
            (
                gap <= max(2 * noise, 1.0),
                f"The four ends lie within {gap:.1f} points of each other; one standard deviation over seeds is "
                f"{noise:.1f} (the paper: four overlapping curves, about 90 % all).",
            ),
            (
                best == ("batch", 50),
                f"The best is {best[0]} normalisation at batch size {best[1]}, {means[best]:.1f} % (the paper: batch "
                "normalisation of the data at 50).",
            ),
        ]
    )
    return {"agrees": agrees, "contradicts": contradicts}
