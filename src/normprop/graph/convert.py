"""Make a planned conversion: build every new module first, put them in, prove what was promised."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from normprop import norms
from normprop.errors import ConversionError
from normprop.graph import build
from normprop.graph.absorb import channel_axis
from normprop.graph.calibrate import calibrate
from normprop.graph.capture import Inputs
from normprop.graph.exact import prove, require_finite
from normprop.graph.forward_pass import ForwardPass
from normprop.graph.node import Graph, leaves, replace
from normprop.graph.plan import Plan, analyze, refuse
from normprop.graph.program import Step, mixed, program
from normprop.graph.propagate import Propagation, evaluate
from normprop.graph.sites import EPS, Site
from normprop.moments.linear import Coverage
from normprop.nn import Predicted


def convert(model: nn.Module, x: Inputs, *, inplace: bool = False, **options: Any) -> nn.Module:
    """Replace every batch norm of a network by a normaliser that needs no batch.

    The network's own class and forward code stay; only modules are exchanged. A batch norm right after a convolution or
    linear layer that only it reads is absorbed by that layer, any other becomes a
    :class:`~normprop.nn.PredictedNorm`.

    Args:
        model: the network.
        x: example input: a tensor, a tuple of positional arguments, or a dict of keyword arguments; a batch of any
            size.
        inplace: change the network itself; otherwise a copy is converted.
        to: "normprop", or a method of :func:`normprop.norms.names`.
        weights: "fresh" to train from scratch (a network that has seen data is drawn anew), "exact" to keep a trained
            network's function in evaluation, proved on the example, "rescale" to keep its filters, gains and biases
            with predicted statistics in place of measured ones.
        moments: "live" to predict in every forward pass from the present weights, or "fixed" to predict once; what
            depends on the input alone stays fixed.
        center: subtract each absorbed filter's mean; by default in fresh networks.
        include, exclude: which normalisers by path: a glob pattern, several, or a function of path and module.
        on_unknown: at an operator without a rule: "error", "warn", or "measure" on the example input.
        given: moments of the input, mean 0 and variance 1 by default; a sequence for several inputs.
        calibrate: what to rehearse on once, to correct the predicted variances by a number for each layer: "noise" of
            the given moments, the example "input" itself, or ``None`` for predictions as they are.

    Returns:
        The converted network, an ordinary module.

    Raises:
        ConfigError: for options that cannot work.
        ConversionError: if there is nothing to convert, a normaliser cannot be converted, or an exact conversion does
            not keep the network's function.
        GraphError: if the network cannot be captured or holds an operator without a rule.

    Source:
        Arpit et al. 2016, for any architecture and any activation; propagation through sums, gates, pools and
        concatenations is ours.

    Example:
        >>> net = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), torch.zeros(2, 3, 8, 8))
        >>> net[0]
        PredictedConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), center=True, moments=fixed)
    """
    return analyze(model, x, **options).apply(inplace)


def apply(plan: Plan, inplace: bool = False) -> nn.Module:
    """Make a planned conversion.

    Args:
        plan: the plan.
        inplace: change the network itself, after all has gone well on a copy.

    Returns:
        The converted network.

    Raises:
        ConversionError: as :func:`convert`.
    """
    refuse(plan)
    try:
        net = copy.deepcopy(plan.model)
    except (RuntimeError, TypeError) as error:
        name = type(plan.model).__name__
        raise ConversionError(f"{name} cannot be copied ({error}), so it cannot be converted") from error
    if plan.options.weights == "exact":
        wide = copy.deepcopy(net).double()
        _rewrite(plan, wide)
        plan.report.difference = prove(plan, wide)
    _rewrite(plan, net)
    if not _rehearse(plan, net) and plan.options.weights != "exact":
        require_finite(plan, net)
    if not inplace:
        return net
    _rewrite(plan, plan.model)
    _rehearse(plan, plan.model)
    return plan.model


def _rehearse(plan: Plan, net: nn.Module) -> bool:
    """Correct the predictions, if that was asked for, and note by how much."""
    options = plan.options
    if options.to != "normprop" or options.weights == "exact" or options.calibrate is None:
        return False
    corrections = dict(calibrate(net, plan.x, options.calibrate, options.given))
    for entry in plan.report.sites:
        path = entry.into if entry.action == "absorbed" else entry.path
        entry.correction = corrections.get(path, corrections.get(f"{path}.0"))
    return True


def _rewrite(plan: Plan, net: nn.Module) -> None:
    """Exchange the modules of one network with the plan's structure."""
    known = plan.known
    if plan.options.weights == "fresh" and any(site.trained for site in plan.sites):
        plan.report.notes = _reset(net)
        known = plan.predict(net) if known is not None else None
    made: dict[str, nn.Module] = {}
    roots: dict[int, tuple[str, str]] = {}
    for site in plan.sites:
        made.update(_replacements(plan, net, site, known, roots))
    _exchange(net, made)
    if plan.options.to != "normprop":
        norms.finish(plan.options.to, net)
    elif plan.options.weights != "exact" and plan.options.moments == "live":
        assert known is not None
        _enliven(plan, net, known, roots)


