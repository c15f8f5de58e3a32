"""Convert every published model with batch norm that the installed libraries offer, and write what came of it.

    python -m tests.graph.coverage > docs/coverage.md

Options: ``--workers N`` processes (2), ``--at-most N`` million parameters (400), ``--only TEXT`` in the name,
``--rows FILE`` keeps what is known, a JSON line per model, so that a run can go on where it was interrupted.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

import normprop
from normprop.graph.plan import Plan
from tests.graph.families import Case, look_trained
from tests.graph.real_models import RealModel, build, survey


@dataclass
class Row:
    """What came of one model; a field is an error's text where it failed."""

    library: str
    name: str
    parameters: int
    input: str = ""
    sites: str = ""
    deviation: str = ""
    step: str = ""
    exact: str = ""
    seconds: str = ""

    @property
    def failed(self) -> bool:
        return any(text.startswith("✗") for text in (self.sites, self.deviation, self.step, self.exact))


def examine(library: str, name: str, parameters: int) -> Row:
    """Convert one model, train a step at batch size 1, compare deviations, convert it exactly."""
    torch.set_num_threads(1)
    row = Row(library, name, parameters)
    case = build(library, name)
    try:
        net = _fresh(row, case)
        if row.deviation.startswith("✗"):  # tiny maps leave a deep network few positions to average over
            larger = tuple(torch.randn(*x.shape[:2], *(2 * side for side in x.shape[2:])) for x in case.args)
            with contextlib.suppress(normprop.NormPropError):  # a model of one size
                net = _fresh(row, Case(build(library, name).model, larger))
    except normprop.NormPropError as error:
        row.sites = f"✗ {error}"
        return row
    row.step = _step(net, case)
    del net
    try:
        look_trained(case.model, torch.Generator().manual_seed(0))
        plan = normprop.analyze(case.model, case.args, weights="exact")
        plan.apply()
        row.exact = f"{plan.report.difference:.0e}"
    except normprop.NormPropError as error:
        row.exact = f"✗ {error}"
    return row


def _attempt(job: tuple[str, str, int]) -> Row:
    """Examine a model; one that breaks in another way than by an error of ours is a result too."""
    try:
        return examine(*job)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return Row(*job, sites=f"✗ {type(error).__name__}: {first}")


def _fresh(row: Row, case: Case) -> torch.nn.Module:
    """Convert a model to train it from scratch, and write what came of it into the row."""
    start = time.perf_counter()
    plan = normprop.analyze(case.model, case.args)
    net = plan.apply()
    row.seconds = f"{time.perf_counter() - start:.1f}"
    row.input = "×".join(str(side) for side in case.args[0].shape[2:])
    counts = plan.report.counts
    row.sites = " + ".join(str(counts.get(action, 0)) for action in ("absorbed", "predicted"))
    row.sites += "".join(f", {count} {action}" for action, count in counts.items() if action in ("kept", "cannot"))
    worst = _deviation(plan, net, case, 64)
    if worst >= 1.5:  # samples may differ so much that 64 say little
        worst = _deviation(plan, net, case, 512)
    row.deviation = f"{worst:.2f}" if worst < 1.5 else f"✗ {worst:.2f}"
    return net


