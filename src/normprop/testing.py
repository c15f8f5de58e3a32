"""Assertions for users' own tests."""

import math

from torch import nn

from normprop.errors import ConfigError
from normprop.graph import call_site
from normprop.graph.capture import Inputs
from normprop.graph.inspect import Inspection, inspect
from normprop.graph.propagate import OnUnknown


def assert_moments(
    model: nn.Module,
    x: Inputs,
    rtol: float = 0.5,
    atol: float = 0.25,
    *,
    on_unknown: OnUnknown = "error",
) -> Inspection:
    """Assert that every call's mean and standard deviation are what the weights promise for an input like this one.

    The model runs in its present mode and is left as it is, see :func:`normprop.inspect`.

    Args:
        model: any module.
        x: a tensor, a tuple of the model's positional arguments or a dict of its keyword arguments; enough of it that
            measured moments mean something. Calls with fewer than 64 values are not judged.
        rtol: allowed relative error of a standard deviation, either way: by default a factor 1.5.
        atol: allowed error of a mean, as a share of the root mean square of the values.
        on_unknown: what to do at an operator without a rule.

    Returns:
        What was predicted and measured.

    Raises:
        AssertionError: naming every call that is off with predicted and measured values, and calls that have no
            prediction or whose values are not finite.
        ConfigError: if rtol or atol is not positive.
        GraphError: if the model cannot be captured or run.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU())
        >>> _ = nn.init.normal_(net[0].weight, 0.0, 0.2, generator=generator)
        >>> x = torch.randn(64, 64, generator=generator)
        >>> len(assert_moments(net, x).sites)
        2
    """
    if not (rtol > 0 and atol > 0):
        raise ConfigError(f"assert_moments: rtol and atol must be positive, got {rtol} and {atol}")
    report = inspect(model, x, on_unknown=on_unknown, threshold=1.0 + rtol)
    lines = []
    for site in report.sites:
        measured, predicted = site.measured, site.predicted
        if not math.isfinite(measured.std):
            lines.append(f"{site.name}: measured mean {measured.mean:.4g}, std {measured.std:.4g}: not finite")
        elif predicted is None:
            lines.append(f"{site.name}: no prediction")
        elif math.prod(site.shape) >= call_site.FEWEST:
            size = max(math.hypot(side.mean, side.std) for side in (measured, predicted))
            wrong = ["std"] * site.flagged + ["mean"] * (abs(predicted.mean - measured.mean) > atol * size)
            if wrong:
                lines.append(
                    f"{site.name}: {' and '.join(wrong)} off: predicted mean {predicted.mean:.4g}, "
                    f"std {predicted.std:.4g}, measured mean {measured.mean:.4g}, std {measured.std:.4g}"
                )
    if lines:
        raise AssertionError("\n  ".join([f"{len(lines)} of {len(report.sites)} calls are off:", *lines]))
    return report
