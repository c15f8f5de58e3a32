"""Inference time of folded NormProp networks, as ratios to the same networks without any normalisation.

    python -m benchmarks.fold --seconds 20

Every network comes in three forms: as it is in evaluation, folded, and built without normalisation. All take turns in
one process; the median ratio over the rounds with its quartiles.
"""

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from normprop import fold, models


def times(networks: Mapping[str, nn.Module], images: Tensor, seconds: float) -> dict[str, list[float]]:
    """Seconds of every forward pass, with the networks in turns."""
    taken: dict[str, list[float]] = {name: [] for name in networks}
    order = [*networks]
    gc.disable()
    with torch.inference_mode():
        for _ in range(3):
            for network in networks.values():
                network(images)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(taken[order[0]]) < 5:
            for name in order:
                start = time.perf_counter()
                networks[name](images)
                taken[name].append(time.perf_counter() - start)
            order.append(order.pop(0))
    gc.enable()
    return taken


def forms(model: str, width: float) -> dict[str, nn.Module]:
    """The networks to compare, the one without normalisation first."""
    made: dict[str, nn.Module] = {}
    for method in ("none", "batch", "normprop", "normprop-paper"):
        net = models.create(model, (3, 32, 32), 10, norm=method, width=width).eval()
        made[method] = net
        if method != "none":
            made[f"{method}, folded"] = fold(net, torch.randn(2, 3, 32, 32))
    return made


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="nin,resnet14")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch-sizes", default="1,32")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each model and batch size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"Inference, width {options.width:g}, 3x32x32, float32, eager; torch {torch.__version__}, ", end="")
    print(f"Python {platform.python_version()}, {options.threads} threads\n")
    print("| model | batch | form | ratio to none | quartiles | ms |\n| --- | --- | --- | --- | --- | --- |")
    for model in options.models.split(","):
        networks = forms(model, options.width)
        for size in options.batch_sizes.split(","):
            taken = times(networks, torch.randn(int(size), 3, 32, 32), options.seconds)
            for name, own in taken.items():
                ratios = [each / other for each, other in zip(own, taken["none"], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
                spread = f"{low:.3f} to {high:.3f}"
                print(f"| {model} | {size} | {name} | {middle:.3f} | {spread} | {1e3 * statistics.median(own):.2f} |")


if __name__ == "__main__":
    main()
