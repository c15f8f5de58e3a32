"""What every method's block must keep, whatever the method does."""

import copy
import io
import pickle

import pytest
import torch

from normprop import norms
from normprop.errors import ConfigError

NAMES = norms.names()
SIZES = [7, 6, 5]


def build(name, dims=2, **options):
    """A network of two blocks, 4 to 8 to 8 channels, that the method was told is complete."""
    kernel = [3] if dims else []
    options = ({"padding": 1} if dims else {}) | options
    if dims not in norms.info(name).dims:
        with pytest.raises(ConfigError, match=name):
            norms.block(name, dims)(4, 8, *kernel, **options)
        return None
    first = norms.block(name, dims)(4, 8, *kernel, **options)
    second = norms.block(name, dims)(8, 8, *kernel, **({"padding": 1} if dims else {}))
    return norms.finish(name, torch.nn.Sequential(first, second))


def batch(dims=2, samples=6, dtype=torch.float32):
    return torch.randn(samples, 4, *SIZES[:dims], dtype=dtype, generator=torch.Generator().manual_seed(1))


def step(network, input):
    """Output and gradients of one training pass, in float32."""
    network.zero_grad()
    output = network(input)
    output.float().square().mean().backward()
    return output.detach(), [None if p.grad is None else p.grad.clone() for p in network.parameters()]


def close(first, second, rtol=1e-4):
    """Equal to rounding in float32, relative to the largest value."""
    (output, gradients), (others, expected) = first, second
    for own, other in zip([output, *gradients], [others, *expected], strict=True):
        if own is None or other is None:
            assert own is other
            continue
        torch.testing.assert_close(own, other, rtol=rtol, atol=rtol * float(other.abs().max() + 1e-3))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


every = pytest.mark.parametrize("name", NAMES)


@every
@pytest.mark.parametrize("dims", range(4))
@pytest.mark.parametrize("options", [{}, {"stride": 2, "groups": 2, "activation": "tanh"}], ids=["plain", "options"])
def test_blocks_have_the_shape_of_the_plain_map_and_train(name, dims, options):
    options = options if dims else {}
    network = build(name, dims, **options)
    if network is None:
        return
    plain = build("none", dims, **options)
    for samples in (1, 6):
        if samples == 1 and dims == min(norms.info(name).dims) == 0 and norms.info(name).needs_batch:
            with pytest.raises(ValueError, match=r"^\S.*[^\n]$"):
                step(network, batch(dims, samples))
            continue
        output, gradients = step(network, batch(dims, samples))
        assert output.shape == plain(batch(dims, samples)).shape
        assert torch.isfinite(output).all()
        assert all(gradient is None or torch.isfinite(gradient).all() for gradient in gradients)
        assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


@every
def test_copies_and_pickles_are_the_same_function_after_a_step(name):
    network = build(name) or build(name, 0)
    input = batch()
    step(network, input)
    twin, other = copy.deepcopy(network), pickle.loads(pickle.dumps(network))
    reference = step(network, input)
    close(step(twin, input), reference)
    close(step(other, input), reference)
    assert {id(p) for p in twin.parameters()}.isdisjoint({id(p) for p in network.parameters()})


@every
def test_a_state_dict_carries_the_whole_function(name):
    network, fresh = build(name), build(name)
    step(network, batch())
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh.eval()(batch()), network.eval()(batch()))


@every
def test_evaluation_changes_nothing_and_repeats(name):
    network = build(name).eval()
    before = copy.deepcopy(network.state_dict())
    first = network(batch())
    assert torch.equal(network(batch()), first)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@every
def test_doubles_agree_with_floats(name):
    network = build(name)
    double = copy.deepcopy(network).double()
    output, gradients = step(double, batch().double())
    assert output.dtype == torch.float64
    reference = step(network, batch())
    close((output.float(), [g if g is None else g.float() for g in gradients]), reference, rtol=2e-3)


@every
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_half_precision_is_near(name, how):
    network = build(name).train()
    reference = copy.deepcopy(network)(batch())
    if how in norms.info(name).cannot:
        pytest.xfail("named in cannot")
    if how == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = network(batch())
    else:
        output = network.bfloat16()(batch().bfloat16())
        assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    # bfloat16 keeps 8 bits: each of two layers and their statistics lose up to 1/256 of the largest value.
    error = (output.float() - reference).square().mean().sqrt()
    assert error < 0.05 * reference.std()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in network.parameters())


