r"""``kalman-batch`` and ``kalman-group``: Kalman Normalization, statistics filtered with a prior from the layer before.

.. math:: y = \gamma (x - \hat m) / \sqrt{\hat v + \epsilon} + \beta, \quad
    \hat m = p \mu + (1 - p) m, \quad \hat v = p \sigma^2 + (1 - p) S + p (1 - p) (m - \mu)^2

(m, S) are measured, (:math:`\mu, \sigma^2`) is the prior: what the previous block's filtered moments become on their
way through its activation and this block's weights (:mod:`normprop.norms.kalman_prior`). Gradients flow through it.

- axes: ``kalman-batch`` measures per channel over batch and space, or over each micro-batch of it; ``kalman-group`` per
  sample and group of channels, and mixes the priors of the group's channels.
- train: filtered moments; running averages of them for ``kalman-batch``. eval: ``kalman-batch`` uses the averages
  alone, ``kalman-group`` does the same as in training and keeps none.
- links: :func:`normprop.norms.finish` tells each block which one is before it. A block without one (the first of a
  network, or when nobody calls ``finish``) has no prior and is plain batch or group norm, and so does not run on one
  value per channel.
- where a prior's variance is on average 100 times the measured one or more, the measured statistics stand alone.

Two forms of the prior:

- ``"closed"``: the output of the block before, :math:`\gamma (x - \hat m) / \sqrt{\hat v + \epsilon} + \beta` with x of
  moments :math:`(\hat m, \hat v)`, is :math:`N(\beta, \gamma^2 \hat v / (\hat v + \epsilon))`; its activation and
  linear map follow in closed form. The filtered moments thus enter through the ratio alone, which is 1 for channels
  that vary: a layer's scale does not outlive its normalisation, and what is left to predict from is gain, bias and
  weights. p = 1 is then close to normalisation propagation with live moments.
- ``"sampled"``, of the public code: one Gaussian map :math:`N(\hat m, \hat v)` per set of samples, that is *before*
  normalisation, gain and bias, goes through activation and convolution and is measured. Its scale is right only
  while :math:`\hat v \approx \gamma^2` and :math:`\hat m \approx \beta`, and training draws random numbers.

Between blocks, poolings, dropout and ``nn.Identity`` are passed: max pooling gives the moments of the largest of k
independent Gaussians, before an activation that is taken not to decrease; dropout its exact moments; average pooling
leaves both moments, as in the public code (the true variance is between that and a k-th of it). After any other module,
a DataNorm or nn.Flatten among them, the chain starts anew. In a residual sum, means and variances of the paths add. The
public code pads the moments where channels are added, and misaligns them for several micro-batches; here a shortcut
that changes shape is a block.

Use it when batches are small, down to one image, and running averages are wanted in evaluation (``kalman-batch``) or
samples must not depend on each other (``kalman-group``). Do not use it where batches are large, as the prior then adds
cost and nothing else, nor where blocks are called out of order, in parts or recomputed (activation checkpointing): a
block needs the one before it in the same pass.

Source:
    Wang, Peng, Luo, Wang & Lin 2018; its public code for the filter, the limit of 100 and the sampled form. The closed
    form and ``kalman-group``'s prior are ours. The public code's running averages are of the first micro-batch, ours
    of all.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normprop.errors import ConfigError
from normprop.moments import Activation
from normprop.norms.classic import default_groups
from normprop.norms.kalman_filter import PRIOR_WEIGHT, KalmanBatchNorm, KalmanGroupNorm
from normprop.norms.kalman_pass import PASSED, Link, Output, Pass, Source, effect
from normprop.norms.kalman_prior import Gaussian, activated, closed, sampled
from normprop.norms.plain import ElementwiseActivation, PlainResidual, activation_module, linear_map, of_blocks
from normprop.norms.registry import Method

Prior = Literal["closed", "sampled"]
_PRIORS = {"closed": closed, "sampled": sampled}


def _spec(activation: nn.Module) -> Activation:
    """The activation as :mod:`normprop.moments` knows it."""
    if isinstance(activation, nn.Identity):
        return None
    return activation.activation if isinstance(activation, ElementwiseActivation) else activation


class KalmanBlock(nn.Module):
    r"""Linear map, norm with filtered statistics, activation.

    Args:
        linear: torch's linear map or convolution, without bias and with zero padding.
        norm: the norm of its outputs.
        activation: f, or ``None``.
        prior: ``"closed"`` or ``"sampled"``.

    Shape:
        (N, C_in, \*space) to (N, C_out, \*space').

    Raises:
        ConfigError: for an unknown prior, or the sampled one of a linear layer.
        ValueError: if its norm does, or the block before it was not called in the same pass.

    Source:
        Wang et al. 2018.

    Example:
        >>> block = KalmanBlock(nn.Conv2d(3, 4, 3, bias=False), KalmanBatchNorm(4), "relu")
        >>> block(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 4, 6, 6])
    """

    def __init__(
        self,
        linear: nn.Module,
        norm: KalmanBatchNorm | KalmanGroupNorm,
        activation: Activation = "relu",
        prior: Prior = "closed",
    ) -> None:
        super().__init__()
        if prior not in _PRIORS:
            raise ConfigError(f"norms.kalman: prior must be 'closed' or 'sampled', got {prior!r}")
        if prior == "sampled" and isinstance(linear, nn.Linear):
            raise ConfigError("norms.kalman: a linear layer has no space to sample a prior over; use prior='closed'")
        self.linear: Any = linear
        self.norm = norm
        self.activation = nn.Identity() if activation is None else activation_module(activation)
        self.prior = prior
        self.link: Link | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Map, normalise and activate a batch."""
        prior = None
        if self.link is not None and self.link.sources and self.norm.takes_prior:
            with torch.autocast(input.device.type, enabled=False):
                prior = self._predict(self.link.outputs()[0], tuple(input.shape[2:]))
        normalized, used = self.norm(self.linear(input), prior)
        if self.link is not None:
            self.link.current.write(self.link.station, Output(self._normalized(used), _spec(self.activation)))
        output: Tensor = self.activation(normalized)
        return output

    def _predict(self, before: Output, space: tuple[int, ...]) -> Gaussian:
        """The prior of this block's statistics."""
        conv = (
            {name: getattr(self.linear, name) for name in ("stride", "padding", "dilation", "groups")} if space else {}
        )
        return _PRIORS[self.prior](*before, self.linear.weight, space, **conv)

    def _normalized(self, used: Gaussian) -> Gaussian:
        """What this block's pre-activations are taken to be by the next."""
        if self.prior == "sampled":
            return used
        ratio = used.var / (used.var + self.norm.eps)
        return Gaussian(self.norm.bias.to(ratio.dtype).expand_as(ratio), self.norm.weight.square() * ratio)

    def extra_repr(self) -> str:
        """Form of the prior."""
        return f"prior={self.prior!r}"


