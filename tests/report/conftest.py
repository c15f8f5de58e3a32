import math
import random
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

import pytest

METHODS = ("none", "normprop", "normprop-paper", "batch", "group", "layer", "instance", "weight")
# Test error at the best rate, how steep the valley around it is, and the rate above which training diverges.
_CHARACTER = {
    "none": (0.60, 0.05, 0.012),
    "normprop": (0.405, 0.02, 0.05),
    "normprop-paper": (0.495, 0.03, 0.05),
    "batch": (0.415, 0.02, 1.0),
    "group": (0.47, 0.025, 1.0),
    "layer": (0.50, 0.03, 1.0),
    "instance": (0.53, 0.03, 1.0),
    "weight": (0.57, 0.04, 0.03),
}
_LAYERS = [f"body.{index}" for index in range(9)]


@pytest.fixture(scope="session")
def make_document() -> Callable[..., dict[str, Any]]:
    return make


def make(
    methods: Sequence[str] = METHODS,
    batch_sizes: Sequence[int] = (1, 4, 8, 32),
    lrs: Sequence[float] = (0.005, 0.02, 0.08),
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 6,
) -> dict[str, Any]:
    """Results as a real comparison has them, from made-up error surfaces; batch norm cannot run at batch size 1."""
    trials = [
        _trial(method, batch, lr, seed, epochs)
        for seed in seeds
        for batch in batch_sizes
        for lr in lrs
        for method in methods
    ]
    return {
        "title": "Normalisers on CIFAR-10, quarter-width NIN",
        "command": "normprop compare --data cifar10 --model nin --width 0.25 --train 4000 --test 2000 --epochs 6 "
        "--batch-sizes 1,4,8,32 --lrs 0.005,0.02,0.08 --seeds 0,1,2",
        "created": "2026-11-20T18:14:03+00:00",
        "settings": {
            "data": "cifar10",
            "data_checksum": "5f3a90c1",
            "model": "nin",
            "width": 0.25,
            "train": 4000,
            "validation": 400,
            "test": 2000,
            "epochs": epochs,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "schedule": "linear",
            "warmup": 0.1,
            "label_smoothing": 0.0,
            "clip_grad": None,
            "augment": [],
            "data_norm": "global",
            "precision": "32-true",
            "unit_norm": True,
        },
        "versions": {"normprop": "0.1.0", "torch": "2.13.0", "numpy": "2.4.1", "python": "3.11.9"},
        "machine": {"processor": "AMD EPYC 7B13", "cores": 2, "threads": 2, "device": "cpu"},
        "methods": list(methods),
        "batch_sizes": list(batch_sizes),
        "lrs": list(lrs),
        "seeds": list(seeds),
        "trials": trials,
        "step_time": [_step(method, batch) for batch in batch_sizes for method in methods],
        "table": [_cell(trials, method, batch, lrs) for method in methods for batch in batch_sizes],
    }


def _trial(method: str, batch: int, lr: float, seed: int, epochs: int) -> dict[str, Any]:
    noise = random.Random(f"{method} {batch} {lr} {seed}")
    floor, steep, limit = _CHARACTER.get(method, (0.5 + 0.1 * noise.random(), 0.03, 1.0))
    trial: dict[str, Any] = {"method": method, "batch_size": batch, "lr": lr, "seed": seed, "status": "complete"}
    trial |= dict.fromkeys(("reason", "test_error", "validation_error", "train_loss", "seconds", "steps"))
    trial |= {"curve": [], "layers": []}
    if method in ("batch", "instance") and batch == 1:
        reason = "Expected more than 1 value per channel when training, got input size torch.Size([1, 10, 1, 1])"
        return trial | {"status": "impossible", "reason": reason}
    if lr > limit * math.sqrt(batch / 8) * (1 + 0.2 * seed):
        step = noise.randint(20, 400)
        return trial | {"status": "diverged", "reason": f"loss was nan at step {step}", "seconds": 3.1, "steps": step}
    best = math.log2(0.02 * math.sqrt(batch / 16))
    penalty = {"batch": 0.06, "instance": 0.03}.get(method, -0.01) * (1.6 - math.log2(batch) / 4)
    final = min(floor + penalty + steep * (math.log2(lr) - best) ** 2 / 2 + noise.gauss(0, 0.006), 0.9)
    depth_drift = {"none": 0.35, "weight": 0.2, "normprop-paper": -0.13, "normprop": -0.02}.get(method, 0.01)
    for epoch in range(epochs + 1):
        left = math.exp(-1.0 * epoch)
        error = final + (0.9 - final) * left + noise.gauss(0, 0.008) * (0 < epoch < epochs)
        trial["curve"].append(
            {
                "epoch": epoch,
                "step": epoch * 4000 // batch,
                "lr": lr,
                "train_loss": None if epoch == 0 else 2.4 * final + 1.1 * left + noise.gauss(0, 0.02),
                "validation_error": error + noise.gauss(0, 0.008),
                "test_error": error,
                "seconds": 7.5 * epoch,
            }
        )
        for place, layer in enumerate(_LAYERS):
            std = math.exp(depth_drift * place * (0.35 + 0.12 * epoch)) * (1 + noise.gauss(0, 0.02))
            trial["layers"].append(
                {"epoch": epoch, "layer": layer, "mean": 0.06 * std * math.sin(place) * epoch**0.5, "std": std}
            )
    last = trial["curve"][-1]
    return trial | {
        "test_error": last["test_error"],
        "validation_error": last["validation_error"],
        "train_loss": last["train_loss"],
        "seconds": 45.2,
        "steps": epochs * 4000 // batch,
    }


def _cell(trials: list[dict[str, Any]], method: str, batch: int, lrs: Sequence[float]) -> dict[str, Any]:
    runs = [trial for trial in trials if (trial["method"], trial["batch_size"]) == (method, batch)]
    diverged = sorted({run["lr"] for run in runs if run["status"] == "diverged"})
    cell: dict[str, Any] = {"method": method, "batch_size": batch, "diverged_lrs": diverged, "edge": False}
    cell |= dict.fromkeys(("best_lr", "error_mean", "error_std", "impossible"))
    cell |= {"seeds": 0, "step_time": _step(method, batch)["ratio"]}
    if runs[0]["status"] == "impossible":
        return cell | {"impossible": runs[0]["reason"]}
    sound = [lr for lr in lrs if lr not in diverged]
    if not sound:
        return cell
    at = {lr: [run for run in runs if run["lr"] == lr] for lr in sound}
    best = min(sound, key=lambda lr: fmean(run["validation_error"] for run in at[lr]))
    errors = [run["test_error"] for run in at[best]]
    return cell | {
        "best_lr": best,
        "error_mean": fmean(errors),
        "error_std": stdev(errors) if len(errors) > 1 else None,
        "seeds": len(errors),
        "edge": best in (min(lrs), max(lrs)),
    }


def _step(method: str, batch: int) -> dict[str, Any]:
    noise = random.Random(f"step {method} {batch}")
    ratio = 1.0 if method == "none" else 0.97 + 0.25 * noise.random() + 0.2 / batch
    low, high = ratio - 0.03 * noise.random(), ratio + 0.04 * noise.random()
    return {
        "method": method,
        "batch_size": batch,
        "ratio": ratio,
        "low": low,
        "high": high,
        "milliseconds": ratio * (4 + batch),
    }
