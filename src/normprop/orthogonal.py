r"""Draw the filters of a layer towards right angles.

That a pre-activation has variance 1 takes inputs that are not correlated. Filters that share a direction make the next
layer's inputs correlated, its filters turn towards what these have in common, and variances grow from layer to layer,
tenfold within a hundred steps at a high rate. Orthogonal filters pass uncorrelated inputs on as they are: the error
bound of the paper's proposition 1 is that of the filters' coherence.
"""

import torch
from torch import Tensor

from normprop.fused import at_least_float32
from normprop.moments.linear import as_matrices, from_matrices


@torch.no_grad()
def orthogonalize_(weight: Tensor, *, center: bool = False, groups: int = 1, transposed: bool = False) -> None:
    r"""Take one step, in place, towards filters of length 1 at right angles to each other.

    .. math:: W \leftarrow W + \beta (W - W W^\top W / r), \quad
        \beta = 1 / (1 + \|W W^\top\|_\infty / r), \quad r = \max(1, \mathrm{filters} / \mathrm{rank})

    A singular value s goes to :math:`s (1 + \beta - \beta s^2 / r)`, towards :math:`\sqrt r`; the maximum row sum
    bounds :math:`s^2` and keeps it from being overshot past 0. More filters than the rank (fan-in, one less with
    ``center``) cannot be orthogonal: they become a tight frame, in which no direction is preferred. A filter of 0
    stays 0.

    Args:
        weight: (out, in / groups, *kernel), or (in, out / groups, *kernel) of a transposed convolution; filters of a
            length near 1, of mean 0 with ``center``.
        center: whether the filters are centred.
        groups: of the convolution; filters of one group alone share inputs.
        transposed: whether the layout is that of a transposed convolution.

    Source:
        Ours; the iteration: Bjorck and Bowie 1971, Cisse et al. 2017 (Parseval networks).

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
        >>> for _ in range(12):
        ...     orthogonalize_(weight)
        >>> torch.allclose(weight @ weight.T, torch.eye(2), atol=1e-3)
        True
    """
    rows = as_matrices(at_least_float32(weight), groups, transposed)
    count, fan_in = rows.shape[1:]
    redundancy = max(1.0, count / max(1, fan_in - center))
    wide = count <= fan_in
    gram = rows @ rows.mT if wide else rows.mT @ rows
    step = 1 / (1 + gram.abs().sum(2).amax(1).view(-1, 1, 1) / redundancy)
    cubed = gram @ rows if wide else rows @ gram
    moved = rows * (1 + step) - cubed * (step / redundancy)
    weight.copy_(from_matrices(moved, weight.shape, transposed))
