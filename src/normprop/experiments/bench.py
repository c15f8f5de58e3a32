"""The benchmark of training steps: every method of a case in turns, as ratios to the plain network and batch norm."""

import gc
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normprop.experiments import machine
from normprop.experiments.bench_cases import NETWORKS, Case, cases, check_methods, memory_format
from normprop.experiments.bench_memory import peak_bytes, saved_bytes
from normprop.experiments.timing import BASELINE, interleaved, ratios, training_step

Row = dict[str, Any]
Progress = Callable[[int, int, str], None]


def bench(
    methods: Sequence[str],
    *,
    networks: Sequence[str],
    batch_sizes: Sequence[int],
    modes: Sequence[str] = ("eager",),
    layouts: Sequence[str] = ("contiguous",),
    dtypes: Sequence[str] = ("float32",),
    seconds: float = 20.0,
    width: float = 1.0,
    device: torch.device | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Time the training steps of methods on networks: forward, backward, fused SGD and the unit-norm constraint.

    The methods of a case take turns in this process, in an order that rotates, with the threads that torch has here. A
    compiled case compiles the networks; the update stays what it is.

    Args:
        methods: names of normalisers; "none" is added.
        networks: keys of :data:`normprop.experiments.bench_cases.NETWORKS`.
        batch_sizes: samples per step.
        modes: of "eager" and "compiled".
        layouts: of "contiguous" and "channels-last".
        dtypes: of "float32" and "bfloat16", which is autocast.
        seconds: time for each case, after its warm-up; at least five rounds.
        width: factor on the networks' channels.
        device: where to run; by default the CPU.
        progress: called before each case, and after the last, with the number of cases done, of all cases, and the
            case in words.
        command: the command line, for the document.

    Returns:
        A document of plain JSON values: machine, versions, settings, notes and one row per case and method. A row has
        milliseconds (median) with their quartiles, ``to_none`` and ``to_batch`` (median and quartiles of the ratio over
        the rounds), ``saved_bytes`` for the backward pass and their ratio ``saved_ratio`` to the plain network's,
        ``peak_bytes`` on CUDA, and, where a method cannot run, ``reason`` instead.

    Raises:
        ConfigError: for a name or number that cannot work, before anything is timed.

    Example:
        >>> document = bench(["none"], networks=["mlp"], batch_sizes=[2], seconds=0, width=0.01)
        >>> document["rows"][0]["to_none"]["ratio"]
        1.0
    """
    device = device or torch.device("cpu")
    todo, notes = cases(networks, batch_sizes, modes, layouts, dtypes)
    load = _load()
    if load > 0.5:
        notes.append(f"Other programs ran beside this one: before it began they kept {load:.1f} cores busy.")
    methods = check_methods(methods, networks)
    tell = progress or (lambda done, total, words: None)
    rows: list[Row] = []
    for done, case in enumerate(todo):
        tell(done, len(todo), str(case))
        rows += run_case(case, methods, width=width, seconds=seconds, device=device)
    tell(len(todo), len(todo), "")
    return {
        "title": f"Training steps at width {width:g}",
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(device.type),
        "load": load,
        "versions": machine.versions(),
        "settings": {"width": width, "seconds": seconds, "methods": methods},
        "notes": notes,
        "rows": rows,
    }


def run_case(
    case: Case,
    methods: Sequence[str],
    *,
    width: float,
    seconds: float,
    device: torch.device,
) -> list[Row]:
    """Run one case of the benchmark.

    Args:
        case: what the methods share.
        methods: names of normalisers that can be built for the network, "none" among them.
        width: factor on the network's channels.
        seconds: time to spend on the rounds.
        device: where to run.

    Returns:
        One row per method, as `bench` has them.

    Example:
        >>> case = Case("mlp", 1, "eager", "contiguous", "float32")
        >>> rows = run_case(case, ["none", "batch"], width=0.01, seconds=0, device=torch.device("cpu"))
        >>> rows[1]["reason"]
        'Expected more than 1 value per channel when training, got input size torch.Size([1, 10])'
    """
    torch.manual_seed(0)
    gc.collect()  # hooks tie the networks of the case before into cycles
    torch.compiler.reset()
    images, labels = _batch(case, device)
    steps: dict[str, Callable[[], None]] = {}
    memory: dict[str, Row] = {}
    reasons: dict[str, str] = {}
    for method in methods:
        try:
            network = _network(case, method, width, device)
            loss = _loss(case, network, images, labels)
            step = training_step(network, loss)
            step()  # compiles
            held = [*network.parameters(), *network.buffers(), images, labels]
            memory[method] = {"saved_bytes": saved_bytes(loss, held), "peak_bytes": peak_bytes(step, device)}
        except Exception as error:  # whatever a method or the compiler cannot take
            reasons[method] = next(iter(str(error).strip().splitlines()), type(error).__name__)
        else:
            steps[method] = step
    if BASELINE in reasons:
        reasons = dict.fromkeys(steps, f"there is no ratio: {BASELINE} cannot run: {reasons[BASELINE]}") | reasons
        steps = {}
    times = interleaved(steps, seconds, device) if steps else {}
    return [
        {**asdict(case), "method": method, "reason": reasons.get(method)}
        | (_numbers(times, method) | memory[method] if method in times else {})
        | ({"saved_ratio": memory[method]["saved_bytes"] / memory[BASELINE]["saved_bytes"]} if method in times else {})
        for method in methods
    ]


def _load() -> float:
    """Processes that ran during the last minute, on average; 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _network(case: Case, method: str, width: float, device: torch.device) -> nn.Module:
    network: Any = NETWORKS[case.network].build(norm=method, width=width)
    placed: nn.Module = network.to(device, memory_format=memory_format(case))
    return placed


def _batch(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and labels; what is in them does not matter to the time."""
    network = NETWORKS[case.network]
    images = torch.randn(case.batch_size, *network.shape, device=device).to(memory_format=memory_format(case))
    space = network.shape[1:] if network.dense else ()
    return images, torch.randint(network.classes, (case.batch_size, *space), device=device)


def _loss(case: Case, network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """The forward pass and the loss of a case."""
    # Without isolation, the networks of a case would share a cache and its limit: the last ones would run eagerly.
    compiled: Any = partial(torch.compile, isolate_recompiles=True)
    forward = compiled(network) if case.mode == "compiled" else network

    def loss() -> Tensor:
        cast = torch.autocast(images.device.type, torch.bfloat16) if case.dtype == "bfloat16" else nullcontext()
        with cast:
            return F.cross_entropy(forward(images), labels)

    return loss


def _numbers(times: Mapping[str, list[float]], method: str) -> Row:
    """A row's times."""
    other = times.get("batch")
    low, middle, high = statistics.quantiles([1000 * each for each in times[method]], n=4, method="inclusive")
    return {
        "milliseconds": middle,
        "milliseconds_quartiles": [low, high],
        "rounds": len(times[method]),
        "to_none": ratios(times[method], times[BASELINE])._asdict(),
        "to_batch": None if other is None else ratios(times[method], other)._asdict(),
    }
