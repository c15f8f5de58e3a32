"""Repeatable runs of copies of a model, which leave the model and the random state as they were."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normprop.errors import ConfigError, first_line
from normprop.graph.random_state import accelerators, preserved, start
from normprop.graph.sample_trace import Shapes, Trace
from normprop.graph.samples import double, growing, map_tensors, tensors


@dataclass(frozen=True)
class Run:
    """One run: the copy of the model after it, its input (leaves of the graph where floating) and its outputs."""

    model: nn.Module
    input: tuple[Tensor, ...]
    outputs: list[Tensor]

    def gradients(self, weights: list[Tensor]) -> list[Tensor | None]:
        """Gradient of the weighted sum of the outputs by the inputs, then by the parameters; ``None`` where none.

        Raises:
            ConfigError: if the model raises on the way back.
        """
        pairs = [pair for pair in zip(self.outputs, weights, strict=True) if pair[0].requires_grad]
        by = [tensor for tensor in (*self.input, *self.model.parameters()) if tensor.requires_grad]
        for tensor in by:
            tensor.grad = None
        if pairs and by:
            outputs, seeds = [output for output, _ in pairs], [weight for _, weight in pairs]
            try:  # not torch.autograd.grad, which reentrant checkpointing refuses
                torch.autograd.backward(outputs, seeds, retain_graph=True)
            except RuntimeError as error:
                raise ConfigError(
                    f"batch_dependence: the model cannot be differentiated: {first_line(error)}"
                ) from error
        return [tensor.grad for tensor in by]


@dataclass(frozen=True)
class Sizes:
    """Shapes of the outputs of a run, and of all that entered or left a module."""

    outputs: list[torch.Size]
    modules: Shapes


class Runner:
    """Runs copies of a model in one floating point type, each from the same state and random state.

    Args:
        model: the model; it is copied at once.
        input: tensors with the samples along axis 0.
        kwargs: arguments by name.
        dtype: the floating point type.

    Raises:
        ConfigError: if the model cannot be copied.
    """

    def __init__(self, model: nn.Module, input: tuple[Tensor, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> None:
        def cast(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)

        self.name = type(model).__name__
        self.dtype = dtype
        with torch.inference_mode(False), torch.no_grad():
            self.input = tuple(cast(tensor) for tensor in input)
            self.kwargs = map_tensors(cast, kwargs)
            try:
                copied = copy.deepcopy(model)
                self.model = copied.double() if dtype == torch.float64 else copied.float()
            except Exception as error:
                raise ConfigError(
                    f"batch_dependence: {self.name} cannot be copied to {dtype}, and the model itself must stay as it "
                    f"is; make copy.deepcopy(model) work: {first_line(error)}"
                ) from error

    def run(self, input: tuple[Tensor, ...], trace: Trace | None = None) -> Run:
        """Run a fresh copy.

        Args:
            input: tensors of the types and shapes of the runner's.
            trace: what watches the run.

        Raises:
            ConfigError: if the model raises or returns NaN.
        """
        model = copy.deepcopy(self.model)
        leaves = tuple(t.detach().clone().requires_grad_(t.is_floating_point()) for t in input)
        arguments = [tensor.clone() for tensor in leaves]  # which the model may change in place
        if trace is not None:
            trace.follow(model)
        start(0, accelerators(self.model, *self.input))
        try:
            output = model(*arguments, **copy.deepcopy(self.kwargs))
        except Exception as error:
            raise ConfigError(
                f"batch_dependence: {self.name} cannot run on x in {self.dtype}; if it runs in one floating point "
                f"type alone, pass dtype=torch.float32: {first_line(error)}"
            ) from error
        outputs = tensors(output)
        if trace is None and any(tensor.isnan().any() for tensor in outputs):
            watch = Trace()
            self.run(input, watch)
            path = next((path for path, tensor in watch.outputs() if tensor.isnan().any()), "") or "(model)"
            raise ConfigError(
                f"batch_dependence: {path} returns NaN, which cannot be compared; give an input on which the model "
                "is finite"
            )
        return Run(model, leaves, outputs)

    def doubled(self, base: Run) -> Sizes:
        """Run as many samples more for the shapes; empty if the model takes them not, or returns no more for them."""
        trace = Trace()
        try:
            shapes = [output.shape for output in self.run(double(self.input), trace).outputs]
        except ConfigError:
            return Sizes([], {})
        grown = any(growing(output.shape, larger) for output, larger in zip(base.outputs, shapes, strict=False))
        return Sizes(shapes, trace.shapes()) if grown else Sizes([], {})

    @contextmanager
    def repeatable(self) -> Iterator[None]:
        """Put back all random states, and the modes of torch that runs need, in the end."""
        default = torch.get_default_dtype()
        try:
            with preserved(self.model, *self.input), torch.inference_mode(False), torch.enable_grad():
                torch.set_default_dtype(self.dtype)  # for tensors that a forward makes
                yield
        finally:
            torch.set_default_dtype(default)
