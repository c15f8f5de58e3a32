"""What all diagnostics' tests share: one thread, a seed, and a check that a network stays as it is."""

from contextlib import contextmanager

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Networks here are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _snapshot(model):
    values = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    modes = [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        for module in model.modules()
    ]
    needs = [p.requires_grad for p in model.parameters()]
    return {**values, "random state": torch.get_rng_state()}, gradients, (modes, needs)


@pytest.fixture
def unchanged():
    """A block that must leave a network's values, gradients, modes and hooks, and the random state, as they are."""

    @contextmanager
    def block(model):
        before = _snapshot(model)
        yield
        after = _snapshot(model)
        for old, new in zip(before[:2], after[:2], strict=True):
            assert old.keys() == new.keys()
            for name, value in old.items():
                assert new[name] is None if value is None else torch.equal(value, new[name]), name
        assert before[2] == after[2]

    return block
