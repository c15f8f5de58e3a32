"""A converted network is an ordinary module: copies, files, compilers, exports, per-sample gradients, averages."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import normprop
from normprop.training import launch
from tests.graph.families import FAMILIES


def leaves(output: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def converted(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    case = FAMILIES[name]()
    return normprop.convert(case.model, case.args).eval(), case.args


def same(one: object, other: object) -> bool:
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(leaves(one), leaves(other), strict=True))


@pytest.mark.parametrize("name", ["resnet_v1_basic", "densenet", "unet_3d", "pointnet", "dcgan"])
def test_copies_pickles_averages_and_state(name):
    net, x = converted(name)
    expected = net(*x)
    changed = copy.deepcopy(net)
    for other in (changed, pickle.loads(pickle.dumps(net)), AveragedModel(net)):
        assert same(other(*x), expected)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in net.parameters()}
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    # live moments of the copy follow the copy's own parameters
    assert not same(changed(*x), expected)
    assert same(net(*x), expected)
    loaded = copy.deepcopy(net)
    loaded.load_state_dict(changed.state_dict())
    assert same(loaded(*x), changed(*x))
    again = pickle.loads(pickle.dumps(changed))
    assert same(again(*x), changed(*x))


@pytest.mark.parametrize("name", ["vgg", "resnet_v2", "shufflenet_v2"])
def test_compile_and_export(name):
    net, x = converted(name)
    sum(part.square().mean() for part in leaves(net(*x))).backward()
    expected = {key: parameter.grad.clone() for key, parameter in net.named_parameters()}
    net.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    sum(part.square().mean() for part in leaves(compiled(*x))).backward()
    for key, parameter in net.named_parameters():
        scale = float(expected[key].abs().max())
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-3, atol=1e-4 * scale + 1e-7)
    program = torch.export.export(net, x)
    assert same(program.module()(*x), net(*x))


@pytest.mark.parametrize("name", ["resnet_v1_bottleneck", "shufflenet_v2", "conv1d"])
def test_gradients_per_sample_are_those_of_single_samples(name):
    net, x = converted(name)
    net.double()
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    samples = x[0][:3].double()

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        output = torch.func.functional_call(net, {**parameters, **buffers}, (sample[None],))
        return sum(part.square().mean() for part in leaves(output))

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, samples)
    loss(parameters, samples[1]).backward()
    for key, parameter in net.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(together[key][1], parameter.grad, rtol=1e-9, atol=1e-9 * scale + 1e-13)


def test_other_types_and_accumulated_gradients():
    net, x = converted("resnet_v1_basic")
    half = copy.deepcopy(net).bfloat16()
    assert leaves(half(*(part.bfloat16() for part in x)))[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(torch.isfinite(leaves(net(*x))[0].float()).all())
    assert leaves(net.double()(*(part.double() for part in x)))[0].dtype == torch.float64

    def gradients(parts: list[Tensor]) -> list[Tensor]:
        net.zero_grad()
        for part in parts:
            (net(part).square().mean(1).sum() / len(x[0])).backward()
        return [parameter.grad.clone() for parameter in net.parameters()]

    batch = x[0].double()
    for one, other in zip(gradients([batch]), gradients([*batch.split(1)]), strict=True):
        torch.testing.assert_close(other, one)


def test_training_mode_changes_nothing():
    net, x = converted("resnet_v1_basic")
    state = copy.deepcopy(net.state_dict())
    expected = net(*x)
    assert same(net.train()(*x), expected)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_other_devices_are_followed():
    net, x = converted("densenet")
    output = leaves(net.to("meta")(*(part.to("meta") for part in x)))[0]
    assert output.device.type == "meta"
    held = [tensor for module in net.modules() if getattr(module, "source", None) for tensor in module.source.held]
    assert held
    assert {tensor.device.type for tensor in held} == {"meta"}


def _step(report: Callable[[object], None]) -> dict[str, Tensor]:
    torch.distributed.init_process_group("gloo")
    net, x = converted("resnet_v1_basic")
    parallel = nn.parallel.DistributedDataParallel(net.double().train())
    rank = torch.distributed.get_rank()
    part = x[0].double()[4 * rank : 4 * rank + 4]
    # two forward passes before one backward: batch norm's running statistics break this
    (parallel(part).square().mean() + parallel(part).square().mean()).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def test_two_processes_give_the_gradients_of_the_whole_batch():
    found = launch.run(_step, (), 2, lambda value: None)
    net, x = converted("resnet_v1_basic")
    net.double().train()
    (2 * net(x[0].double()).square().mean()).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
