r"""``reg``: RegBN, which removes from the features f of one modality what is linear in the features g of another.

.. math:: f_r = f - g \hat W, \quad \hat W = (g^T g + \lambda I)^{-1} g^T f, \quad
    \text{output } (LN(f_r), LN(g))

f is (N, d_f) and g is (N, d_g), not centred, no intercept. The statistic :math:`\hat W` is taken over the batch; the
layer norm LN over the features of each sample. Training uses the batch's own :math:`\hat W` and moves a running W
towards it; evaluation uses the running W, so that samples no longer depend on each other. A batch of one sample, which
would always be explained whole, is refused in training.

:math:`\lambda` solves :math:`\sum_i (a_i / (s_i^2 + \lambda))^2 = 1`, where s are the singular values of g and

- ``constraint="code"``: :math:`a_i = s_i^2`, what the public code solves; f plays no part;
- ``constraint="paper"``: :math:`a_i = s_i \|u_i^T f\|`, which is :math:`\|\hat W\|_F = 1`, the paper's constraint as
  we know it (its full text was not at hand);
- ``constraint="none"``: nothing, :math:`\lambda = 0`. Ours, for what follows.

Under "code" the squares of the shares that are removed in g's singular directions add up to 1: one direction's worth.
Where features are not centred, as after a ReLU, their mean takes most of it and little else of what f and g share is
removed; "paper" does much the same unless f is large. Plain least squares removes all that is linear, but wants batches
of many more samples than g has features.

Where no :math:`\lambda > 0` does (g of rank 1 under "code"; f so small that least squares itself has
:math:`\|\hat W\|_F \le 1` under "paper") it is 0, plain least squares, of least norm if g has not full rank.

Gradients flow to f and g through :math:`\hat W` as a function of both at fixed :math:`\lambda`, as in the public code.
There they pass the singular vectors and are NaN where singular values coincide; the pseudo-inverse used here has a
derivative without differences of singular values. All is computed in float64.

For networks with a single stream ``block("reg", dims)`` and ``create("reg", ...)`` take the first half of the channels
for f and the second for g, and every position of every sample for a row: see :class:`ChannelRegression`. That reading
is ours, no paper claims it. The paper's use is one :class:`RegBN` for a pair of modalities.

Use it when two branches of different inputs share something that is not wanted twice. Do not use it when they are
independent, with more features than a batch has samples, or in hope of removing a confounder from the network: it is
removed from f alone, g keeps it whole.

Source:
    Ghahremani & Wachinger 2023, RegBN; the authors' public code for "code", for layer norm and for the running W.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.errors import ConfigError
from normprop.fused import at_least_float32
from normprop.norms.plain import of_layers
from normprop.norms.ridge import Constraint, penalty, ridge


class Regression(nn.Module):
    r"""The residual of ridge regression on a batch, with a running W for evaluation.

    The running W takes steps whose length is adapted as Adam's, by one number for the whole matrix: with
    :math:`e = mean|W - \hat W|`, moving averages m of e and v of e^2 and their bias corrections,
    :math:`\eta = \mu \hat m / (\sqrt{\hat v} + 10^{-8})` and :math:`W \leftarrow (1 - \eta) W + \eta \hat W`. The first
    steps have :math:`\eta \approx \mu`: after n of them W is :math:`1 - (1 - \mu)^n` of the way, and training should
    be some hundred steps long. The correction counts steps; the public code counts epochs though it updates at every
    step, which makes steps of the first epoch up to twice as long.

    Args:
        f_features: d_f.
        g_features: d_g.
        constraint: "code", "paper" or "none", see the module.
        momentum: mu.
        betas: weights of the old values in m and v.

    Shape:
        (N, f_features) and (N, g_features) to (N, f_features), float64.

    Raises:
        ConfigError: for settings that cannot work.
        ValueError: for rows of other sizes, or fewer than two of them in training.

    Source:
        Ghahremani & Wachinger 2023, and the authors' public code for the constants.

    Example:
        >>> g = torch.randn(50, 1)
        >>> Regression(2, 1)(torch.cat([g, 2 * g], 1), g).abs().max() < 1e-6
        tensor(True)
    """

    running_weight: Tensor
    error_mean: Tensor
    error_square: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        f_features: int,
        g_features: int,
        constraint: Constraint = "code",
        momentum: float = 0.02,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        super().__init__()
        if f_features < 1 or g_features < 1:
            raise ConfigError(f"norms.reg: needs features on both sides, got {f_features} of f and {g_features} of g")
        if constraint not in ("code", "paper", "none"):
            raise ConfigError(f"norms.reg: constraint must be 'code', 'paper' or 'none', got {constraint!r}")
        if not 0 <= momentum <= 1 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"norms.reg: momentum in [0, 1] and betas in [0, 1) expected, got {momentum} and {betas}")
        self.constraint: Constraint = constraint
        self.momentum = momentum
        self.betas = betas
        self.register_buffer("running_weight", torch.zeros(g_features, f_features))
        self.register_buffer("error_mean", torch.zeros(()))
        self.register_buffer("error_square", torch.zeros(()))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    def forward(self, f: Tensor, g: Tensor) -> Tensor:
        """Return f - g W."""
        sizes = (len(g), self.running_weight.shape[1]), (len(f), self.running_weight.shape[0])
        if (f.shape, g.shape) != sizes:
            raise ValueError(
                f"norms.reg: expected as many rows of {sizes[0][1]} features of f and {sizes[1][1]} of g, got "
                f"{list(f.shape)} and {list(g.shape)}"
            )
        f, g = f.double(), g.double()
        if not (self.training and len(f)):  # an empty batch has nothing to regress on
            return f - g @ self.running_weight.double()
        if len(f) < 2:
            raise ValueError(
                f"norms.reg: expected more than 1 sample (or position of one) to regress on when training, got {len(f)}"
            )
        weight = ridge(g, f, penalty(g, f, self.constraint))
        self._track(weight.detach())
        return f - g @ weight

    @torch.no_grad()
    def _track(self, weight: Tensor) -> None:
        """Move the running W towards that of a batch."""
        first, second = self.betas
        error = (weight - self.running_weight).abs().mean()
        self.num_batches_tracked += 1
        self.error_mean.copy_(first * self.error_mean + (1 - first) * error)
        self.error_square.copy_(second * self.error_square + (1 - second) * error.square())
        count = self.num_batches_tracked.double()
        mean = self.error_mean.double() / (1 - first**count)
        square = self.error_square.double() / (1 - second**count)
        step = self.momentum * mean / (square.sqrt() + 1e-8)
        self.running_weight.copy_(self.running_weight.double().lerp(weight, step))

    def extra_repr(self) -> str:
        """Sizes and settings."""
        g_features, f_features = self.running_weight.shape
        return f"{f_features}, {g_features}, constraint={self.constraint!r}, momentum={self.momentum}"


class RegBN(nn.Module):
    """Features of one modality without what is linear in those of another, both normalised per sample.

    Put one where two branches are joined.

    Args:
        f_features: features of a sample of f, all axes but the first multiplied.
        g_features: the same of g.
        constraint: "code", "paper" or "none", see the module.
        normalize_output: whether a layer norm without gain and bias over all features of a sample follows.
        momentum: of the running W, see :class:`Regression`.
        betas: of the running W.

    Shape:
        (N, *f) and (N, *g) to the same.

    Raises:
        ConfigError: for settings that cannot work, such as a layer norm of one feature, which is always 0.
        ValueError: for inputs of other sizes, or a batch of 1 in training.

    Source:
        Ghahremani & Wachinger 2023.

    Example:
        >>> f, g = RegBN(8 * 4 * 4, 10)(torch.randn(20, 8, 4, 4), torch.randn(20, 10))
        >>> f.shape, g.shape
        (torch.Size([20, 8, 4, 4]), torch.Size([20, 10]))
    """

    def __init__(
        self,
        f_features: int,
        g_features: int,
        constraint: Constraint = "code",
        normalize_output: bool = True,
        momentum: float = 0.02,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        super().__init__()
        if normalize_output and 1 in (f_features, g_features):
            raise ConfigError(
                "norms.reg: the layer norm of a single feature is always 0; give f and g at least 2 features, or set "
                "normalize_output=False"
            )
        self.regression = Regression(f_features, g_features, constraint, momentum, betas)
        self.normalize_output = normalize_output

    def forward(self, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual of f, and g."""
        residual = self.regression(f.flatten(1), g.flatten(1)).to(at_least_float32(f).dtype).reshape(f.shape)
        if not self.normalize_output:
            return residual.to(f.dtype), g
        return _per_sample(residual).to(f.dtype), _per_sample(at_least_float32(g)).to(g.dtype)

    def extra_repr(self) -> str:
        """Whether the outputs are normalised."""
        return f"normalize_output={self.normalize_output}"


