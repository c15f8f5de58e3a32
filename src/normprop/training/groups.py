"""Which parameters decay, and which learn faster."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from normprop.errors import ConfigError
from normprop.nn import NormPropLayer

# Modules whose parameters are not weights of a linear map, however many dimensions they have.
UNDECAYED = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag, nn.PReLU)


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    unit_norm: bool = True,
    lr: float | None = None,
    gain_rate: float = 1.0,
) -> list[dict[str, Any]]:
    """Sort the parameters of a model into those that decay, those that do not and those that learn faster.

    Decayed: the weights of linear maps, which are the parameters with two or more dimensions. Not decayed: biases,
    gains, the parameters of normalisers, embeddings and PReLU, and the weights of NormProp layers under the unit-norm
    constraint, which decay would only rescale before the constraint puts them back. A module's class may say otherwise
    for its own parameters by an attribute ``parameter_decay``, a mapping from their names to whether they decay.

    Faster, if ``lr`` and ``gain_rate`` are given: gains and biases of NormProp layers with ``orthogonal=True``. Filters
    of length 1 that are held near right angles cannot amplify what they agree on; gains can. On plain convolutional
    networks 4 lowers the error, on others it does not (docs/results/learning.md).

    Args:
        model: the network.
        weight_decay: decay of the first group.
        unit_norm: whether NormProp weights are under the constraint
            (:func:`normprop.training.unit_norm.constrain`); without it they decay like other weights.
        lr: learning rate of the groups, for SGD; without it they take the optimiser's own, all alike.
        gain_rate: how many times ``lr`` the rate of such gains and biases is.

    Returns:
        One dict per group that has parameters, every parameter in exactly one: a shared parameter counts once, and
        decays only if all its owners let it.

    Raises:
        ConfigError: for a ``gain_rate`` without the ``lr`` that it multiplies.

    Source:
        Ours; Arpit et al. 2016 use a decay of 5e-4 to 5e-3 and do not say of what.

    Example:
        >>> groups = parameter_groups(nn.Linear(4, 3), weight_decay=1e-4)
        >>> [(group["weight_decay"], len(group["params"])) for group in groups]
        [(0.0001, 1), (0.0, 1)]
        >>> from normprop.nn import Linear
        >>> [(group["lr"], len(group["params"])) for group in parameter_groups(Linear(4, 3), 0, lr=0.1, gain_rate=4)]
        [(0.1, 1), (0.4, 2)]
    """
    if lr is None and gain_rate != 1:
        raise ConfigError(f"parameter_groups: gain_rate={gain_rate} multiplies a learning rate; give it as lr")
    decays: dict[nn.Parameter, bool] = {}
    fast: set[nn.Parameter] = set()
    for module in model.modules():
        frozen = isinstance(module, (*UNDECAYED, NormPropLayer) if unit_norm else UNDECAYED)
        if gain_rate != 1 and isinstance(module, NormPropLayer) and module.orthogonal:
            fast |= {parameter for parameter in (module.gain, module.bias) if parameter is not None}
        own: Mapping[str, bool] = getattr(module, "parameter_decay", {})
        for name, parameter in module.named_parameters(recurse=False):
            decayed = own.get(name, not frozen and parameter.ndim >= 2)
            decays[parameter] = decays.get(parameter, True) and decayed
    groups: list[dict[str, Any]] = [
        {"params": [p for p, decayed in decays.items() if decayed], "weight_decay": weight_decay},
        {"params": [p for p, decayed in decays.items() if not decayed and p not in fast], "weight_decay": 0.0},
        {"params": [p for p in decays if p in fast], "weight_decay": 0.0},
    ]
    if lr is not None:
        for group, factor in zip(groups, (1.0, 1.0, gain_rate), strict=True):
            group["lr"] = lr * factor
    return [group for group in groups if group["params"]]
