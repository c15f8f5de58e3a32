import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tests.graph.families import FAMILIES, TRAPS, look_trained, normalisers

ALL = {**FAMILIES, **TRAPS}
SHAPES = {
    "unet_2d": [(8, 4, 32, 32)],
    "unet_3d": [(8, 2, 16, 16, 16)],
    "dcgan": [(8, 3, 32, 32)],
    "linear_gan": [(8, 3, 28, 28)],
    "yolo": [(8, 12, 16, 16), (8, 12, 8, 8)],
}
# Calls of batch normalisation in one forward pass, counted by hand on the published wiring.
CALLS = {
    "vgg": 4,
    "resnet_v1_basic": 1 + 4 * 2 + 2,
    "resnet_v1_bottleneck": 1 + 4 * 3 + 2,
    "resnet_v2": 5 * 2 + 1,
    "resnext": 1 + 4 * 3 + 2,
    "senet": 1 + 4 * 3 + 2,
    "densenet": 1 + 3 * 2 + 1 + 3 * 2 + 1,
    "inception": 1 + 8 + 2 + 8,
    "mobilenet_v2": 1 + 3 * 3 + 1,
    "mobilenet_v3": 1 + 3 * 3 + 1,
    "efficientnet": 1 + 4 * 3 + 1,
    "regnet": 1 + 3 * 3 + 2,
    "shufflenet_v2": 1 + (2 + 3) + 3 + 3 + 1,
    "unet_2d": 5 * 2,
    "unet_3d": 2 + 2 + 1 + 1 + 1 + 1,
    "pointnet": 3 + 1 + 3 + 1 + 1 + 1,
    "dcgan": 3,
    "linear_gan": 1 + 2,
    "yolo": 1 + 4 + 1 + 4 + 2 + 4 + 1 + 4,
    "levit": 2 + 2 * (2 + 2) + 1,
    "mlp": 3,
    "conv1d": 3,
    "frozen_norm": 1,
    "functional_norm": 1,
    "shared_norm": 3,
    "norm_of_input": 3,
    "norm_of_pool": 3,
    "norm_of_norm": 3,
}


class CountNorms(TorchFunctionMode):
    """Counts calls of the function while they are executed."""

    def __init__(self):
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is F.batch_norm
        return func(*args, **(kwargs or {}))


def outputs_of(model, args):
    return pytree.tree_leaves(model(*args))


@pytest.mark.parametrize("name", ALL)
def test_trains_one_step(name):
    torch.manual_seed(1)
    case = ALL[name]()
    before = {key: value.clone() for key, value in case.model.named_parameters()}
    optimiser = torch.optim.SGD(case.model.parameters(), lr=0.1)
    with CountNorms() as counted:
        outputs = outputs_of(case.model, case.args)
    assert [tuple(output.shape) for output in outputs] == SHAPES.get(name, [(8, 10)])
    assert counted.calls == CALLS.get(name, 2)
    loss = sum(output.square().mean() for output in outputs)
    loss.backward()
    optimiser.step()
    assert torch.isfinite(loss)
    for key, parameter in case.model.named_parameters():
        assert torch.isfinite(parameter).all(), key
        assert parameter.grad is not None, f"{key} takes no part"
    assert any(not torch.equal(before[key], value) for key, value in case.model.named_parameters())


@pytest.mark.parametrize("name", ALL)
def test_is_the_same_at_every_call_and_standard_gaussian(name):
    random_state = torch.random.get_rng_state()
    first, second = ALL[name](), ALL[name]()
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(module.training for module in first.model.modules()) or name == "kept_in_eval"
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key
    (input,), (same,) = first.args, second.args
    assert torch.equal(input, same)
    # Five standard errors of mean and standard deviation.
    assert abs(input.mean()) < 5 / input.numel() ** 0.5
    assert abs(input.std() - 1) < 5 / (2 * input.numel()) ** 0.5


@pytest.mark.parametrize("name", sorted(ALL.keys() - {"cumulative_average"}))
def test_exports_with_every_call_of_batch_norm(name):
    case = ALL[name]()
    graph = torch.export.export(case.model, case.args).graph
    found = sum(node.target is torch.ops.aten.batch_norm.default for node in graph.nodes)
    assert found == CALLS.get(name, 2)


def test_a_cumulative_average_does_not_export():
    case = ALL["cumulative_average"]()
    with pytest.raises(torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode, match="data-dependent"):
        torch.export.export(case.model, case.args)


@pytest.mark.parametrize("name", ALL)
def test_looks_trained(name):
    case = ALL[name]()
    weights = [module for module in case.model.modules() if hasattr(module, "weight") and module.weight is not None]
    kept = {id(module): module.weight.clone() for module in weights if not hasattr(module, "running_mean")}
    assert look_trained(case.model, torch.Generator().manual_seed(0)) is case.model
    for module in weights:
        assert id(module) not in kept or torch.equal(module.weight, kept[id(module)])
    found = normalisers(case.model)
    assert found
    for module in found:
        for key in ("running_mean", "running_var", "weight", "bias"):
            value = getattr(module, key, None)
            assert value is None or len(value.unique()) == len(value), key
        assert module.running_var is None or (module.running_var > 0).all()
        assert getattr(module, "num_batches_tracked", None) in (None, 100)
    for output in outputs_of(case.model.eval(), case.args):
        assert torch.isfinite(output).all()


def test_trained_statistics_have_the_distribution_they_promise():
    norm = look_trained(nn.BatchNorm1d(40_000), torch.Generator().manual_seed(0))
    # Within five standard errors each: standard deviation s of n numbers s / sqrt(2 n), of their mean s / sqrt(n).
    for values, mean, std in [
        (norm.running_mean, 0.0, 0.5),
        (norm.running_var.log(), 0.0, 0.5),
        (norm.weight, 1.0, 12**-0.5),
        (norm.bias, 0.0, 0.3),
    ]:
        assert abs(values.mean() - mean) < 5 * std / 200
        assert abs(values.std() - std) < 5 * std / 282
    assert 0.5 <= norm.weight.min() < norm.weight.max() <= 1.5


def test_stochastic_depth_drops_single_samples_and_keeps_the_mean():
    from tests.graph.families_mobile import StochasticDepth

    torch.manual_seed(0)
    out = StochasticDepth(0.25)(torch.ones(40_000, 2, 1, 1))
    assert torch.equal(out[:, 0], out[:, 1])
    assert set(out.unique().tolist()) == {0.0, out.max().item()}
    assert abs(out[:, 0].mean() - 1) < 5 * (0.25 / 0.75) ** 0.5 / 200
