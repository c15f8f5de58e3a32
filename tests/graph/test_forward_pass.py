"""Within one forward pass a converted network's layers share what they predict alike, and nothing outlives it."""

import copy
import pickle
import threading
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normprop
from normprop.graph import program

X = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Branch and sum, as in pre-activation residual networks: every prediction begins at the stem."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.way = way

    def branch(self, x: Tensor) -> Tensor:
        return x + self.conv(torch.relu(self.norm(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.way.startswith("checkpoint"):
            return checkpoint(self.branch, x, use_reentrant=self.way == "checkpoint, reentrant")
        with torch.set_grad_enabled(self.way != "frozen" and torch.is_grad_enabled()):
            return self.branch(x)


def network(*ways: str) -> nn.Module:
    """A converted network of one block each way, converted while all are plain, and trained a little."""
    torch.manual_seed(0)
    blocks = [Block() for _ in ways]
    net = normprop.convert(nn.Sequential(nn.Conv2d(4, 4, 3), *blocks, nn.BatchNorm2d(4)), X)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    for block, way in zip(list(net)[1:], ways, strict=False):
        block.way = way
    return net


def unshared(net: nn.Module) -> nn.Module:
    """A copy in which every layer works out all that it needs."""
    net = copy.deepcopy(net)
    net._forward_pre_hooks.clear()
    net._forward_hooks.clear()
    return net


def gradients(net: nn.Module, x: Tensor = X) -> dict[str, Tensor]:
    net.zero_grad()
    net(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.fixture
def evaluated(monkeypatch):
    """How often each node has been evaluated."""
    count = Counter()
    original = program.evaluate

    def counted(node, *rest):
        count[node.index] += 1
        return original(node, *rest)

    monkeypatch.setattr(program, "evaluate", counted)
    return count


def test_every_node_is_evaluated_once_in_a_pass(evaluated):
    net = network(*["plain"] * 4)
    evaluated.clear()
    unshared(net)(X)
    assert max(evaluated.values()) == 5  # the stem, for every block and the norm at the end
    nodes = evaluated.keys()
    for other in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        for _ in range(2):
            evaluated.clear()
            other(X)
            assert evaluated == dict.fromkeys(nodes, 1)


def test_conversion_evaluates_every_node_once(evaluated):
    network(*["plain"] * 4)
    counts = Counter(evaluated)
    evaluated.clear()
    network(*["plain"] * 4)
    assert evaluated == counts
    # once when the layers are made, and once in each forward pass of the rehearsal
    assert max(counts.values()) <= 3


ways = pytest.mark.parametrize(
    "second", ["plain", "frozen", "checkpoint", "checkpoint, reentrant"], ids=lambda way: way.replace(", ", "-")
)


@ways
def test_outputs_and_gradients_are_those_of_layers_by_themselves(second):
    net = network("plain", second, "plain", second, "plain")
    assert torch.equal(net(X), unshared(net)(X))
    x = X.clone().requires_grad_()
    found, expected = gradients(net, x), gradients(unshared(net), x)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@ways
def test_checkpoints_and_frozen_parts_change_no_gradient_of_the_rest(second):
    net, plain = network("plain", second, "plain"), network("plain", "plain", "plain")
    x = X.clone().requires_grad_()
    found, expected = gradients(net, x), gradients(plain, x)
    later = [name for name in found if name.startswith(("3.", "4."))]
    assert later
    for name in found if second != "frozen" else later:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_passes_follow_the_parameters_and_have_graphs_of_their_own():
    net = network("plain", "plain")
    before = net(X)
    first, second = net(X).sum(), net(X).sum()  # as of two views of one image
    first.backward()
    second.backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.2)
    assert not torch.allclose(net(X), before)
    assert torch.equal(net(X), unshared(net)(X))


def test_nothing_outlives_a_pass_that_fails():
    net = network("plain", "plain")

    def fail(*_: object) -> None:
        raise RuntimeError("on the way")

    handle = net[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on the way"):
        net(X)
    handle.remove()
    for _ in range(2):  # a graph that is kept would be gone the second time
        sum(part.sum() for part in net[2].norm.predicted()).backward()


def test_autocast_costs_predictions_no_digits():
    layer = network("plain", "plain")[2].norm
    expected = layer.predicted()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.predicted()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_gradients_per_sample():
    net = network("plain", "plain", "plain")
    parameters = dict(net.named_parameters())

    def loss(values, x):
        return torch.func.functional_call(net, values, (x[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, X)
    for index, x in enumerate(X):
        for name, value in gradients(net, x[None]).items():
            torch.testing.assert_close(found[name][index], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_part_under_a_transform_leaves_nothing_behind():
    net = network("plain", "plain", "plain")

    class Whole(nn.Module):
        """Works out a derivative in the middle of its forward pass, as energy models do."""

        def forward(self, x):
            head, block, *rest = net
            x = head(x)
            for part in (lambda x: x + torch.func.grad(lambda x: block(x).sum())(x), block, *rest):
                x = part(x)
            return x

    whole = Whole()
    whole.net = net
    expected, slopes = whole(X), gradients(whole)
    net[1].norm.source.forward_pass.watch(whole)
    assert torch.equal(whole(X), expected)
    for name, value in gradients(whole).items():
        torch.testing.assert_close(value, slopes[name], rtol=1e-4, atol=1e-5, msg=name)


class Changing(nn.Module):
    """Calls two blocks with their own parameters, with others, and after their own have changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.head, *blocks, _ = network("plain", "plain")
        self.pair = nn.Sequential(*blocks)
        self.others = {name: value.detach() * 1.2 for name, value in self.pair.named_parameters()}
        for name, value in self.others.items():
            while value._version < self.pair.get_parameter(name)._version:  # versions alone do not tell them apart
                value.add_(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pair(self.head(x))
        x = torch.func.functional_call(self.pair, self.others, (x,))
        with torch.no_grad():
            self.pair[0].conv.weight.mul_(1.1)
        return self.pair(x)


def test_parameters_that_change_within_a_pass_are_followed():
    net, watched = Changing(), Changing()
    watched.pair[1].norm.source.forward_pass.watch(watched)
    with torch.no_grad():
        assert torch.equal(watched(X), net(X))


def test_threads_have_passes_of_their_own():
    net = network("plain", "plain", "plain")
    expected = net(X)
    outputs: dict[int, Tensor] = {}

    def run(number: int) -> None:
        for _ in range(20):
            outputs[number] = net(X)
            torch.autograd.grad(outputs[number].square().sum(), list(net.parameters()))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 3
    assert all(torch.equal(output, expected) for output in outputs.values())
