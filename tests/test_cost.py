"""What a step costs in operators and in memory, counted, not timed: a rise fails here before it shows on a clock.

The limits are the numbers of today. Lower one when a layer gets cheaper; raise one only for a reason worth its price.
"""

from dataclasses import astuple, dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from normprop import models, norms
from normprop.experiments.bench_memory import saved_bytes
from normprop.training.unit_norm import constrain

# Views and bookkeeping: they launch nothing and move no memory.
FREE = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "expand",
    "detach",
    "alias",
    "unsqueeze",
    "squeeze",
    "slice",
}
FREE |= {"slice", "select", "as_strided", "_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty"}


@dataclass(frozen=True)
class Cost:
    """Operators launched forward and backward, and bytes held between the two."""

    forward: int
    backward: int
    saved: int


# The plain layer stands beside the others: it is what they are measured by, and exact.
LIMITS = {
    ("Linear", "none"): Cost(1, 3, 1_024),
    ("Linear", "normprop-paper"): Cost(2, 5, 1_024),
    ("Linear", "normprop"): Cost(2, 7, 1_024),
    ("Linear, relu", "none"): Cost(2, 4, 1_024),
    ("Linear, relu", "normprop-paper"): Cost(3, 8, 1_024),
    ("Linear, relu", "normprop"): Cost(4, 15, 1_152),
    ("Conv2d", "none"): Cost(1, 1, 65_536),
    ("Conv2d", "normprop-paper"): Cost(2, 3, 65_536),
    ("Conv2d", "normprop"): Cost(2, 5, 65_536),
    ("Conv2d, relu", "none"): Cost(2, 2, 65_536),
    ("Conv2d, relu", "normprop-paper"): Cost(3, 6, 65_536),
    ("Conv2d, relu", "normprop"): Cost(4, 13, 65_664),
    ("nin", "none"): Cost(20, 20, 1_310_800),
    ("nin", "normprop-paper"): Cost(30, 54, 1_310_800),
    ("nin", "normprop"): Cost(38, 112, 1_312_208),
}


class Count(TorchDispatchMode):
    """Counts the operators that reach a backend."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name.removeprefix("aten::") not in FREE
        return func(*args, **(kwargs or {}))


def build(what, method):
    """A block, a linear map without activation, or a network, and an input for it."""
    torch.manual_seed(0)
    if what == "nin":
        return models.nin(3, 10, norm=method, width=0.25), torch.randn(2, 3, 32, 32)
    kind, _, activation = what.partition(", ")
    dims = {"Linear": 0, "Conv2d": 2}[kind]
    kernel = (3,) if dims else ()
    block = norms.block(method, dims)(16, 32, *kernel, activation=activation or None)
    return block, torch.randn(8, 16, *[10] * dims)


def cost(what, method):
    module, images = build(what, method)
    constrain(torch.optim.SGD(module.parameters(), lr=0.1), module)  # as in training
    images.requires_grad_(what != "nin")
    with Count() as forward:
        output = module(images)
    seed = torch.ones_like(output)
    with Count() as backward:
        output.backward(seed)
    held = [*module.parameters(), *module.buffers(), images]
    # The square keeps the module's output, as the layer that follows would.
    return Cost(forward.count, backward.count, saved_bytes(lambda: module(images).square(), held))


@pytest.mark.parametrize(("what", "method"), LIMITS)
def test_no_layer_costs_more_than_it_did(what, method):
    measured, limit, plain = cost(what, method), LIMITS[what, method], LIMITS[what, "none"]
    assert all(own <= most for own, most in zip(astuple(measured), astuple(limit), strict=True)), (
        f"{what}, {method}: measured {measured}, limit {limit}, without normalisation {plain}"
    )


@pytest.mark.parametrize("what", dict.fromkeys(what for what, _ in LIMITS))
def test_the_plain_layers_cost_what_the_table_says(what):
    assert cost(what, "none") == LIMITS[what, "none"]


def test_operators_are_counted_one_by_one_and_views_not_at_all():
    x = torch.ones(4)
    with Count() as counted:
        (x + 1).view(2, 2).t().mul_(2).sum()
    assert counted.count == 3


def test_storages_are_counted_once_and_whole():
    weight = torch.ones(3, 5, requires_grad=True)

    def loss():
        large = weight * 2  # keeps nothing but a number
        kept = large.exp()  # keeps its output, 60 bytes
        part = kept[0] * kept[1]  # keeps two views of the same
        return (part * weight[2]).sum()  # keeps 20 bytes more, and a view of the parameter

    assert saved_bytes(loss, [weight]) == 80
    assert saved_bytes(loss, []) == 140
    with torch.no_grad():
        assert saved_bytes(loss, []) == 0
