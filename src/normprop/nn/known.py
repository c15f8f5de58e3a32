"""What one optimiser step finds out for all layers at once, known until the parameters change.

The unit-norm constraint leaves filters centred and of length 1, so the forward passes before the next step need not
measure them; and the constants of ReLU layers, with live moments some twenty operators on tiny tensors, are worked out
for all layers together. What is known belongs to tensor objects and their versions, which every operator that writes to
them raises: a copy, a loaded state, a changed parameter are unknown. Only writing through ``.data`` raises no version.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, cat

from normprop.nn.known_moments import KnownMoments
from normprop.prepared import Constants, Prepared


class Known(NamedTuple):
    """What was prepared for a weight, a gain and a bias as they were; moments are those of other activations than ReLU.

    Without moments what was prepared is the whole layer.
    """

    weight: Tensor
    gain: Tensor
    bias: Tensor | None
    versions: tuple[int, int, int]
    prepared: Prepared
    moments: KnownMoments | None

    def holds(self, weight: Tensor, gain: Tensor, bias: Tensor | None) -> bool:
        """Whether these are the parameters, unchanged."""
        return (
            self.weight is weight
            and self.gain is gain
            and self.bias is bias
            and self.versions == (weight._version, gain._version, 0 if bias is None else bias._version)
        )


def know(
    weight: Tensor, gain: Tensor, bias: Tensor | None, prepared: Prepared, moments: KnownMoments | None = None
) -> Known:
    """Note what was prepared for parameters as they are now.

    Args:
        weight: (out, in / groups, *kernel).
        gain: gamma, (out,).
        bias: beta, (out,), or ``None``.
        prepared: what it is.
        moments: what follows, if that is not all.

    Returns:
        The note.

    Example:
        >>> import torch
        >>> parameters = torch.eye(2), torch.ones(2), torch.zeros(2)
        >>> known = know(*parameters, None)
        >>> known.holds(*parameters), known.holds(parameters[0].add_(1.0), *parameters[1:])
        (True, False)
    """
    versions = weight._version, gain._version, 0 if bias is None else bias._version
    return Known(weight, gain, bias, versions, prepared, moments)


def constants_together(
    parameters: Sequence[tuple[Tensor, Tensor | None]], work_out: Callable[[Tensor, Tensor], Constants]
) -> list[Constants]:
    """Work out the constants of many layers together.

    Args:
        parameters: gain and bias of each layer, (out,), all on one device and of one type.
        work_out: function of gain and bias, elementwise.

    Returns:
        Constants of each.

    Example:
        >>> import torch
        >>> from normprop.prepared import live_constants
        >>> [constants.mean.shape for constants in constants_together([(torch.ones(2), None)], live_constants)]
        [torch.Size([2])]
    """
    gains = cat([gain.detach() for gain, _ in parameters])
    biases = cat([gain.new_zeros(gain.shape) if bias is None else bias.detach() for gain, bias in parameters])
    sizes = [len(gain) for gain, _ in parameters]
    scale, shift, mean, slopes = work_out(gains, biases)
    means = mean.split(sizes) if isinstance(mean, Tensor) else [mean] * len(sizes)
    tangents: Iterable[Any] = [slopes] * len(sizes)
    if isinstance(slopes, tuple):
        tangents = zip(*(slope.split(sizes) for slope in slopes), strict=True)
    return [Constants(*parts) for parts in zip(scale.split(sizes), shift.split(sizes), means, tangents, strict=True)]