def _deviation(plan: Plan, net: torch.nn.Module, case: Case, number: int) -> float:
    """Largest ratio, over normalisers, of measured and predicted deviation on so many samples of noise."""
    totals: dict[str, Tensor] = {}
    called: set[str] = set()

    def count(module: torch.nn.Module, args: object, output: Tensor, path: str) -> None:
        if path not in called:
            called.add(path)
            rows = output.detach().double().transpose(0, 1).flatten(1)
            sums = torch.stack([torch.full_like(rows[:, 0], rows.shape[1]), rows.sum(1), rows.square().sum(1)])
            totals[path] = totals.get(path, 0) + sums

    for site in plan.sites:
        net.get_submodule(site.path).register_forward_hook(partial(count, path=site.path))
    generator = torch.Generator().manual_seed(1)
    samples = len(case.args[0])
    repeats = max(1, min(2**19 // case.args[0].numel(), number // samples))
    for _ in range(math.ceil(number / samples / repeats)):
        noise = [torch.randn((repeats * samples, *x.shape[1:]), generator=generator) for x in case.args]
        called.clear()
        with torch.no_grad():
            net.train()(*noise)
    worst = 1.0
    for site in plan.sites:
        if len(site.places) > 1 or site.places[0].tail:
            continue
        power = 1.0 if site.weight is None else float(site.weight.detach().double().square().mean())
        if power > 0.0:
            number, first, second = totals[site.path]
            ratio = (float((second / number - (first / number).square()).mean()) / power) ** 0.5
            worst = max(worst, ratio, 1 / ratio if ratio > 0 else float("inf"))
    for site in plan.sites:
        net.get_submodule(site.path)._forward_hooks.clear()
    return worst


def _step(net: torch.nn.Module, case: Case) -> str:
    """Loss and gradients of one sample."""
    output = net.train()(*(x[:1] for x in case.args))
    parts = [part for part in torch.utils._pytree.tree_leaves(output) if isinstance(part, Tensor)]
    loss = sum(part.square().mean() for part in parts if part.is_floating_point())
    loss.backward()
    finite = all(bool(torch.isfinite(p.grad).all()) for p in net.parameters() if p.grad is not None)
    return "✓" if finite and bool(torch.isfinite(loss)) else "✗ not finite"


def page(rows: list[Row], left_out: dict[str, str], too_large: list[RealModel]) -> str:
    """The Markdown page."""
    libraries = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in dict.fromkeys(r.library for r in rows)
    )
    good = sum(not row.failed for row in rows)
    lines = [
        "# Which published models convert",
        "",
        f"{good} of {len(rows)} models with batch norm of {libraries} pass all of this, on torch {torch.__version__}: "
        "`normprop.convert(model, x)` leaves no batch norm that is called; a training step at batch size 1 has finite "
        "loss and gradients; on fresh Gaussian noise every normalised output has the predicted deviation within "
        'a factor 1.5 (root mean square over channels); and with plausible running statistics `weights="exact"` keeps '
        "the function in evaluation, compared in float64.",
        "",
        "Written by `python -m tests.graph.coverage > docs/coverage.md`; nothing is chosen by hand: the models are "
        "those that the libraries list, with weights as drawn by their constructors.",
        "",
        "- *Input*: its sides; the smallest that the model accepts, or twice that where the deviation was off, as on "
        "maps of 2 x 2 a very deep network has few positions to average over.",
        "- *Sites*: batch norms absorbed by the layer before + replaced by a predicted norm.",
        "- *Deviation*: the worst ratio of measured to predicted deviation over all sites, on 64 samples, or on "
        "512 where samples differ much (stochastic depth).",
        "- *Exact*: largest difference in evaluation, relative to the largest output.",
        "- *Seconds*: a fresh conversion, one thread, beside another process.",
        "",
        "| library | model | parameters | input | sites | deviation | batch 1 | exact | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        size = f"{row.parameters / 1e6:.1f} M"
        outcome = [row.sites, row.deviation, row.step, row.exact, row.seconds]
        cells = [row.library, f"`{row.name}`", size, row.input, *outcome]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if too_large:
        names = ", ".join(f"`{model.name}` ({model.parameters / 1e6:.0f} M)" for model in too_large)
        lines += ["", f"Not run here, for time and memory: {names}."]
    if left_out:
        lines += ["", "Could not be built here:", ""]
        lines += [f"- `{name}`: {reason}" for name, reason in left_out.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all models and print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--at-most", type=float, default=400.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    found = survey()
    chosen = [model for model in found.models if options.only in model.name]
    chosen.sort(key=lambda model: model.parameters)
    small = [model for model in chosen if model.parameters <= options.at_most * 1e6]
    known = options.rows.read_text().splitlines() if options.rows and options.rows.exists() else []
    rows = {(row.library, row.name): row for row in (Row(**json.loads(line)) for line in known)}
    waiting = [model for model in small if (model.library, model.name) not in rows]
    with get_context("spawn").Pool(options.workers, maxtasksperchild=6) as pool:
        jobs = [(model.library, model.name, model.parameters) for model in waiting]
        for row in pool.imap_unordered(_attempt, jobs):
            rows[row.library, row.name] = row
            print(f"{len(rows)}/{len(small)} {row}", file=sys.stderr, flush=True)
            if options.rows:
                with options.rows.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
    ordered = sorted((rows[model.library, model.name] for model in small), key=lambda row: (row.library, row.name))
    print(page(ordered, found.left_out, [model for model in chosen if model not in small]), end="")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