class KalmanResidual(PlainResidual):
    """Residual block ``f(shortcut(x) + branch(x))`` that tells the next block the sum's moments.

    Means and variances of the paths add, and the sum is taken as Gaussian.

    Example:
        >>> branch = KalmanBlock(nn.Conv2d(4, 4, 3, padding=1, bias=False), KalmanBatchNorm(4), None)
        >>> KalmanResidual(branch)(torch.randn(2, 4, 5, 5)).shape
        torch.Size([2, 4, 5, 5])
    """

    link: Link | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Add the two paths and apply the activation."""
        output = super().forward(input)
        if self.link is not None:
            first, second = (activated(*path) for path in self.link.outputs())
            total = Gaussian(first.mean + second.mean, first.var + second.var)
            self.link.current.write(self.link.station, Output(total, _spec(self.activation)))
        return output


def link(network: nn.Module) -> None:
    """Tell every block of a network which block is before it.

    Follows ``nn.Sequential`` and :class:`KalmanResidual`; see the module's text for what may stand between blocks.

    Args:
        network: the network, changed in place. Linking again replaces the old links.

    Raises:
        ConfigError: if a block stands in the network twice.

    Example:
        >>> network = nn.Sequential(
        ...     KalmanBlock(nn.Linear(4, 4, bias=False), KalmanBatchNorm(4)),
        ...     KalmanBlock(nn.Linear(4, 4, bias=False), KalmanBatchNorm(4)),
        ... )
        >>> link(network)
        >>> network[1].link.sources
        (Source(station=0, effects=()),)
    """
    _follow(network, None, Pass())


def _follow(module: nn.Module, source: Source | None, current: Pass) -> Source | None:
    """Link the blocks of a module, given where its input comes from; return where its output does."""
    if isinstance(module, nn.Sequential):
        for child in module:
            source = _follow(child, source, current)
        return source
    if isinstance(module, PASSED):
        change = effect(module)
        return source._replace(effects=(*source.effects, change)) if source and change else source
    if isinstance(module, KalmanBlock):
        return _join(module, (source,) if source else (), current)
    if isinstance(module, KalmanResidual):
        module.link = None
        skip = source if module.shortcut is None else _follow(module.shortcut, source, current)
        branch = _follow(module.branch, source, current)
        return _join(module, (skip, branch), current) if skip and branch else None
    for child in module.children():
        _follow(child, None, current)
    return None


def _join(module: KalmanBlock | KalmanResidual, sources: tuple[Source, ...], current: Pass) -> Source:
    """Make a module the next station."""
    if module.link is not None and module.link.current is current:
        raise ConfigError("norms.kalman: a block stands in the network twice; give each place a block of its own")
    module.link = Link(current, current.stations, sources)
    current.stations += 1
    return Source(module.link.station)


def _block(
    norm: Callable[[int, int], KalmanBatchNorm | KalmanGroupNorm],
    prior: Prior,
    dims: int,
    in_channels: int,
    out_channels: int,
    *args: Any,
    activation: Activation = "relu",
    **kwargs: Any,
) -> nn.Module:
    """Build one block."""
    linear = linear_map(dims, in_channels, out_channels, *args, activation=activation, bias=False, **kwargs)
    return KalmanBlock(linear, norm(dims, out_channels), activation, prior)


def _method(norm: Callable[[int, int], KalmanBatchNorm | KalmanGroupNorm], prior: Prior) -> Method:
    paper = "Wang et al. 2018, Kalman Normalization"
    return of_blocks(paper, partial(_block, norm, prior), residual=KalmanResidual, finish=link)


def batch_method(prior: Prior = "closed", prior_weight: float = PRIOR_WEIGHT, micro_batch: int | None = None) -> Method:
    """Describe ``kalman-batch`` with other settings, to register under a name of its own.

    Args:
        prior: ``"closed"``, or ``"sampled"`` for networks of convolutions.
        prior_weight: p.
        micro_batch: samples per set of statistics, ``None`` for the batch.

    Returns:
        The method.

    Example:
        >>> batch_method("sampled", prior_weight=0.9, micro_batch=2).block(2, 3, 8, 3).norm
        KalmanBatchNorm(8, prior_weight=0.9)
    """

    def norm(dims: int, channels: int) -> KalmanBatchNorm:
        return KalmanBatchNorm(channels, prior_weight=prior_weight, micro_batch=micro_batch)

    return _method(norm, prior)


def group_method(prior_weight: float = PRIOR_WEIGHT) -> Method:
    """Describe ``kalman-group`` with another weight of the prior.

    Args:
        prior_weight: p.

    Returns:
        The method.

    Example:
        >>> group_method(0.5).block(2, 3, 8, 3).norm
        KalmanGroupNorm(8, prior_weight=0.5)
    """

    def norm(dims: int, channels: int) -> KalmanGroupNorm:
        return KalmanGroupNorm(channels, prior_weight, default_groups(dims, channels))

    return _method(norm, "closed")


METHODS = {"kalman-batch": batch_method(), "kalman-group": group_method()}
