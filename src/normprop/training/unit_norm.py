"""The unit-norm constraint: after each update every filter of a NormProp layer goes back to length 1.

Where a layer asks for it, no update of SGD turns a filter far, and every few updates draw filters towards right angles.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from normprop import moments as M
from normprop.nn import NormPropLayer
from normprop.nn.initial import activations_in_sequence
from normprop.nn.known import constants_together
from normprop.nn.known_moments import moments_together
from normprop.prepared import Filters, as_rows, normalize_rows_, unit_filters
from normprop.training.turn import bound_turns_

EVERY = 8
"""A step towards orthogonal filters follows this many updates at the latest,"""

FAR = 0.16
"""or when the learning rates since the last one sum to this: filters turn further in an update at a higher rate."""

DEEP = 16
"""Under other optimisers than SGD only networks of more activations than this, one after the other, take such steps."""

EACH = 128
"""Layers wait that many times longer as they have this many filters, each of which is multiplied by all others."""

MAX_CHANGE = 0.2
"""Largest change of a filter's angle (its tangent), of a gain or of a bias in one update of SGD, by gradients that stay
as they are."""


class Constraint(NamedTuple):
    """The constraint on an optimiser's steps, until it is removed."""

    handles: tuple[Any, ...]

    def remove(self) -> None:
        """End the constraint."""
        for handle in self.handles:
            handle.remove()


