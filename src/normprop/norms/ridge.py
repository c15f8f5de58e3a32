r"""Ridge regression of one set of features on another, and the penalty that RegBN gives it.

.. math:: W = (g^T g + \lambda I)^{-1} g^T f, \quad \sum_i (a_i / (s_i^2 + \lambda))^2 = 1

Both are pure functions on a batch, g of shape (N, d_g) and f of shape (N, d_f); s are the singular values of g.

Source:
    Ghahremani & Wachinger 2023, RegBN.
"""

from typing import Literal

import torch
from torch import Tensor

Constraint = Literal["code", "paper", "none"]
"""``"code"``: a_i = s_i^2; ``"paper"``: a_i = s_i ||u_i^T f||, which is ||W||_F = 1; ``"none"``: lambda = 0."""

_PARTS, _ROUNDS = 64, 9  # 64^-9 = 2^-54: to the last bit of the bracket's length


def _gram(g: Tensor) -> Tensor:
    """The smaller one of g^T g and g g^T; a g that is not finite gives 0, because LAPACK refuses NaN."""
    gram = g @ g.mT if _wide(g) else g.mT @ g
    return torch.where(gram.isfinite().all(), gram, torch.zeros_like(gram))


def _wide(g: Tensor) -> bool:
    return g.shape[0] < g.shape[1]


def ridge(g: Tensor, f: Tensor, lam: Tensor | float = 0.0) -> Tensor:
    r"""Solve ridge regression, :math:`W = (g^T g + \lambda I)^{-1} g^T f`.

    Any number of samples and any rank will do: for :math:`\lambda = 0` it is the least-squares solution of least norm.
    Differentiable any number of times in all three arguments, equal singular values included (at :math:`\lambda = 0`
    where the rank does not change).

    Args:
        g: (N, d_g) regressors, best in float64: the condition number is squared.
        f: (N, d_f) what is regressed on them.
        lam: the penalty, zero or more.

    Returns:
        W, (d_g, d_f).

    Source:
        Ghahremani & Wachinger 2023.

    Example:
        >>> ridge(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [6.0]]), lam=5.0)
        tensor([[1.5000]])
    """
    gram = _gram(g)
    inverse = torch.linalg.pinv(gram + lam * torch.eye(len(gram), dtype=g.dtype, device=g.device), hermitian=True)
    # (g^T g + lam I)^-1 g^T = g^T (g g^T + lam I)^-1
    weight: Tensor = g.mT @ (inverse @ f) if _wide(g) else inverse @ (g.mT @ f)
    return weight


def solve_lambda(singular_values: Tensor, numerators: Tensor | None = None) -> Tensor:
    r"""Solve :math:`\sum_i (a_i / (s_i^2 + \lambda))^2 = 1` for :math:`\lambda \ge 0`, or return 0 if there is none.

    The sum falls with :math:`\lambda` and is at most 1 at :math:`\|a\|`, so the root is bracketed; each of a fixed
    number of rounds cuts the bracket into 64 parts and keeps the one with the root. If all s are equal and
    :math:`a_i = s^2`, the root is :math:`s^2 (\sqrt r - 1)`.

    Args:
        singular_values: s, (r,), zero or more.
        numerators: a, (r,), zero where s is; by default :math:`s_i^2`, the public code's choice.

    Returns:
        lambda, a scalar in float64 without gradient.

    Source:
        Ghahremani & Wachinger 2023, who search by L-BFGS.

    Example:
        >>> solve_lambda(torch.full((4,), 3.0)).round(decimals=9)
        tensor(9., dtype=torch.float64)
    """
    squares = singular_values.detach().double().square()
    a = squares if numerators is None else numerators.detach().double()
    squares = torch.where(a > 0, squares, 1.0)  # 0 / 0 is nothing to explain
    parts = torch.arange(_PARTS, dtype=a.dtype, device=a.device) / _PARTS
    low, width = a.new_zeros(()), torch.linalg.vector_norm(a)
    for _ in range(_ROUNDS):
        points = low + width * parts
        reached = (a / (squares + points.unsqueeze(1))).square().sum(1) >= 1
        low = torch.where(reached, points, low).amax()
        width = width / _PARTS
    return low


def penalty(g: Tensor, f: Tensor, constraint: Constraint = "code") -> Tensor:
    r"""Return RegBN's :math:`\lambda` for a batch.

    Args:
        g: (N, d_g) regressors.
        f: (N, d_f) what is regressed on them.
        constraint: see :data:`Constraint`.

    Returns:
        lambda, a scalar in float64 without gradient.

    Source:
        Ghahremani & Wachinger 2023.

    Example:
        >>> g = torch.eye(2)
        >>> penalty(g, 3 * g[:, :1]), penalty(g, 3 * g[:, :1], "paper")
        (tensor(0.4142, dtype=torch.float64), tensor(2., dtype=torch.float64))
    """
    g, f = g.detach().double(), f.detach().double()
    if constraint == "none":
        return g.new_zeros(())
    squares, basis = torch.linalg.eigh(_gram(g))
    # What rounding leaves of singular values that are zero is not rank.
    rounding = max(g.shape) * torch.finfo(g.dtype).eps
    s = torch.where(squares > rounding * squares[-1:], squares, 0.0).sqrt()
    if constraint == "code":
        return solve_lambda(s)
    explained = s.unsqueeze(1) * (basis.mT @ f) if _wide(g) else basis.mT @ (g.mT @ f)  # S U^T f
    return solve_lambda(s, torch.where(s > 0, torch.linalg.vector_norm(explained, dim=1), 0.0))
