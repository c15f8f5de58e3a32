"""Predicted and measured statistics of every call in a network."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from normprop.errors import ConfigError, GraphError, first_line
from normprop.graph.call_site import CallSite
from normprop.graph.capture import Inputs, arguments, capture
from normprop.graph.measure import Run, run
from normprop.graph.node import Graph
from normprop.graph.propagate import OnUnknown, propagate
from normprop.graph.random_state import preserved
from normprop.graph.site_table import table
from normprop.graph.watch import Watch

Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Inspection:
    """Predicted and measured statistics of every call in a network; prints as a table.

    Args:
        model: class of the network.
        mode: "training", "evaluation" or "mixed", by the modes of its modules.
        how: how the network was captured, "export" or "recorded".
        inputs: shapes of the example input's tensors.
        threshold: factor beyond which a prediction is flagged.
        sites: the calls, in the order in which they ran.
        notes: what to know beside: calls without a rule, why there are no gradients.
    """

    model: str
    mode: str
    how: str
    inputs: tuple[tuple[int, ...], ...]
    threshold: float
    sites: tuple[CallSite, ...]
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> CallSite | None:
        """The call whose standard deviation is predicted worst; ``None`` if no call can be judged."""
        judged = [site for site in self.sites if site.ratio is not None]
        return max(judged, key=lambda site: site.error, default=None)

    @property
    def flagged(self) -> tuple[CallSite, ...]:
        """The calls whose prediction is off by more than the threshold, or whose values are not finite."""
        return tuple(site for site in self.sites if site.flagged)

    def __str__(self) -> str:
        return table(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON; numbers that are not finite are written as "nan", "inf" and "-inf".

        Example:
            >>> inspect(nn.Sequential(nn.Linear(2, 3)), torch.eye(2)).to_dict()["sites"][0]["op"]
            'linear'
        """
        worst = self.worst
        document = {**asdict(self), "flagged": len(self.flagged), "worst": None if worst is None else worst.index}
        return {name: _plain(value) for name, value in document.items()}

    def to_html(self, path: str | Path | None = None) -> str:
        """One HTML page that opens from disk and loads nothing: statistics against depth, and the table.

        Args:
            path: where to write it; ``None`` to write nothing.

        Returns:
            The page.

        Raises:
            MissingExtraError: without the extra ``report``.
        """
        from normprop.report.inspection import page

        text = page(self.to_dict())
        if path is not None:
            from normprop.files import write_content

            write_content(Path(path), text)
        return text


def inspect(
    model: nn.Module,
    x: Inputs,
    *,
    on_unknown: OnUnknown = "error",
    loss: Loss | None = None,
    threshold: float = 1.5,
) -> Inspection:
    """Predict and measure the statistics of every call in a network, on one example input, in its present mode.

    The prediction knows the parameters, and of the input only mean and variance of each channel (axis 1), which are
    measured on x. The measurement calls the captured operators with x. Parameters, their gradients, buffers, modes,
    hooks and the random state are afterwards what they were.

    Args:
        model: any module.
        x: a tensor, a tuple of the model's positional arguments or a dict of its keyword arguments.
        on_unknown: what to do at an operator without a rule: ``"error"``, ``"warn"`` and pass the first input's moments
            on, or ``"measure"`` them on x.
        loss: from the model's output to the scalar whose gradients are measured. By default each floating point tensor
            of the output times fixed random signs, summed and divided by the square root of its number of elements: a
            gradient of norm 1 and no direction of its own.
        threshold: factor beyond which a predicted standard deviation is flagged, above 1.

    Returns:
        The statistics. Listed are the calls that return a floating point tensor which depends on the input and which
        something reads or the model returns.

    Raises:
        ConfigError: for arguments that cannot work.
        GraphError: if the model cannot be captured or run.
        UnknownOperatorError: for an operator without a rule, unless on_unknown says otherwise.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(100, 100, bias=False), nn.ReLU())
        >>> _ = nn.init.normal_(net[0].weight, 0.0, 0.2, generator=generator)
        >>> report = inspect(net, torch.randn(100, 100, generator=generator))
        >>> for site in report.sites:
        ...     print(f"{site.name}: {site.predicted.std:.1f} {site.measured.std:.1f}")
        0: linear: 2.0 2.0
        1: relu: 1.2 1.2
    """
    if not threshold > 1.0:
        raise ConfigError(f"inspect: threshold must be above 1, got {threshold}")
    with preserved(model), torch.inference_mode(False), torch.enable_grad():
        watch = Watch(capture(model, x))
        done = run(watch.graph, x, watch.leave, watch.enter)
        problem = _backward(watch, done, x, loss)
    inputs = [node for node in watch.graph.nodes if node.op == "input"]
    given = {position: watch.moments.get(node.index) for position, node in enumerate(inputs)}
    known = propagate(watch.listed, given, on_unknown=on_unknown, measure=watch.measured)
    notes = [f"{watch.listed.nodes[index]}: no rule, {what}" for index, what in known.unknown.items()]
    modes = {module.training for module in model.modules()}
    return Inspection(
        model=type(model).__name__,
        mode="mixed" if len(modes) > 1 else "training" if modes == {True} else "evaluation",
        how=watch.graph.how,
        inputs=tuple(node.shape for node in inputs if node.shape is not None),
        threshold=threshold,
        sites=tuple(watch.site(node, known.signal(node.index), threshold) for node in watch.sites()),
        notes=tuple(notes + problem),
    )


def _backward(watch: Watch, done: Run, x: Inputs, loss: Loss | None) -> list[str]:
    """Send gradients back to the inputs; what there is to note."""
    outputs = [leaf for leaf in done.outputs if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not outputs and loss is None:
        return ["no gradients: no floating point output depends on the input"]
    value = _signs(outputs) if loss is None else _asked(watch.graph, done, x, loss)
    try:
        torch.autograd.grad(value, done.starts, allow_unused=True)
    except RuntimeError as error:  # a forward that works in place where a derivative needs the old values
        watch.gradients.clear()
        return [f"no gradients: {first_line(error)}"]
    return []


def _signs(outputs: list[Tensor]) -> Tensor:
    """The default loss."""
    generator = torch.Generator().manual_seed(0)
    total: Tensor = sum(
        (
            (output * (2 * torch.randint(0, 2, output.shape, generator=generator) - 1).to(output)).sum().double()
            / max(output.numel(), 1) ** 0.5
            for output in outputs
        ),
        start=torch.zeros((), dtype=torch.float64),
    )
    return total


def _asked(graph: Graph, done: Run, x: Inputs, loss: Loss) -> Tensor:
    """The user's loss, of the output in the form in which the model returns it."""
    args, kwargs = arguments(x)
    buffers = {name: buffer.detach().clone() for name, buffer in graph.model.named_buffers()}
    with torch.no_grad():
        flat, form = pytree.tree_flatten(functional_call(graph.model, buffers, args, kwargs))
    places = [position for position, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
    if len(places) != len(done.outputs):
        raise GraphError(
            f"inspect: the model returns {len(places)} tensors, of which {len(done.outputs)} come from captured calls; "
            f"leave out loss="
        )
    for position, value in zip(places, done.outputs, strict=True):
        flat[position] = value
    value = loss(pytree.tree_unflatten(flat, form))
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise ConfigError(
            "inspect: loss must return one number as a tensor that depends on the model's output, got "
            + (f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__)
        )
    return value


def _plain(value: Any) -> Any:
    """Values for JSON."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
