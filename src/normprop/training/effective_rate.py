r"""Weight decay and learning-rate schedules as what they are to a scale-invariant layer: effective steps.

What follows a normaliser does not depend on the length of a filter w, so only its direction learns, and to first order
it moves by :math:`\eta / \|w\|^2` times the gradient at the unit filter. Decay and the learning rate both act through
this number, and each can stand in for the other:

- :func:`mimic_decay` gives a run without decay the directions of one with decay, whose filter lengths were recorded
  (:mod:`normprop.training.filter_norms`), by a learning rate for every filter;
- :func:`schedule_norms` keeps the learning rate and lets the lengths follow a learning-rate schedule.

Both hook into a torch optimiser and count its steps from where they are told to start, so a run that resumes names the
step it resumes from. They take the weights by name; which of a network's weights are scale-invariant the caller knows:
those that batch norm or another norm per channel follows directly. Filters lie along a weight's first axis.

Source:
    Hoffer, Banner, Golan & Soudry 2018.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from normprop.errors import ConfigError
from normprop.training.filter_norms import filter_norms, group_of


def mimic_decay(
    optimizer: Optimizer,
    weights: Mapping[str, nn.Parameter],
    norms: Mapping[str, Tensor],
    decay: float,
    first_step: int = 0,
) -> "Hooks":
    r"""Give a run without decay the directions of a run with decay by a learning rate for every filter.

    .. math:: \eta' = \eta \frac{c^2}{1 - \eta \lambda}, \qquad c = \|w'\| / \|w\|

    with w' the filter here, w that of the recorded run before the same step, and eta the rate of the weight's parameter
    group at this step. Each step of the optimiser is stretched by :math:`\eta' / \eta`, filter by filter. From the same
    start, on the same batches, all directions and so all outputs are those of the recorded run: exactly so for SGD
    without momentum. With momentum m the buffer holds gradients taken at other lengths, and what is exact is

    .. math:: \eta' = \eta c^2 r, \qquad r = \frac{1}{1 - \eta \lambda + m \frac{\eta}{\eta_-} (1 - r_-)}

    with r and eta of the step before in :math:`r_-` and :math:`\eta_-`, 1 and eta at first: r is the factor by which c
    grows in this step. Nesterov's momentum, dampening and other optimisers are approximated. So are layers that are
    not quite scale-invariant: the usual epsilon of batch norm, 1e-5, parts the two runs in some tens of steps of a
    residual network; their effective steps stay the same.

    The paper's rule is :math:`\eta' = \eta c^2`: without r steps are too short by :math:`1 - \eta \lambda`, and
    with momentum by about :math:`1 - \eta \lambda / (1 - m)`.

    Args:
        optimizer: of the run without decay.
        weights: scale-invariant weights, by name; their groups must have no decay.
        norms: lengths noted in the run with decay (:class:`~normprop.training.filter_norms.NormRecorder`), by the same
            names, (steps, out) each.
        decay: :math:`\lambda` of that run, as torch's SGD takes it.
        first_step: step of the recorded run that comes first. Exact with momentum only from 0 on.

    Returns:
        A handle; ``handle.remove()`` ends the correction.

    Raises:
        ConfigError: if weights and records do not fit together, and at a step beyond the record.

    Source:
        Hoffer et al. 2018; the denominators: ours, by writing both runs as w' = c w.

    Example:
        >>> layer = nn.Linear(4, 3, bias=False)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> layer.weight.grad = torch.ones(3, 4)
        >>> before = layer.weight.detach().clone()
        >>> recorded = {"weight": 0.5 * filter_norms(layer.weight).expand(10, 3)}
        >>> handle = mimic_decay(optimizer, {"weight": layer.weight}, recorded, decay=0.0)
        >>> _ = optimizer.step()
        >>> round((before - layer.weight).mean().item(), 4)  # 0.1 times (1 / 0.5)^2
        0.4
    """
    groups = group_of(optimizer, weights)
    for name, group in groups.items():
        if group.get("weight_decay", 0.0):
            raise ConfigError(f"mimic_decay: {name} decays by {group['weight_decay']}; its group must not decay")
    steps = _recorded_steps(weights, norms)
    step = first_step
    held: dict[str, tuple[Tensor, Tensor]] = {}
    last: dict[str, tuple[float, float]] = {}

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        _require_recorded(step, steps)
        for name, weight in weights.items():
            rate, momentum = float(groups[name]["lr"]), groups[name].get("momentum", 0.0)
            last_rate, last_growth = last.get(name, (rate, 1.0))
            shrinking = 1 - rate * decay + momentum * (rate / last_rate) * (1 - last_growth)
            if shrinking <= 0:
                raise ConfigError(
                    f"mimic_decay: {name}: rate {rate} times decay {decay} must be below (1 - sqrt(momentum))^2 = "
                    f"{(1 - momentum**0.5) ** 2:.4g}, or decay turns a filter round"
                )
            last[name] = rate, 1 / shrinking
            now = filter_norms(weight)
            held[name] = weight.detach().clone(), (now / norms[name][step].to(now)).square() / shrinking

    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal step
        step += 1
        for name, weight in weights.items():
            start, stretch = held.pop(name)
            with torch.no_grad():
                weight.lerp_(start, 1 - _along_filters(stretch, weight))

    return Hooks(optimizer.register_step_pre_hook(before_step), optimizer.register_step_post_hook(after_step))


def schedule_norms(
    optimizer: Optimizer,
    weights: Mapping[str, nn.Parameter],
    schedule: Callable[[int], float],
    norms: Mapping[str, Tensor] | None = None,
    followers: Mapping[str, nn.Module] | None = None,
    first_step: int = 0,
) -> "Hooks":
    r"""Let the lengths of filters do what a learning-rate schedule would, at a fixed learning rate.

    .. math:: \|w_t\| = \|w\| / \sqrt{s(t)} \quad \text{so that} \quad \eta / \|w_t\|^2 = \eta s(t) / \|w\|^2

    with s the schedule and :math:`\|w\|` either the length now or that of a recorded run before step t: then the
    effective step is the one which that run would have with this schedule. Filters are rescaled now and after each
    step. When the wanted length changes, a momentum buffer is divided by the same ratio, as gradients of a
    scale-invariant filter are; so directions are exactly those of a run that holds its lengths and schedules its
    learning rate. Running averages of batch norms would be left behind by the new lengths; those of ``followers`` go
    along.

    Args:
        optimizer: its learning rate should be fixed; weight decay of these weights would act on directions only
            through momentum and is best left out.
        weights: scale-invariant weights, by name.
        schedule: from the step, from 0, to the factor of the learning rate (:mod:`normprop.training.schedules`); above
            0 at every step that is taken.
        norms: lengths noted in a run (:class:`~normprop.training.filter_norms.NormRecorder`), by the same names,
            (steps, out) each; ``None``: the lengths now.
        followers: batch norms that directly follow the weights, by the same names; without them a network in
            evaluation mode is wrong until its running averages have caught up.
        first_step: step that comes first.

    Returns:
        A handle; ``handle.remove()`` ends the rescaling.

    Raises:
        ConfigError: if weights and records do not fit together, and at a step beyond the record or with factor 0.

    Source:
        Hoffer et al. 2018; what is done to momentum and running averages: ours.

    Example:
        >>> layer = nn.Linear(4, 3, bias=False)
        >>> start = filter_norms(layer.weight)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> handle = schedule_norms(optimizer, {"weight": layer.weight}, lambda step: 0.25**step)
        >>> _ = optimizer.step()
        >>> (filter_norms(layer.weight) / start).round(decimals=3)
        tensor([2., 2., 2.])
    """
    group_of(optimizer, weights)
    start = {name: filter_norms(weight) for name, weight in weights.items()}
    steps = None if norms is None else _recorded_steps(weights, norms)
    step = first_step
    held: dict[str, Tensor] = {}

    def rescale() -> None:
        """Give the filters the lengths for the coming step; after the last one there is none to prepare."""
        if schedule(step) <= 0 or (steps is not None and step >= steps):
            return
        for name, weight in weights.items():
            now = filter_norms(weight)
            wanted = (start[name] if norms is None else norms[name][step].to(now)) / schedule(step) ** 0.5
            with torch.no_grad():
                weight.mul_(_along_filters(torch.where(now > 0, wanted / now, 1.0), weight))
                ratio = torch.where(wanted > 0, wanted / held.get(name, wanted), 1.0)
                momentum = optimizer.state[weight].get("momentum_buffer")
                if momentum is not None:
                    momentum.div_(_along_filters(ratio, momentum))
                if followers is not None and name in followers:
                    follower: Any = followers[name]
                    follower.running_mean.mul_(ratio)
                    follower.running_var.mul_(ratio.square())
            held[name] = wanted

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        _require_recorded(step, steps)
        if schedule(step) <= 0:
            raise ConfigError(f"schedule_norms: the schedule is {schedule(step)} at step {step}; no length does that")

    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal step
        step += 1
        rescale()

    rescale()
    return Hooks(optimizer.register_step_pre_hook(before_step), optimizer.register_step_post_hook(after_step))


class Hooks:
    """Hooks of an optimiser that belong together.

    Args:
        *handles: torch's handles of the hooks.
    """

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take the hooks off the optimiser."""
        for handle in self._handles:
            handle.remove()


def _recorded_steps(weights: Mapping[str, nn.Parameter], norms: Mapping[str, Tensor]) -> int:
    """Check that the records are of these weights; return how many steps they have."""
    if set(weights) != set(norms):
        raise ConfigError(f"recorded norms are of {', '.join(norms) or 'nothing'}; expected {', '.join(weights)}")
    for name, weight in weights.items():
        if norms[name].ndim != 2 or norms[name].shape[1] != len(weight):
            raise ConfigError(
                f"recorded norms of {name} have shape {tuple(norms[name].shape)}; expected (steps, {len(weight)})"
            )
        if not (norms[name] > 0).all():
            raise ConfigError(f"recorded norms of {name} are not all above 0; a filter of length 0 has no direction")
    return min(len(value) for value in norms.values())


def _require_recorded(step: int, steps: int | None) -> None:
    """Refuse a step that the record does not reach."""
    if steps is not None and step >= steps:
        raise ConfigError(f"the record has {steps} steps and this is step {step}, counted from 0; record a longer run")


def _along_filters(values: Tensor, weight: Tensor) -> Tensor:
    """Shape one value per filter so that it broadcasts against the weight, in its type."""
    return values.to(weight.dtype).reshape(-1, *[1] * (weight.ndim - 1))
