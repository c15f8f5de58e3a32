"""NormProp transposed convolutions in one, two and three dimensions.

One filter spans ``in_channels / groups`` channels and the kernel. With strides s an output position is reached by
1 / prod(s) of a filter's taps on average over the output's phases, so filters are given the length sqrt(prod(s)).
"""

from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from normprop.nn.layer import NormPropLayer


class _TransposedLayer(NormPropLayer):
    """The transposed linear map, shared by the three dimensions."""

    _transposed = True
    _conv_transpose: ClassVar[Callable[..., Tensor]]

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor, output_size: list[int] | None = None) -> Tensor:
        output_padding = self._output_padding(  # type: ignore[operator]
            input, output_size, self.stride, self.padding, self.kernel_size, self._spatial_dims, self.dilation
        )
        return self._conv_transpose(
            input, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )


class ConvTranspose1d(_TransposedLayer, nn.ConvTranspose1d):
    r"""One-dimensional transposed convolution with Normalization Propagation.

    Args: those of :class:`torch.nn.ConvTranspose1d`, then ``activation``, ``center``, ``moments``, ``gain`` and
        ``orthogonal`` as in :class:`normprop.nn.Linear`, per filter.

    Shape:
        (N, in_channels, L) or without N, to the same with out_channels and torch's output size.

    Raises:
        ConfigError, MomentError: as :class:`normprop.nn.Linear`.

    Source:
        Arpit et al. 2016, equations 11 and 12, for the transposed map.

    Example:
        >>> import torch
        >>> ConvTranspose1d(3, 6, 2, stride=2, activation="relu")(torch.randn(1, 3, 4)).shape
        torch.Size([1, 6, 8])
    """

    _spatial_dims = 1
    _conv_transpose = staticmethod(F.conv_transpose1d)


class ConvTranspose2d(_TransposedLayer, nn.ConvTranspose2d):
    r"""Two-dimensional transposed convolution with Normalization Propagation.

    Args: those of :class:`torch.nn.ConvTranspose2d`, then ``activation``, ``center``, ``moments``, ``gain`` and
        ``orthogonal`` as in :class:`normprop.nn.Linear`, per filter.

    Shape:
        (N, in_channels, H, W) or without N, to the same with out_channels and torch's output size.

    Raises:
        ConfigError, MomentError: as :class:`normprop.nn.Linear`.

    Source:
        Arpit et al. 2016, equations 11 and 12, for the transposed map.

    Example:
        >>> import torch
        >>> ConvTranspose2d(3, 6, 2, stride=2, activation="relu")(torch.randn(1, 3, 4, 4)).shape
        torch.Size([1, 6, 8, 8])
    """

    _spatial_dims = 2
    _conv_transpose = staticmethod(F.conv_transpose2d)


class ConvTranspose3d(_TransposedLayer, nn.ConvTranspose3d):
    r"""Three-dimensional transposed convolution with Normalization Propagation.

    Args: those of :class:`torch.nn.ConvTranspose3d`, then ``activation``, ``center``, ``moments``, ``gain`` and
        ``orthogonal`` as in :class:`normprop.nn.Linear`, per filter.

    Shape:
        (N, in_channels, D, H, W) or without N, to the same with out_channels and torch's output size.

    Raises:
        ConfigError, MomentError: as :class:`normprop.nn.Linear`.

    Source:
        Arpit et al. 2016, equations 11 and 12, for the transposed map.

    Example:
        >>> import torch
        >>> ConvTranspose3d(3, 6, 2, stride=2, activation="relu")(torch.randn(1, 3, 4, 4, 4)).shape
        torch.Size([1, 6, 8, 8, 8])
    """

    _spatial_dims = 3
    _conv_transpose = staticmethod(F.conv_transpose3d)