def constrain(optimizer: Optimizer, model: nn.Module) -> Constraint:
    r"""Keep the filters of NormProp layers at unit length: :math:`W_i \leftarrow W_i / \|W_i\|` after each step.

    A layer's function does not depend on the length of its filters, so this changes no output; it keeps the size of
    the angular step from shrinking as filters grow. Layers with ``center=True`` are centred as well. The constraint is
    applied once here and then after every ``optimizer.step()``, to the layers of ``model`` whose weight this optimiser
    updates; a step that a ``GradScaler`` skips and a weight without gradient are left alone. A model without NormProp
    layers is left as it is.

    Two things are done for layers with ``orthogonal=True`` alone. Before a step of SGD, gradients of filters are
    shortened (:func:`normprop.training.turn.bound_turns_`) so that, at the present rate and momentum, none turns its
    filter by more than :data:`MAX_CHANGE`, and those of gains and biases are cut off likewise; at small rates hardly
    any is that long. Every few updates, the more often the higher the rate, filters that an activation follows take one
    step of :func:`normprop.orthogonal.orthogonalize_`, which does change outputs; under optimisers that choose the
    length of their steps by themselves, as :class:`normprop.training.Muon`, in networks of more than :data:`DEEP`
    activations one after the other alone: there it is needed, elsewhere it costs (docs/results/learning.md). How far it
    is to the next one stands in the optimiser's first parameter group, ``"turned"``, so that its saved state goes on
    where it was.

    Forward passes in training mode then rely on the length 1 until a weight changes. Writing to a weight through
    ``.data`` between a step and the next forward pass goes unnoticed: write to it under ``torch.no_grad()`` instead.

    Args:
        optimizer: any torch optimiser, with any parameter groups; Lightning Fabric's wrapper works as well.
        model: the network.

    Returns:
        A handle; ``handle.remove()`` ends the constraint.

    Source:
        Arpit et al. 2016, section 3.3; orthogonality: ours.

    Example:
        >>> import torch
        >>> from normprop.nn import Linear
        >>> model = Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> handle = constrain(optimizer, model)
        >>> model(torch.randn(2, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> bool(torch.allclose(model.weight.norm(dim=1), torch.ones(3)))
        True
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    layers = [layer for layer in model.modules() if isinstance(layer, NormPropLayer) and id(layer.weight) in held]
    for group in _grouped(layers):
        group.normalize()
    groups: dict[tuple[NormPropLayer, ...], list[_Group]] = {}
    bounding = isinstance(optimizer, SGD)  # others choose the length of their steps by themselves
    apart = bounding or activations_in_sequence(model) > DEEP

    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Fused optimisers skip inside their kernel: a GradScaler calls step() all the same and sets found_inf.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        moved = tuple(layer for layer in layers if layer.weight.grad is not None)
        first = optimizer.param_groups[0]
        before = first.get("turned", 0.0)
        first["turned"] = before + min(1.0, max(1 / EVERY, float(first["lr"]) / FAR))
        if apart and (turn := int(first["turned"])) > int(before):
            _draw_apart(moved, turn)
        if moved not in groups:  # the same layers at almost every step
            groups.clear()
            groups[moved] = _grouped(moved)
        for group in groups[moved]:
            group.normalize()

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # of gradients that a fused optimiser is still to unscale
        for settings, (turning, others) in zip(optimizer.param_groups, bounded, strict=False):
            if (turning or others) and (rate := float(settings["lr"])) > 0:
                limit = MAX_CHANGE * (1 - settings["momentum"]) / rate * (1.0 if scale is None else float(scale))
                bound_turns_(turning, limit)
                if with_gradient := [parameter for parameter in others if parameter.grad is not None]:
                    nn.utils.clip_grad_value_(with_gradient, limit)

    handles = [optimizer.register_step_post_hook(after_step)]
    if bounding:
        asking = [layer for layer in layers if layer.orthogonal]
        by_weight = {id(layer.weight): layer for layer in asking}
        by_itself = {id(parameter) for layer in asking for parameter in (layer.gain, layer.bias)}
        bounded = [
            (
                [by_weight[id(parameter)] for parameter in settings["params"] if id(parameter) in by_weight],
                [parameter for parameter in settings["params"] if id(parameter) in by_itself],
            )
            for settings in optimizer.param_groups
        ]
        handles.append(optimizer.register_step_pre_hook(before_step))
    return Constraint(tuple(handles))


def _draw_apart(layers: Iterable[NormPropLayer], turn: int) -> None:
    """Take the steps towards orthogonal filters of a turn, in layers with an activation; one for a shared weight.

    Filters without one end a branch, make queries and keys or tell classes apart: they may be alike.
    """
    asked = (layer for layer in layers if layer.orthogonal and M.resolve(layer.activation).name != "identity")
    for layer in {id(layer.weight): layer for layer in asked}.values():
        if turn % math.ceil(len(layer.gain) / EACH) == 0:
            layer.orthogonalize_weight_()


@torch.no_grad()
def recognize(model: nn.Module) -> None:
    """Take the weights of a loaded state as they are: of unit length, as the constraint left them when it was saved.

    Without this they would be measured, and found to be a rounding error away from it, until the next step.

    Args:
        model: the network.

    Example:
        >>> from normprop.nn import Linear
        >>> model = Linear(2, 2, center=False)
        >>> _ = model.load_state_dict({"weight": torch.eye(2), "gain": torch.ones(2), "bias": torch.zeros(2)})
        >>> recognize(model)
        >>> model(torch.tensor([[1.0, 2.0]])).tolist()
        [[1.0, 2.0]]
    """
    for group in _grouped(module for module in model.modules() if isinstance(module, NormPropLayer)):
        if group.layers[0].fusable:
            group.note([unit_filters(as_rows(layer.weight)) for layer in group.layers])


class _Group(NamedTuple):
    """Layers whose parameters are of one kind, normalised together."""

    layers: list[NormPropLayer]  # one for each weight
    centers: list[bool]
    known: list[list[tuple[int, NormPropLayer]]]  # those of one rule and kind of moments, and where their weight is

    @torch.no_grad()
    def normalize(self) -> None:
        """Normalise the weights."""
        if not self.layers[0].fusable:
            for layer in self.layers:
                layer.normalize_weight_()
            return
        self.note(normalize_rows_([as_rows(layer.weight) for layer in self.layers], self.centers))

    def note(self, filters: list[Filters]) -> None:
        """Work out what the next forward passes need."""
        for alike in self.known:
            parameters = [(layer.gain, layer.bias) for _, layer in alike]
            together = constants_together(parameters, alike[0][1].own_constants)
            rule = M.resolve(alike[0][1].activation)
            complete = rule.name in ("relu", "identity")
            moments = [None] * len(alike) if complete else moments_together(parameters, rule)
            for (position, layer), constants, others in zip(alike, together, moments, strict=True):
                layer.know(filters[position], constants, others)


def _grouped(layers: Iterable[NormPropLayer]) -> list[_Group]:
    """Sort layers by what can be done together; a weight that several layers share is rescaled once."""
    kinds: dict[Any, list[NormPropLayer]] = defaultdict(list)
    for layer in layers:
        kinds[layer.fusable, layer.weight.device, layer.weight.dtype].append(layer)
    groups = []
    for alike in kinds.values():
        owners = list({id(layer.weight): layer for layer in reversed(alike)}.values())
        positions = {id(layer.weight): position for position, layer in enumerate(owners)}
        known: dict[Any, list[tuple[int, NormPropLayer]]] = defaultdict(list)
        for layer in alike:
            rule, position = M.resolve(layer.activation), positions[id(layer.weight)]
            centered = owners[position].center or not layer.center  # what it takes its shared weight to be
            if layer.knowable and centered:
                known[rule, layer.moments].append((position, layer))
        groups.append(_Group(owners, [layer.center for layer in owners], list(known.values())))
    return groups
