"""Muon: filters turn by the orthogonal factor of their gradients, all directions of a layer alike."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normprop.errors import ConfigError
from normprop.fused import at_least_float32
from normprop.moments.linear import as_matrices, from_matrices

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the quintic a s + b s^3 + c s^5; five times brings every singular value s from (0.01, 1) into (0.68, 1.14)."""
DESCENT = 10
"""Rate of what is no matrix, in learning rates: that of SGD with momentum 0.9."""
MEMORY = 80
"""Samples that :func:`momentum_at` averages over at least: those of batch size 8 and momentum 0.9."""


def momentum_at(batch_size: int) -> float:
    r"""Momentum that averages over 80 samples at least: :math:`\max(0.9,\ 1 - B / 80)` for batch size B.

    The orthogonal factor of a noisy average is mostly noise, however small the steps. With this momentum and a learning
    rate in proportion to the batch size, 1 to 8 samples a step train alike.

    Args:
        batch_size: samples per update, at least 1.

    Returns:
        The momentum for :class:`Muon`.

    Source:
        Ours (docs/results/learning.md).

    Example:
        >>> [momentum_at(size) for size in (1, 4, 8, 128)]
        [0.9875, 0.95, 0.9, 0.9]
    """
    return max(0.9, 1 - batch_size / MEMORY)


def orthogonal_factor(matrices: Tensor, steps: int = 5) -> Tensor:
    r"""Approximate the orthogonal factor :math:`U V^\top` of matrices :math:`U S V^\top` by Newton-Schulz iteration.

    Args:
        matrices: (..., m, n).
        steps: of the iteration.

    Returns:
        Matrices :math:`U S' V^\top` of the same shape, S' between 0.68 and 1.14 where S is above a hundredth of the
        Frobenius norm. Matrices of 0 stay 0.

    Source:
        Jordan et al. 2024 (Muon); Bernstein and Newhouse 2024.

    Example:
        >>> factor = orthogonal_factor(torch.tensor([[3.0, 0.0], [0.0, -0.5]]))
        >>> bool((factor.diagonal().abs() - 0.9 < 0.3).all()), factor.diagonal().sign().tolist()
        (True, [1.0, -1.0])
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    factor: Tensor = matrices.mT if tall else matrices
    factor = factor / torch.linalg.matrix_norm(factor, keepdim=True).clamp_min(1e-20)
    for _ in range(steps):
        gram = factor @ factor.mT
        factor = a * factor + (b * gram + c * gram @ gram) @ factor
    return factor.mT if tall else factor


class Muon(Optimizer):
    r"""Steps of SGD with momentum in which the weights of linear maps move along the orthogonal factor of theirs.

    .. math:: M \leftarrow \mu M + (1 - \mu) G, \quad
        W \leftarrow (1 - \eta \lambda) W - \eta \sqrt{\max(1, m / n)}\, UV^\top, \quad
        U S V^\top = (1 - \mu) G + \mu M

    for a matrix of m filters and fan-in n. Every filter moves by about the learning rate, whatever the length of its
    gradient, and what few filters agree on counts as much as what all do. Filters of length 1, as
    :func:`normprop.training.constrain` keeps them, turn by the learning rate as an angle; the constraint draws them
    towards right angles in deep networks alone. Other parameters move by :math:`-10 \eta M`, decay in their gradients:
    with momentum 0.9 that is SGD.

    Args:
        params: groups from :func:`normprop.training.parameter_groups` with ``matrices=True``. The weights of a group
            with ``"matrices": (count, transposed)`` are as many matrices, one below the other, each for itself.
        lr: learning rate; good values for small convolutional networks are 0.01 at batch size 8, in proportion to it
            below (0.00125 at 1), and 0.04 at 128; twice that where training is short.
        momentum: mu; :func:`momentum_at` gives that for a batch size below 8.
        weight_decay: lambda, of groups that do not say.

    Raises:
        ConfigError: for a setting out of its range, or if no group has matrices.

    Source:
        Jordan et al. 2024 (Muon).

    Example:
        >>> from normprop.nn import Linear
        >>> from normprop.training import constrain, parameter_groups
        >>> model = Linear(4, 3)
        >>> optimizer = Muon(parameter_groups(model, 0.0, matrices=True), lr=0.1)
        >>> handle = constrain(optimizer, model)
        >>> before = model.weight.detach().clone()
        >>> model(torch.randn(2, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> bool(((model.weight - before).norm(dim=1) < 0.13).all())
        True
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float = 0.02, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        for name, value, accepted, expected in (
            ("lr", lr, lr >= 0, "at least 0"),
            ("momentum", momentum, 0 <= momentum < 1, "from 0 to below 1"),
            ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
        ):
            if not accepted:
                raise ConfigError(f"Muon: {name} must be {expected}, got {value}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "matrices": None})
        if not any(group["matrices"] for group in self.param_groups):
            raise ConfigError(
                "Muon: no group of parameters has matrices; give it parameter_groups(model, ..., matrices=True)"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; ``closure``, if given, computes the loss and its gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if parameters := [parameter for parameter in group["params"] if parameter.grad is not None]:
                if group["matrices"]:
                    self._turn(parameters, group)
                else:
                    self._descend(parameters, group)
        return loss

    def _momenta(self, parameters: list[Tensor]) -> list[Tensor]:
        """Return the momentum of each parameter, 0 at first."""
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return [self.state[parameter]["momentum_buffer"] for parameter in parameters]

    def _descend(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Move along the momentum as SGD does."""
        momenta = self._momenta(parameters)
        gradients: Any = [parameter.grad for parameter in parameters]
        if group["weight_decay"]:
            gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        torch._foreach_add_(parameters, momenta, alpha=-DESCENT * group["lr"])

    def _turn(self, weights: list[Tensor], settings: dict[str, Any]) -> None:
        """Move weights of one layout along the orthogonal factors of their momenta, those of one shape together."""
        groups, transposed = settings["matrices"]
        momenta = self._momenta(weights)
        gradients: Any = [weight.grad for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - settings["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, settings["momentum"])
        alike: dict[Any, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for weight, direction in zip(weights, ahead, strict=True):
            matrices = as_matrices(at_least_float32(direction), groups, transposed)
            alike[matrices.shape, weight.dtype, weight.device].append((weight, matrices))
        for (shape, _, device), members in alike.items():
            together = torch.cat([matrices for _, matrices in members])
            if device.type == "cuda":  # as published: its matrix products round as coarsely as the iteration ends
                together = together.bfloat16()
            factors = orthogonal_factor(together).mul_(max(1.0, shape[1] / shape[2]) ** 0.5).split(groups)
            for (weight, _), factor in zip(members, factors, strict=True):
                weight.mul_(1 - settings["lr"] * settings["weight_decay"])
                moved = from_matrices(factor.to(weight.dtype), weight.shape, transposed)
                weight.add_(moved, alpha=-settings["lr"])
