"""NormProp convolutions in one, two and three dimensions.

One filter spans ``in_channels / groups`` channels and the kernel. Zero padding pads with the mean of a normalised
input.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from normprop.nn.layer import NormPropLayer
from normprop.prepared import Convolution


class _ConvLayer(NormPropLayer):
    """The linear map, shared by the three dimensions."""

    _reversed_padding_repeated_twice: list[int]  # torch's: before and after, last axis first
    padding_mode: Any
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._ndims = cls._spatial_dims + 1, cls._spatial_dims + 2

    @property
    def _own_padding(self) -> tuple[int, ...] | None:
        """Zeros on either side that the convolution adds by itself, or ``None``."""
        sides = self._reversed_padding_repeated_twice
        padding = tuple(sides[-2::-2])
        return padding if self.padding_mode == "zeros" and padding == tuple(sides[::-2]) else None

    @property
    def _convolution(self) -> Convolution:
        padding = self._own_padding or (0,) * self._spatial_dims
        return Convolution(self.stride, padding, self.dilation, self.groups)

    def _batched(self, input: Tensor) -> Tensor:
        if input.ndim == self._spatial_dims + 1:
            input = input.unsqueeze(0)
        if self._own_padding is None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=mode)
        return input

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(input, weight, bias)  # type: ignore[operator]
        return output


class Conv1d(_ConvLayer, nn.Conv1d):
    r"""One-dimensional convolution with Normalization Propagation.

    .. math:: o_i = (f(g_i \, W_i * x / \|W_i\| + b_i) - c_2) / c_1

    Args: those of :class:`torch.nn.Conv1d`, then ``activation``, ``center``, ``moments``, ``gain`` and
        ``orthogonal`` as in :class:`normprop.nn.Linear`, per filter.

    Shape:
        (N, in_channels, L) or without N, to the same with out_channels.

    Raises:
        ConfigError, MomentError: as :class:`normprop.nn.Linear`.

    Source:
        Arpit et al. 2016, equations 11 and 12.

    Example:
        >>> import torch
        >>> Conv1d(3, 6, 3, padding=1, activation="relu")(torch.randn(1, 3, 8)).shape
        torch.Size([1, 6, 8])
    """

    _spatial_dims = 1


class Conv2d(_ConvLayer, nn.Conv2d):
    r"""Two-dimensional convolution with Normalization Propagation.

    .. math:: o_i = (f(g_i \, W_i * x / \|W_i\| + b_i) - c_2) / c_1

    Args: those of :class:`torch.nn.Conv2d`, then ``activation``, ``center``, ``moments``, ``gain`` and
        ``orthogonal`` as in :class:`normprop.nn.Linear`, per filter.

    Shape:
        (N, in_channels, H, W) or without N, to the same with out_channels.

    Raises:
        ConfigError, MomentError: as :class:`normprop.nn.Linear`.

    Source:
        Arpit et al. 2016, equations 11 and 12.

    Example:
        >>> import torch
        >>> Conv2d(3, 6, 3, padding=1, activation="relu")(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 6, 8, 8])
    """

    _spatial_dims = 2


class Conv3d(_ConvLayer, nn.Conv3d):
    r"""Three-dimensional convolution with Normalization Propagation.

    .. math:: o_i = (f(g_i \, W_i * x / \|W_i\| + b_i) - c_2) / c_1

    Args: those of :class:`torch.nn.Conv3d`, then ``activation``, ``center``, ``moments``, ``gain`` and
        ``orthogonal`` as in :class:`normprop.nn.Linear`, per filter.

    Shape:
        (N, in_channels, D, H, W) or without N, to the same with out_channels.

    Raises:
        ConfigError, MomentError: as :class:`normprop.nn.Linear`.

    Source:
        Arpit et al. 2016, equations 11 and 12.

    Example:
        >>> import torch
        >>> Conv3d(3, 6, 3, padding=1, activation="relu")(torch.randn(1, 3, 8, 8, 8)).shape
        torch.Size([1, 6, 8, 8, 8])
    """

    _spatial_dims = 3
