import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normprop import norms
from normprop.errors import ConfigError
from normprop.graph.capture import capture
from normprop.graph.contract import calls, contract
from normprop.graph.propagate import propagate
from normprop.graph.record import record
from normprop.graph.rules import module_rule
from normprop.graph.signal import Signal
from normprop.moments import Moments
from tests.graph.rules.monte_carlo import CAPTURES, check, compare, moments, shaken

HOW = pytest.mark.parametrize("how", CAPTURES)
MODE = pytest.mark.parametrize("train", [True, False])


@HOW
@MODE
def test_batch_norms(how, train):
    cases = {
        "2-D": nn.BatchNorm2d(4),
        "without gain": nn.BatchNorm2d(4, affine=False),
        "without averages": nn.BatchNorm2d(4, track_running_stats=False),
        "sync": nn.SyncBatchNorm(4),
        "functional": lambda x: F.batch_norm(x, None, None, training=True),
    }
    if train:  # SyncBatchNorm needs a process group
        cases.pop("sync")
    check(cases, (4, 5, 5), how=how, train=train, samples=2000, var=0.002, mean=0.002)


@HOW
def test_batch_norm_of_features_and_volumes(how):
    check({"features": nn.BatchNorm1d(4)}, (4,), how=how, var=0.002, mean=0.002)
    check({"volumes": nn.BatchNorm3d(4)}, (4, 3, 3, 3), how=how, samples=1000, var=0.002, mean=0.002)


# Statistics of 48 and more values: they vary by a few per cent.
NORMS = {
    "group": nn.GroupNorm(2, 8),
    "one group": nn.GroupNorm(1, 8),
    "instance": nn.InstanceNorm2d(8),
    "instance, affine": nn.InstanceNorm2d(8, affine=True),
    "instance, running": nn.InstanceNorm2d(8, track_running_stats=True),
    "layer": nn.LayerNorm([8, 6, 8]),
    "layer of channels": lambda x: F.layer_norm(x, [8, 6, 8], None, None, 1e-3),
    "rms": nn.RMSNorm([8, 6, 8]),
    "by hand": lambda x: (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True) + 1e-5).sqrt(),
    "by hand, over channels": lambda x: x * torch.rsqrt(x.square().mean((1, 2, 3), keepdim=True) + 1e-5),
}


@HOW
@MODE
def test_norms_of_samples(how, train):
    check(NORMS, (8, 6, 8), how=how, train=train, samples=2000, var=0.12, mean=0.06)


@HOW
def test_layer_norm_of_few_values(how):
    # The mean square over the group is right, that of single elements is not: means here differ between them.
    cases = {"layer": nn.LayerNorm(8, elementwise_affine=False), "rms": nn.RMSNorm(8)}
    check(cases, (8, 8), how=how, samples=2000, var=0.35, mean=0.1, given=False)


@HOW
def test_local_response(how):
    cases = {"default": nn.LocalResponseNorm(3), "strong": nn.LocalResponseNorm(4, alpha=0.5, beta=0.6, k=2.0)}
    # The sum of squares holds the value itself.
    check(cases, (6, 4, 4), how=how, samples=2000, var=0.6, mean=0.15)


@HOW
def test_weight_norms(how):
    cases = {
        "weight": nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)),
        "spectral": nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)).eval(),
    }
    check(cases, (6,), how="record" if how == "record" else "export", train=False, var=0.0, mean=0.0)


def _methods():
    for name in norms.names():
        for kind, train in (("create", True), ("block", True), ("block", False)):
            yield pytest.param(name, kind, train, id=f"{name}-{kind}-{'train' if train else 'eval'}")


# What graphs cannot follow yet, with the operator that is in the way.
BEYOND = {("recurrent-normprop", True): "fill", ("recurrent-normprop", False): "fill"}


@pytest.mark.parametrize(("name", "kind", "train"), [*_methods()])
def test_every_method(name, kind, train):
    """Each method's layer and block, by the rules of its modules and operators; on maps of 100 positions."""
    torch.manual_seed(0)
    try:
        made = norms.create(name, 8) if kind == "create" else norms.block(name)(8, 8, 3, activation="relu")
    except ConfigError:
        pytest.skip("no layer of its own" if kind == "create" else "no block")
    generator = torch.Generator().manual_seed(0)
    model = made.train(train).double()
    # What regression takes of means depends on its penalty, which the rule leaves out.
    law = Moments(torch.zeros(8), torch.ones(8)) if name == "reg" else moments(8, generator)
    mean, std = (torch.as_tensor(part).reshape(-1, 1, 1) for part in (law.mean, law.std))
    x = torch.randn(150, 8, 10, 10, generator=generator, dtype=torch.float64) * std + mean
    if (name, train) in BEYOND:
        pytest.skip(f"graphs do not follow {BEYOND[name, train]} here")
    graph = record(model, (x,), {}).settled()
    graph = contract(graph, calls(graph, lambda module: module_rule(module) is not None))
    signal = propagate(graph, {0: law}).signal(graph.outputs[0])
    with torch.no_grad():
        output = model(x)
    signal = Signal.of(*signal.channels(1), signal.shape, axis=1)
    # Statistics of a sample vary by a few per cent; the largest of a batch is one number, 7 % from its mean.
    wrong = compare(signal, output, var=0.5 if name == "batch-linf" else 0.2, mean=0.1)
    assert not wrong, wrong


def test_gains_and_biases_count():
    model = shaken(nn.Sequential(nn.BatchNorm2d(4)), torch.Generator().manual_seed(0))
    graph = capture(model, torch.randn(2, 4, 3, 3).double())
    signal = propagate(graph, {0: Moments(2.0, 9.0)}).signal(graph.outputs[0])
    expected = model[0].weight.square() / (1 + 1e-5 / 9)
    assert torch.allclose(signal.var.flatten().double(), expected.detach())
    assert torch.allclose(signal.mean.flatten().double(), model[0].bias.detach())
