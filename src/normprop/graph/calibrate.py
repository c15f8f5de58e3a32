"""One rehearsal on noise: how far a deep network departs from its prediction, corrected layer by layer.

Propagation takes channels and positions as uncorrelated and Gaussian. A layer's error is a few per cent, but errors
multiply with depth, and activations such as SiLU, steeper for larger inputs, amplify them: EfficientNet-B0 ends 40
times too large. So a fresh conversion sends noise of the predicted input moments through the network once and sets, in
the order of the forward pass, one number for each layer: the ratio of the variance that it meets to the predicted one.
No data is involved, and a sample's output still depends on it alone. Where samples differ so much that a
deviation is not known to 5 %, as with stochastic depth before SiLU, the rehearsal is repeated with more of them.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normprop.errors import ConversionError
from normprop.graph.capture import Inputs, arguments, in_training
from normprop.graph.random_state import preserved
from normprop.moments import Moments
from normprop.nn import Predicted, PredictedLayer, PredictedLinear

Rehearsal = Literal["noise", "input"] | None


@torch.no_grad()
def calibrate(
    net: nn.Module, x: Inputs, on: Rehearsal = "noise", given: Moments | Sequence[Moments] | None = None
) -> list[tuple[str, float]]:
    """Set the correction of every layer that normalises by prediction.

    Args:
        net: the converted network; its other state stays as it is.
        x: example input.
        on: "noise" for Gaussian noise of the input's shape, "input" for the example itself.
        given: moments of the noise, by input.

    Returns:
        Path and correction of every layer, in the order in which they were reached.

    Raises:
        ConversionError: if a layer's output is not finite.

    Example:
        >>> from normprop.nn import PredictedNorm
        >>> net = nn.Sequential(PredictedNorm(2))
        >>> x = torch.tensor([[-2.0, 2.0], [2.0, -2.0]])
        >>> [(path, round(value, 3)) for path, value in calibrate(net, x, "input")]
        [('0', 4.0)]
    """
    if on == "input":
        return _rehearse(net, x).corrections
    before = [
        (module.correction, module.correction.clone()) for module in net.modules() if isinstance(module, Predicted)
    ]
    size = sum(leaf.numel() for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor))
    noise = _enlarged(x, _FEW // max(size, 1))
    while True:
        with preserved(net, seed=0):
            done = _rehearse(net, _noise(noise, given))
        more = min((done.error / _ERROR) ** 2, _LARGEST / max(done.largest, 1))
        larger = _enlarged(x, math.ceil(more * _samples(noise) / max(_samples(x), 1)))
        if more <= 1.0 or _samples(larger) <= _samples(noise):
            return done.corrections
        noise = larger
        for correction, value in before:
            correction.copy_(value)


class _Done(NamedTuple):
    """What one pass found."""

    corrections: list[tuple[str, float]]
    error: float  # largest standard error of a layer's variance over samples, as its fraction
    largest: int  # elements of the largest output of a layer


def _rehearse(net: nn.Module, x: Inputs) -> _Done:
    """Correct every layer in one pass."""
    paths = {module: path for path, module in net.named_modules() if isinstance(module, Predicted)}
    reached: dict[str, float] = {}
    samples = _samples(x)
    errors, sizes = [0.0], [0]

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        path = paths[module]
        if path in reached:
            return output
        axis = output.ndim - 1 if isinstance(module, PredictedLinear) else 1
        gain = module.gain if isinstance(module, PredictedLayer) else module.weight
        power = 1.0 if gain is None else float(gain.double().square().mean())
        others = [i for i in range(output.ndim) if i != axis]
        sizes.append(output.numel())
        squares = (output - output.mean(others, keepdim=True)).square_()
        rows = squares.reshape(samples if samples and len(output) % samples == 0 else 1, -1)
        each = rows.mean(1, dtype=torch.promote_types(rows.dtype, torch.float32)).double()
        met = float(each.mean())
        if not math.isfinite(met):
            raise ConversionError(f"{path}: after conversion its output in the rehearsal is not finite")
        ratio = met / power if power > 0.0 else 0.0
        if 1e-12 < ratio < 1e12:
            if len(each) > 1:
                errors.append(float(each.std()) / met / samples**0.5)
        else:  # silent layers, such as a branch that begins at zero, stay as they are
            ratio = 1.0
        module.correction.mul_(ratio)
        reached[path] = float(module.correction)
        scale = ratio**-0.5
        corrected: Tensor = output * scale
        if module.bias is None:
            return corrected
        bias = module.bias.reshape([-1 if i == axis else 1 for i in range(output.ndim)])
        return corrected.add_(bias * (1.0 - scale))

    handles = [module.register_forward_hook(hook) for module in paths]
    try:
        with in_training(net), _buffers_kept(net), preserved(net, seed=0):
            args, kwargs = arguments(x)
            net(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return _Done(list(reached.items()), max(errors), max(sizes))


@contextmanager
def _buffers_kept(net: nn.Module) -> Iterator[None]:
    """Put buffers back, but for the corrections."""
    corrections = {id(module.correction) for module in net.modules() if isinstance(module, Predicted)}
    buffers = [(value, value.clone()) for value in net.buffers() if id(value) not in corrections]
    try:
        yield
    finally:
        for value, before in buffers:
            value.copy_(before)


_FEW = 2**20  # values of input that make the variance of a layer's output known to a per cent or so, mostly
_ERROR = 0.1  # of a variance, 5 % of a deviation
_LARGEST = 2**28  # elements of an output, the memory that a rehearsal may ask for


def _samples(x: Inputs) -> int:
    """Length of the first axis that all inputs share, else 0."""
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)}
    return sizes.pop() if len(sizes) == 1 else 0


def _enlarged(x: Inputs, times: int) -> Inputs:
    """The example repeated, up to 256 samples; a model whose inputs have no common first axis gets it as it is."""
    samples = _samples(x)
    times = min(times, 256 // samples) if samples else 1
    if times < 2:
        return x
    return pytree.tree_map(lambda leaf: torch.cat([leaf] * times) if isinstance(leaf, Tensor) else leaf, x)  # type: ignore[no-any-return]


def _noise(x: Inputs, given: Moments | Sequence[Moments] | None) -> Inputs:
    """Gaussian noise of the shapes of an example; whole numbers stay."""
    position = -1

    def draw(leaf: Any) -> Any:
        nonlocal position
        if not isinstance(leaf, Tensor):
            return leaf
        position += 1
        if not leaf.is_floating_point():
            return leaf
        moments = given[position] if isinstance(given, Sequence) else given or Moments(0.0, 1.0)
        mean, std = (
            torch.as_tensor(part, dtype=leaf.dtype, device=leaf.device) for part in (moments.mean, moments.std)
        )
        size = [-1 if axis == 1 else 1 for axis in range(leaf.ndim)]
        mean, std = (part.reshape(size) if part.ndim == 1 else part for part in (mean, std))
        return mean + std * torch.randn_like(leaf)

    noise: Inputs = pytree.tree_map(draw, x)
    return noise
