"""Looking at a network so that it stays as it is: on a copy, with all random draws undone."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normprop.errors import ConfigError, NormPropError, first_line
from normprop.graph.random_state import preserved


@contextmanager
def quietly(model: nn.Module, *inputs: Tensor, seed: int | None = None, grad: bool = False) -> Iterator[nn.Module]:
    """A copy of a network, in the network's mode, to run or to change; random states are put back afterwards.

    Args:
        model: the network; it stays as it is, its buffers included.
        *inputs: what it will be given, if that may stand on other devices.
        seed: where random states start inside, by default where they are.
        grad: whether gradients are taken inside.

    Returns:
        The copy.

    Raises:
        ConfigError: if the network cannot be copied.

    Example:
        >>> model = nn.BatchNorm1d(1)
        >>> with quietly(model) as same:
        ...     _ = same(torch.ones(2, 1))
        >>> model.running_mean
        tensor([0.])
    """
    with preserved(model, *inputs, seed=seed), torch.set_grad_enabled(grad):
        try:
            copied = copy.deepcopy(model)
        except Exception as error:
            raise ConfigError(
                f"{type(model).__name__} cannot be copied, and must stay as it is; make copy.deepcopy(model) work: "
                f"{first_line(error)}"
            ) from error
        yield copied


def call(network: nn.Module, inputs: Tensor, name: str = "") -> Any:
    """Call a network, with an error in one line if it does not take the inputs.

    Args:
        network: a copy, as from :func:`quietly`.
        inputs: what to call it with.
        name: for the error, by default that of its class.

    Returns:
        Whatever the network returns.

    Raises:
        ConfigError: if it fails.

    Example:
        >>> call(nn.Identity(), torch.ones(1))
        tensor([1.])
    """
    try:
        return network(inputs)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, NormPropError):
            raise
        raise ConfigError(
            f"{name or type(network).__name__}: the network does not take inputs of shape {tuple(inputs.shape)}: "
            f"{first_line(error)}"
        ) from error


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name.

    Raises:
        ConfigError: if there are none.

    Example:
        >>> [*trained(nn.Linear(2, 1))]
        ['weight', 'bias']
    """
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise ConfigError(
            f"{type(model).__name__}: no parameter requires a gradient; call requires_grad_(True) on what is trained"
        )
    return found
