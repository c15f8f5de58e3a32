"""The registry of methods: every normaliser as a block of linear map, normaliser and activation.

The block is the unit of exchange, not the norm layer, because weight-side methods such as Normalization Propagation do
not fit between a convolution and its activation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import nn

from normprop.errors import ConfigError
from normprop.moments import Activation

Constructor = Callable[..., nn.Module]
Size = int | tuple[int, ...]
NetworkT = TypeVar("NetworkT", bound=nn.Module)


@dataclass(frozen=True)
class Method:
    """How one method builds the parts of a network.

    Attributes:
        paper: authors, year and title of its source.
        block: ``(dims, in_channels, out_channels, [kernel_size, stride, padding, groups,] activation)`` to a module.
        head: ``(dims, in_channels, out_channels, [kernel_size, ...])`` to the last, unnormalised linear map.
        residual: ``(branch, shortcut, activation, spatial_dims)`` to a module that adds them.
        layer: ``(dims, num_features)`` to a drop-in normaliser, for methods that are one.
        finish: called on a network built of these blocks, for methods that need to know the whole of it.
        cannot: what the method's blocks cannot do, of the contracts that every other method keeps.
    """

    paper: str
    block: Constructor
    head: Constructor
    residual: Constructor
    layer: Constructor | None = None
    finish: Callable[[nn.Module], object] | None = None
    cannot: tuple[str, ...] = ()


_METHODS: dict[str, Method] = {}


def register(name: str, method: Method) -> None:
    """Make a method available under a name.

    Raises:
        ConfigError: if the name is taken.
    """
    if name in _METHODS:
        raise ConfigError(f"norms: the name {name!r} is taken")
    _METHODS[name] = method


def names() -> list[str]:
    """Names of all methods, in the order of tables and plots.

    Example:
        >>> names()[:2]
        ['none', 'normprop']
    """
    return list(_METHODS)


def method(name: str) -> Method:
    """Look a method up.

    Raises:
        ConfigError: if there is none of that name.
    """
    if name not in _METHODS:
        raise ConfigError(f"norms: no method {name!r}; there are {', '.join(_METHODS)}")
    return _METHODS[name]


def _dims(name: str, dims: int) -> int:
    if dims not in (0, 1, 2, 3):
        raise ConfigError(f"norms.{name}: dims must be 0 (linear), 1, 2 or 3, got {dims!r}")
    return dims


def block(name: str, dims: int = 2) -> Constructor:
    """Return the constructor of a method's block: linear map, normaliser and activation.

    Args:
        name: name of the method, one of :func:`names`.
        dims: spatial dimensions of the convolution, 0 for a linear layer.

    Returns:
        A callable ``(in_channels, out_channels, kernel_size, stride=1, padding=0, groups=1, activation="relu")``; for
        ``dims=0`` ``(in_features, out_features, activation="relu")``.

    Raises:
        ConfigError: for an unknown name or dims.

    Example:
        >>> import torch
        >>> block("batch")(3, 8, 3, padding=1)(torch.randn(2, 3, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """
    build = method(name).block
    if _dims("block", dims) == 0:

        def linear(in_features: int, out_features: int, activation: Activation = "relu") -> nn.Module:
            return build(0, in_features, out_features, activation=activation)

        return linear

    def convolution(
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        groups: int = 1,
        activation: Activation = "relu",
    ) -> nn.Module:
        options = {"stride": stride, "padding": padding, "groups": groups}
        return build(dims, in_channels, out_channels, kernel_size, **options, activation=activation)

    return convolution


def create(name: str, num_features: int, dims: int = 2) -> nn.Module:
    """Build a method's normaliser alone, to stand where a batch norm of ``num_features`` channels stood.

    Args:
        name: name of a method whose normaliser is a drop-in layer.
        num_features: channels of its input, axis 1.
        dims: spatial dimensions of its input, 0 for features.

    Returns:
        A module from (N, num_features, *space) to the same shape.

    Raises:
        ConfigError: for a method that works on weights or activations and has no such layer.

    Example:
        >>> create("group", 64).num_groups
        32
    """
    build = method(name).layer
    if build is None:
        raise ConfigError(f"norms.{name}: this method is no drop-in layer; build it with norms.block({name!r}, dims)")
    if isinstance(num_features, bool) or not isinstance(num_features, int) or num_features < 1:
        raise ConfigError(f"norms.{name}: num_features must be a whole number above zero, got {num_features!r}")
    return build(_dims(name, dims), num_features)


def finish(name: str, network: NetworkT) -> NetworkT:
    """Tell a method that a network of its blocks is complete.

    Some methods need the whole network: Kalman Normalization links each layer to the one before, Fixup scales by the
    number of residual blocks, tailored activations by the depth. Our reference networks call this; for other methods it
    does nothing.

    Args:
        name: name of the method.
        network: the network, changed in place.

    Returns:
        The network.

    Example:
        >>> finish("batch", nn.Sequential(block("batch")(3, 8, 3)))[0].norm.num_features
        8
    """
    complete = method(name).finish
    if complete is not None:
        complete(network)
    return network


def head(name: str, dims: int = 0) -> Constructor:
    """Return the constructor of the last linear map that goes with a method: no normalised output, no activation.

    Args:
        name: name of the method.
        dims: spatial dimensions, 0 for a linear layer.

    Returns:
        A callable as that of :func:`block`, without ``activation``.

    Example:
        >>> head("batch")(8, 10)
        Linear(in_features=8, out_features=10, bias=True)
    """
    return partial(method(name).head, _dims("head", dims))


def residual(name: str, dims: int = 2) -> Constructor:
    """Return the constructor of a residual block that goes with a method.

    Args:
        name: name of the method.
        dims: spatial dimensions.

    Returns:
        A callable ``(branch, shortcut=None, activation="relu")``; the branch and a shortcut end in blocks without
        activation.

    Example:
        >>> import torch
        >>> branch = block("batch")(4, 4, 3, padding=1, activation=None)
        >>> residual("batch")(branch)(torch.randn(2, 4, 5, 5)).shape
        torch.Size([2, 4, 5, 5])
    """
    return partial(method(name).residual, spatial_dims=_dims("residual", dims))