def _replacements(
    plan: Plan, net: nn.Module, site: Site, known: Propagation | None, roots: dict[int, tuple[str, str]]
) -> dict[str, nn.Module]:
    """What stands at which path instead of a site."""
    options, norm = plan.options, net.get_submodule(site.path)
    taken = plan.absorbed.get(site.path)
    shape = plan.graph.nodes[site.places[0].input].shape or ()
    if options.to != "normprop" and taken is None:
        first: nn.Module = build.other_norm(options.to, norm, site, len(shape) - 2)
    elif options.weights == "exact" and taken is None:
        first = build.predicted_norm(norm, site, *site.statistics(), site.eps)
    elif taken is None:
        assert known is not None
        first = build.predicted_norm(norm, site, *_input(site, known), EPS)
    else:
        first = nn.Identity()
    whole = build.with_tail(first, plan.graph, site, norm)
    _take_hooks(whole, norm)
    if taken is None:
        path = site.path if whole is first else f"{site.path}.0"
        roots.update({place.output: (path, "weight") for place in site.places})
        return {site.path: whole}
    path, nodes = taken
    linear = net.get_submodule(path)
    roots.update({place.output: (path, "gain") for place in site.places})
    if options.to != "normprop":
        layer = build.other_block(options.to, linear, norm)
    elif options.weights == "exact":
        layer = build.exact_layer(linear, norm, site)
    else:
        assert known is not None
        moments = mixed([known.values[node.inputs[0]].channels(_axis(plan.graph, node)) for node in nodes])
        layer = build.predicted_layer(linear, norm, *moments, _seen(plan.graph, nodes[0], known), options.centered)
    return {site.path: whole, path: layer}


def _take_hooks(new: nn.Module, old: nn.Module) -> None:
    """Let a module call the hooks of another."""
    for name in _HOOKS:
        getattr(new, name).update(getattr(old, name))
    new._is_full_backward_hook = old._is_full_backward_hook


_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
          "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks")  # fmt: skip


def _input(site: Site, known: Propagation) -> tuple[Tensor, Tensor]:
    return mixed([known.values[place.input].channels(1) for place in site.places])


def _axis(graph: Graph, node: Any) -> int:
    """Axis of the channels in a linear map's input."""
    shape = graph.nodes[node.inputs[0]].shape
    assert shape is not None
    return len(shape) - 1 if channel_axis(node) == len(node.shape) - 1 else 1


def _seen(graph: Graph, node: Any, known: Propagation) -> Coverage | None:
    """How often a convolution's taps see its input, as its rule works it out."""
    memory: dict[str, Any] = {}
    with torch.no_grad():
        evaluate(node, graph.state, graph.model.get_submodule, known.values, memory)
    return memory.get("seen")


def _exchange(net: nn.Module, made: dict[str, nn.Module]) -> None:
    """Put new modules in wherever the old ones stand, under all their names and in plain lists and dicts."""
    replaced = {id(net.get_submodule(path)): module for path, module in made.items()}
    for owner in net.modules():
        for name, value in [*vars(owner).items()]:
            if name != "_modules" and any(id(leaf) in replaced for leaf in leaves(value)):
                vars(owner)[name] = replace(value, lambda leaf: replaced.get(id(leaf), leaf))
    for path, module in [*net.named_modules(remove_duplicate=False)]:
        new = replaced.get(id(module))
        if new is not None and path:
            parent, _, name = path.rpartition(".")
            owner = net.get_submodule(parent)
            if getattr(owner, name, None) is module:
                setattr(owner, name, new)


def _enliven(plan: Plan, net: nn.Module, known: Propagation, roots: dict[int, tuple[str, str]]) -> None:
    """Give every new layer the part of the propagation that leads to it."""
    modules = dict(net.named_modules(remove_duplicate=False))
    steps: dict[int, Step] = {}
    forward_pass = ForwardPass()
    with forward_pass.alone():
        for site in plan.sites:
            taken = plan.absorbed.get(site.path)
            if taken is None:
                reads = [(place.input, 1) for place in site.places]
                path = roots[site.places[0].output][0]
            else:
                path, nodes = taken
                reads = [(node.inputs[0], _axis(plan.graph, node)) for node in nodes]
            layer = modules[path]
            assert isinstance(layer, Predicted)
            made = program(plan.graph, known, reads, roots, modules, steps, forward_pass)
            if made.steps:
                layer.source = made.rehearse()
    if steps:
        forward_pass.watch(net)


def _reset(net: nn.Module) -> list[str]:
    """Draw a trained network anew; say which parameters no module can draw."""
    drawn: set[int] = set()
    for module in net.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
            drawn.update(id(value) for value in module.parameters(recurse=False))
    kept = [name for name, value in net.named_parameters() if id(value) not in drawn]
    notes = ["the network had seen data: every layer was drawn anew by its reset_parameters"]
    return notes + (
        [f"these parameters keep their values, as no reset_parameters draws them: {', '.join(kept)}"] if kept else []
    )
