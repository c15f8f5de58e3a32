"""NormProp's fully connected layer."""

import torch.nn.functional as F
from torch import Tensor, nn

from normprop.nn.layer import NormPropLayer


class Linear(NormPropLayer, nn.Linear):
    r"""Fully connected layer with Normalization Propagation.

    .. math:: o_i = (f(g_i \, W_i x / \|W_i\| + b_i) - c_2) / c_1

    Args:
        in_features, out_features, bias, device, dtype: as in :class:`torch.nn.Linear`.
        activation: f: a name, module, elementwise callable, or ``None`` for none (then nothing follows the bias).
        center: subtract the mean of each weight row before normalising it.
        moments: ``"live"``: c2, c1 are mean and standard deviation of f(N(b_i, g_i^2)), per unit and in the graph;
            ``"fixed"``: those of f(N(0, 1)), one number each for the layer, as in the paper.
        gain: initial gain g, a number or ``"jacobian"`` for c1 / sqrt(E[f'^2]), which keeps gradients' size.
        orthogonal: whether the constraint of training (:func:`normprop.training.unit_norm.constrain`) draws the filters
            towards right angles, if there is an activation, and bounds how far an update turns them; the layer's own
            function does not depend on it. ``False`` to keep trained filters.

    Shape:
        (..., in_features) to (..., out_features).

    Raises:
        ConfigError: for settings that cannot work.
        MomentError: if the activation's moments cannot be integrated reliably.

    Source:
        Arpit et al. 2016, equations 9 and 12; centring and live moments are ours.

    Example:
        >>> import torch
        >>> layer = Linear(4, 2, activation="relu")
        >>> layer(torch.randn(1, 4)).shape
        torch.Size([1, 2])
    """

    _ndims = range(1, 26)

    def _batched(self, input: Tensor) -> Tensor:
        return input if input.ndim == 2 else input.reshape(-1, input.shape[-1])

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(input, weight, bias)