@every
def test_an_empty_batch_gives_an_empty_output_and_no_statistics(name):
    network = build(name).eval()
    assert network(batch(samples=0)).shape == (0, 8, 7, 6)
    before = copy.deepcopy(network.state_dict())
    assert network.train()(batch(samples=0)).shape == (0, 8, 7, 6)
    for key, value in network.state_dict().items():
        assert torch.isfinite(value).all()
        assert "num_batches" in key or torch.equal(before[key], value)


@every
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_constant_input_gives_no_nan(name, value):
    network = build(name)
    output, gradients = step(network, torch.full_like(batch(), value))
    assert torch.isfinite(output).all()
    assert all(gradient is None or torch.isfinite(gradient).all() for gradient in gradients)
    assert torch.isfinite(network.eval()(batch())).all()


@every
def test_memory_layout_does_not_matter(name):
    network = build(name)
    reference = step(copy.deepcopy(network), batch())
    close(step(copy.deepcopy(network), batch().to(memory_format=torch.channels_last)), reference)
    close(step(copy.deepcopy(network), batch().transpose(0, 1).contiguous().transpose(0, 1)), reference)


@every
def test_compiled_blocks_are_the_same_function(name):
    if "compile" in norms.info(name).cannot:
        pytest.xfail("named in cannot")
    torch.compiler.reset()
    network = build(name)
    compiled = torch.compile(copy.deepcopy(network), backend="aot_eager")
    for _ in range(2):
        close(step(compiled, batch()), step(network, batch()))


@every
def test_networks_are_laid_out_on_the_meta_device(name):
    with torch.device("meta"):
        network = build(name)
    assert all(parameter.is_meta for parameter in network.parameters())
    assert network.to_empty(device="cpu").state_dict().keys() == build(name).state_dict().keys()


@every
def test_residual_blocks_and_heads(name):
    branch = norms.block(name)(4, 4, 3, padding=1, activation=None)
    shortcut = norms.block(name)(4, 4, 1, activation=None)
    assert norms.residual(name)(branch)(batch()).shape == batch().shape
    assert norms.residual(name)(branch, shortcut, activation="tanh")(batch()).shape == batch().shape
    assert norms.head(name)(4, 10)(torch.randn(1, 4)).shape == (1, 10)
    assert norms.head(name, 2)(4, 10, 1)(batch()).shape == (6, 10, 7, 6)


@every
@pytest.mark.parametrize("dims", range(4))
def test_drop_in_layers_keep_the_shape_and_others_say_what_to_use(name, dims):
    if not norms.info(name).drop_in:
        with pytest.raises(ConfigError, match=r"norms\.block"):
            norms.create(name, 4, dims)
        return
    if dims not in norms.info(name).dims:
        with pytest.raises(ConfigError, match=name):
            norms.create(name, 4, dims)
        return
    layer = norms.create(name, 4, dims)
    assert layer(batch(dims)).shape == batch(dims).shape
    with pytest.raises(ConfigError, match=f"norms.{name}: num_features"):
        norms.create(name, 0, dims)


# What the papers say of their methods, against what the measurement finds.
BATCH = {
    "batch", "batch-l1", "batch-linf", "batch-topk", "bounded-weight-mean", "reg", "cross-iteration", "batch-group",
    "instance-enhancement", "batch-renorm", "sync-batch", "ghost-batch", "kalman-batch",
}  # fmt: skip
WEIGHTS = {
    "none", "normprop", "normprop-paper", "weight", "bounded-weight", "selu", "scaled-weight-standardized", "fixup",
    "tailored", "kernel-shaped", "frozen-batch",
}  # fmt: skip


@every
def test_the_measured_facts_are_those_of_the_paper(name):
    facts = norms.info(name)
    assert facts.depends_on_others == (name in BATCH)
    assert facts.running_state == (name in BATCH)
    assert facts.works_at_batch_1
    assert facts.same_in_eval == (name not in BATCH)
    assert facts.folds == (name in WEIGHTS | BATCH - {"instance-enhancement", "reg"})


@every
def test_the_random_state_is_left_alone_by_the_measurement(name):
    norms.facts.info.cache_clear()
    before = torch.random.get_rng_state()
    norms.info(name)
    assert torch.equal(before, torch.random.get_rng_state())
