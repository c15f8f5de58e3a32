"""Published models with batch norm, as torchvision, MONAI and transformers build them; nothing is downloaded.

What there is comes from the registries of the libraries, and whether a model has batch norm from looking at it without
its weights: a model that a new release adds is tested without a change here.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.graph.families import Case
from tests.graph.real_libraries import LIBRARIES, Candidate

# Sides of an input, tried upwards until the model accepts one: pools and patches make demands that only it knows.
_SIDES = {2: (64, 96, 128, 160, 192, 224, 256, 299, 384), 3: (16, 32, 48, 64)}
_BATCH = 2

# What the libraries say to everybody who builds these models, and no fault of ours.
_KNOWN_WARNINGS = ["The default weight initialization of (GoogleNet|inception_v3) will be changed"]


@dataclass(frozen=True)
class RealModel:
    """One published model.

    Attributes:
        library: the package that it comes from.
        name: its name there.
        architecture: what it is a size or a variant of.
        parameters: number of parameters.
        build: makes the model with fresh weights, in training mode, and its smallest Gaussian input.
    """

    library: str
    name: str
    architecture: str
    parameters: int
    build: Callable[[], Case]


@dataclass(frozen=True)
class Survey:
    """All models with batch norm, and what could not be looked at with the reason."""

    models: list[RealModel] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def real_models() -> Iterator[tuple[str, str, Callable[[], Case]]]:
    """Library, name and constructor of every published model with batch norm."""
    for model in survey().models:
        yield model.library, model.name, model.build


def smallest_models(at_most: int = 140_000_000) -> list[RealModel]:
    """Of every architecture the model with the fewest parameters.

    Args:
        at_most: parameters; an architecture without a model that small is left out. The default, a step of training in
            float64 within 5 GB, leaves every architecture of torchvision in.

    Returns:
        The models, sorted by library and architecture.
    """
    smallest: dict[tuple[str, str], RealModel] = {}
    for model in sorted(survey().models, key=lambda model: model.parameters):
        if model.parameters <= at_most:
            smallest.setdefault((model.library, model.architecture), model)
    return sorted(smallest.values(), key=lambda model: (model.library, model.architecture))


def build(library: str, name: str) -> Case:
    """Make one model by its name, without looking at any other."""
    (candidate,) = (candidate for candidate in LIBRARIES[library]() if candidate.name == name)
    return _build(candidate)


@cache
def survey() -> Survey:
    """Look at every model of every library that is installed."""
    found = Survey()
    for library, candidates in LIBRARIES.items():
        try:
            listed = list(candidates())
        except ModuleNotFoundError as error:
            found.left_out[library] = _first_line(error)
            continue
        for candidate in listed:
            try:
                model = _weightless(candidate)
            # Registries list models whose own requirements are missing or that have no default settings.
            except Exception as error:
                found.left_out[f"{library}/{candidate.name}"] = f"{type(error).__name__}: {_first_line(error)}"
                continue
            if _has_batch_norm(model):
                found.models.append(_real_model(library, candidate, model))
    return found


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")


def _has_batch_norm(model: nn.Module) -> bool:
    return any(getattr(module, "running_mean", None) is not None for module in model.modules())


def _real_model(library: str, candidate: Candidate, model: nn.Module) -> RealModel:
    count = sum(parameter.numel() for parameter in model.parameters())
    return RealModel(library, candidate.name, candidate.architecture, count, lambda: _build(candidate))


class _EmptyOnMeta(TorchFunctionMode):
    """Lets parameters take no memory.

    The context of torch's meta device would also catch the tensors that some constructors compute layer sizes from.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.empty:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return func(*args, **(kwargs or {}))


def _weightless(candidate: Candidate) -> nn.Module:
    with _EmptyOnMeta():
        return _construct(candidate).to("meta")


def _construct(candidate: Candidate) -> nn.Module:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)
        for message in _KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message)
        return candidate.construct().train()


def _build(candidate: Candidate) -> Case:
    generator = torch.Generator().manual_seed(0)
    return Case(_construct(candidate), (torch.randn(_smallest_shape(candidate), generator=generator),))


def _smallest_shape(candidate: Candidate) -> tuple[int, ...]:
    model = _weightless(candidate)
    for side in _SIDES[candidate.dims]:
        shape = (_BATCH, candidate.channels, *[side] * candidate.dims)
        try:
            model(torch.empty(shape, device="meta"))
        # Anything may be raised by a layer that finds its input too small.
        except Exception as error:
            last = error
        else:
            return shape
    raise ValueError(f"{candidate.name} accepts none of the sides {_SIDES[candidate.dims]}: {_first_line(last)}")
