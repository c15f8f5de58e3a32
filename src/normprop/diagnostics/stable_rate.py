"""Up to which learning rate is gradient descent stable near a minimum? Found by trying."""

import math

import torch
from torch import Tensor, nn

from normprop.diagnostics.products import differentiably
from normprop.diagnostics.quiet import call, trained
from normprop.errors import ConfigError


def converges(
    model: nn.Module, inputs: Tensor, rate: float, *, steps: int = 80, size: float = 1e-3, seed: int = 0
) -> bool:
    """Try whether gradient descent is stable at a learning rate, on the real network and half the mean squared error.

    The targets are the network's outputs, a little disturbed in all directions at once: so the loss is close to its
    least value, and stable descent is what the Fisher matrix decides. Unstable is a loss that rises above where it
    began, from where it may yet leap to some flatter place, or that rises in the second half of the steps, when what
    grows has overtaken what shrinks.

    Args:
        model: the network; it is left as it is.
        inputs: a batch.
        rate: learning rate.
        steps: of full gradient descent; more of them tell rates apart that are closer to the edge.
        size: of the disturbance, as a share of the root mean square of the outputs.
        seed: of the disturbance, and where random states start at each step.

    Returns:
        Whether descent was stable.

    Raises:
        ConfigError: if no parameter requires a gradient, or the rate is not positive.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])  # lambda_max 4.5
        >>> converges(model, x, 1.9 / 4.5), converges(model, x, 2.1 / 4.5)
        (True, False)
    """
    if not rate > 0:
        raise ConfigError(f"converges: the learning rate must be positive, got {rate}")
    losses = []
    with differentiably(model, inputs, seed) as network:
        parameters = [*trained(network).values()]
        target = None
        for _ in range(steps):
            torch.manual_seed(seed)  # the same masks in each step: one function descends
            output = call(network, inputs.detach().clone())
            if target is None:
                generator = torch.Generator().manual_seed(seed)
                scale = output.detach().square().mean().sqrt() * size
                target = output.detach() + scale * torch.randn(output.shape, generator=generator).to(output)
            loss = (output - target).double().square().sum() / (2 * len(inputs))
            losses.append(float(loss.detach()))
            if not losses[-1] <= 1.01 * losses[0]:
                return False
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            with torch.no_grad():
                for parameter, grad in zip(parameters, grads, strict=True):
                    if grad is not None:
                        parameter.sub_(grad, alpha=rate)
    return losses[-1] <= losses[steps // 2]


def stable_rate(
    model: nn.Module, inputs: Tensor, start: float, *, resolution: float = 0.05, steps: int = 80, seed: int = 0
) -> float:
    """Measure the largest learning rate at which gradient descent is stable, by bisection.

    Args:
        model: the network; it is left as it is.
        inputs: a batch.
        start: a rate near the edge, such as 2 / lambda_max, from where to look up or down by factors.
        resolution: relative width of the bracket at which to stop.
        steps: as for :func:`converges`.
        seed: the same.

    Returns:
        The middle of the bracket; nan if none was found within a factor of 1000.

    Raises:
        ConfigError: if the start is not positive and finite.

    Example:
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> abs(stable_rate(nn.Linear(2, 1, bias=False), x, start=1.0) * 4.5 / 2 - 1) < 0.05
        True
    """
    if not (start > 0 and math.isfinite(start)):
        raise ConfigError(f"stable_rate: start must be a positive number, got {start}; give 2 / lambda_max")
    settings = {"steps": steps, "seed": seed}
    factor = 1.0 + 2 * resolution
    upwards = converges(model, inputs, start, **settings)
    low = high = start
    while converges(model, inputs, high if upwards else low, **settings) is upwards:
        if not 1e-3 < (high if upwards else low) / start < 1e3:
            return math.nan
        if upwards:
            low, high = high, high * factor
        else:
            low, high = low / factor, low
        factor = factor**1.5
    while high / low > 1.0 + resolution:
        middle = math.sqrt(low * high)
        if converges(model, inputs, middle, **settings):
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)