def _per_sample(input: Tensor) -> Tensor:
    """Layer norm over all axes but the first."""
    return F.layer_norm(input, input.shape[1:])


class ChannelRegression(nn.Module):
    """RegBN inside one stream: the first half of the channels regressed on the second half. Our reading, not a paper's.

    A row of the regression is one position of one sample and its columns are the channels, the reading that commutes
    with translations. As in :class:`RegBN` the residual and the second half then get a layer norm each, over channels
    and space of a sample; a gain and a bias per channel follow. Of an odd number of channels the first half is the
    smaller one.

    Args:
        dims: spatial dimensions, 0 for features.
        num_features: channels, at least 2; at least 4 for ``dims=0``, where the layer norm of a half of one is 0.
        constraint: "code", "paper" or "none", see the module.

    Shape:
        (N, C, *space) to the same.

    Raises:
        ConfigError: for too few channels.
        ValueError: for fewer than two positions in a training batch.

    Source:
        Ours, after Ghahremani & Wachinger 2023.

    Example:
        >>> ChannelRegression(2, 8)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])
    """

    def __init__(self, dims: int, num_features: int, constraint: Constraint = "code") -> None:
        super().__init__()
        least = 2 if dims else 4
        if num_features < least:
            raise ConfigError(
                f"norms.reg: half of the channels is regressed on the other half and then normalised; with dims={dims} "
                f"that takes at least {least} channels, got {num_features}"
            )
        self.sizes: Sequence[int] = (num_features // 2, num_features - num_features // 2)
        self.regression = Regression(*self.sizes, constraint)
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, input: Tensor) -> Tensor:
        """Regress, normalise, scale and shift."""
        value = at_least_float32(input)
        f, g = value.movedim(1, -1).split(self.sizes, -1)
        residual = self.regression(f.flatten(0, -2), g.flatten(0, -2)).to(value.dtype).reshape(f.shape)
        halves = [_per_sample(half.movedim(-1, 1)) for half in (residual, g)]
        shape = (-1, *[1] * (input.ndim - 2))
        return torch.addcmul(self.bias.view(shape), torch.cat(halves, 1), self.weight.view(shape)).to(input.dtype)


METHODS = {"reg": of_layers("Ghahremani & Wachinger 2023, RegBN", ChannelRegression)}
