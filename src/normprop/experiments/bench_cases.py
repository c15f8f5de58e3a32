"""What the benchmark runs: networks at the sizes it has them at, and the cases made of the lists that are asked for."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from normprop import models, norms
from normprop.errors import ConfigError

MODES = ("eager", "compiled")
LAYOUTS = ("contiguous", "channels-last")
DTYPES = ("float32", "bfloat16")
METHODS = ("none", "batch", "group", "layer", "weight", "scaled-weight-standardized", "normprop-paper", "normprop")


@dataclass(frozen=True)
class Network:
    """A network of the benchmark.

    Args:
        shape: of a sample.
        classes: number of classes, of a sample or of each voxel.
        dense: whether every voxel has a label.
        build: called with norm= and width=.
    """

    shape: tuple[int, ...]
    classes: int
    dense: bool
    build: Callable[..., nn.Module]


NETWORKS = {
    "nin": Network((3, 32, 32), 10, False, partial(models.create, "nin", (3, 32, 32), 10)),
    "resnet18": Network((3, 64, 64), 1000, False, partial(models.create, "resnet18", (3, 64, 64), 1000)),
    "mlp": Network((784,), 10, False, partial(models.mlp, 784, 10, depth=3, hidden_features=1024)),
    "unet3d": Network((1, 32, 32, 32), 2, True, partial(models.create, "unet3d", (1, 32, 32, 32), 2)),
}


@dataclass(frozen=True)
class Case:
    """What all methods of a case share.

    Args:
        network: a key of ``NETWORKS``.
        batch_size: samples per step.
        mode: one of ``MODES``.
        layout: one of ``LAYOUTS``.
        dtype: one of ``DTYPES``; bfloat16 by autocast.

    Example:
        >>> print(Case("nin", 8, "eager", "contiguous", "float32"))
        nin, batch 8, eager, contiguous, float32
    """

    network: str
    batch_size: int
    mode: str
    layout: str
    dtype: str

    def __str__(self) -> str:
        """The case in words."""
        return f"{self.network}, batch {self.batch_size}, {self.mode}, {self.layout}, {self.dtype}"


def cases(
    networks: Sequence[str],
    batch_sizes: Sequence[int],
    modes: Sequence[str] = MODES[:1],
    layouts: Sequence[str] = LAYOUTS[:1],
    dtypes: Sequence[str] = DTYPES[:1],
) -> tuple[list[Case], list[str]]:
    """Combine the lists; channels-last means nothing to a network without space, and is left out there.

    Args:
        networks: keys of ``NETWORKS``.
        batch_sizes: whole numbers above zero.
        modes: of ``MODES``.
        layouts: of ``LAYOUTS``.
        dtypes: of ``DTYPES``.

    Returns:
        The cases, and a sentence for what is left out.

    Raises:
        ConfigError: for an unknown name, a batch size below 1, a list that is empty or names something twice.

    Example:
        >>> [str(case) for case in cases(["mlp"], [1], layouts=["contiguous", "channels-last"])[0]]
        ['mlp, batch 1, eager, contiguous, float32']
    """
    _check("networks", networks, NETWORKS)
    _check("modes", modes, MODES)
    _check("layouts", layouts, LAYOUTS)
    _check("dtypes", dtypes, DTYPES)
    _check("batch sizes", batch_sizes, [size for size in batch_sizes if size > 0], "whole numbers above zero")
    every = [Case(*values) for values in itertools.product(networks, batch_sizes, modes, layouts, dtypes)]
    kept = [case for case in every if case.layout == "contiguous" or len(NETWORKS[case.network].shape) > 2]
    if not kept:
        raise ConfigError("bench: channels-last means nothing to mlp, whose samples have no space; add contiguous")
    flat = dict.fromkeys(case.network for case in every if case not in kept)
    return kept, [f"{name} has no channels-last cases: its samples have no space." for name in flat]


def check_methods(names: Sequence[str], networks: Sequence[str]) -> list[str]:
    """Refuse what cannot be built, before anything is timed.

    Args:
        names: methods; the plain network "none" is put first if it is missing, every ratio is taken to it.
        networks: keys of ``NETWORKS``.

    Returns:
        The methods to run.

    Raises:
        ConfigError: for a method that does not exist, is named twice, or has no block for one of the networks.

    Example:
        >>> check_methods(["batch"], ["mlp"])
        ['none', 'batch']
    """
    _check("methods", names, norms.names())
    for network, name in itertools.product(networks, names):
        dims = len(NETWORKS[network].shape) - 1
        if dims not in norms.info(name).dims:
            raise ConfigError(
                f"bench: {name} has no block of {dims} dimensions, so {network} cannot be built with it; leave one out"
            )
    return list(names) if "none" in names else ["none", *names]


def memory_format(case: Case) -> torch.memory_format:
    """The memory format of a case's images and weights.

    Args:
        case: the case.

    Returns:
        Torch's value.

    Example:
        >>> memory_format(Case("unet3d", 1, "eager", "channels-last", "float32"))
        torch.channels_last_3d
    """
    if case.layout == "contiguous":
        return torch.contiguous_format
    return torch.channels_last if len(NETWORKS[case.network].shape) == 3 else torch.channels_last_3d


def _check(what: str, given: Sequence[object], known: Sequence[object] | dict, expected: str = "") -> None:
    if not given:
        raise ConfigError(f"bench: the list of {what} is empty; name at least one")
    for value in given:
        if value not in known:
            names = expected or ", ".join(map(str, known))
            raise ConfigError(f"bench: {what} must be of {names}; got {value!r}")
        if list(given).count(value) > 1:
            raise ConfigError(f"bench: {what} names {value!r} more than once")
