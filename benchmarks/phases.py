"""Where a training step's time goes: forward, backward and update, for several methods in turns.

    python benchmarks/phases.py --model nin --batch-size 1 --seconds 10

Medians in milliseconds; the update is fused SGD with momentum and, for NormProp layers, the constraint.
"""

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from normprop import models
from normprop.training import constrain, parameter_groups

PHASES = ("forward", "backward", "update")


def phases(model: str, side: int, method: str, batch_size: int) -> Callable[[], list[float]]:
    """A step that returns the seconds of its three phases."""
    images, labels = torch.randn(batch_size, 3, side, side), torch.randint(10, (batch_size,))
    network = models.create(model, (3, side, side), 10, norm=method).train()
    optimizer = torch.optim.SGD(parameter_groups(network, weight_decay=5e-4), lr=0.0, momentum=0.9, fused=True)
    constrain(optimizer, network)

    def step() -> list[float]:
        optimizer.zero_grad()
        marks = [time.perf_counter()]
        loss = F.cross_entropy(network(images), labels)
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        optimizer.step()
        marks.append(time.perf_counter())
        return [end - start for start, end in itertools.pairwise(marks)]

    return step


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nin")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--methods", default="none,batch,normprop-paper,normprop")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    methods = options.methods.split(",")
    steps = {method: phases(options.model, options.side, method, options.batch_size) for method in methods}
    times: dict[str, list[list[float]]] = {method: [] for method in steps}
    for step in steps.values():
        step()
    gc.disable()
    end = time.perf_counter() + options.seconds
    while time.perf_counter() < end:
        for method, step in steps.items():
            times[method].append(step())
    print(f"| {options.model}, batch {options.batch_size} | {' | '.join(PHASES)} | all |\n|{' --- |' * 5}")
    for method in methods:
        middle = [1000 * statistics.median(phase) for phase in zip(*times[method], strict=True)]
        whole = 1000 * statistics.median(sum(step) for step in times[method])
        print(f"| {method} | {' | '.join(f'{phase:.1f}' for phase in middle)} | {whole:.1f} |")


if __name__ == "__main__":
    main()
