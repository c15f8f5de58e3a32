"""Residual sums that keep mean 0 and variance 1."""

from torch import Tensor, nn

from normprop.functional import normalized_sum
from normprop.moments import Activation, Moments
from normprop.nn.layer import NormPropLayer, standard_moments


def output_moments(module: nn.Module | None) -> Moments:
    """Predict the moments of a module's output, for an input of mean 0 and variance 1.

    Known without looking at data for NormProp layers, for residual blocks, and for what passes through one of them or
    nothing at all (the last module of an ``nn.Sequential``).

    Args:
        module: the module; ``None`` for none.

    Returns:
        Mean and variance, numbers or per-channel tensors in the graph.

    Example:
        >>> from normprop.nn import Conv2d
        >>> output_moments(Conv2d(2, 4, 3, activation="relu"))
        Moments(mean=0.0, var=1.0...)
    """
    if isinstance(module, nn.Sequential):
        return output_moments(module[-1] if len(module) else None)
    if isinstance(module, NormPropLayer):
        return module.output_moments()
    return Moments(0.0, 1.0)


class Residual(nn.Module):
    r"""Residual block whose sum keeps mean 0 and variance 1: :math:`o = (f((s + r) / \sigma) - c_2) / c_1`.

    s is the skip path, r the branch. Both are taken as independent: m and :math:`\sigma^2` are the sums of their
    predicted means and variances, and c2, c1 those of f(N(m / sigma, 1)).

    Args:
        branch: module that computes r; ends in a NormProp layer without activation.
        shortcut: module on the skip path (a projection), or ``None`` for the identity.
        activation: f, or ``None`` for none.
        spatial_dims: number of axes after the channels (2 for images, 0 for features).

    Shape:
        That of the branch's input and output.

    Source:
        Ours; the paper has no residual networks.

    Example:
        >>> import torch
        >>> from normprop.nn import Conv2d
        >>> branch = nn.Sequential(Conv2d(4, 4, 3, padding=1, activation="relu"), Conv2d(4, 4, 3, padding=1))
        >>> Residual(branch, activation="relu")(torch.randn(1, 4, 8, 8)).shape
        torch.Size([1, 4, 8, 8])
    """

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        activation: Activation = "relu",
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.activation = activation
        self.spatial_dims = spatial_dims
        standard_moments(activation)  # refuses at once what cannot be integrated

    def forward(self, input: Tensor) -> Tensor:
        """Add branch and skip path, then apply the activation and its normalisation."""
        skip = input if self.shortcut is None else self.shortcut(input)
        moments = [output_moments(self.shortcut), output_moments(self.branch)]
        return normalized_sum([skip, self.branch(input)], moments, self.activation, self.spatial_dims)

    def extra_repr(self) -> str:
        """The activation, where it is not a module shown on its own."""
        return "" if isinstance(self.activation, nn.Module) else f"activation={self.activation}"
