"""Which parameters decay, which learn faster, and which are matrices."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normprop.errors import ConfigError
from normprop.nn import NormPropLayer

# Modules whose parameters are not weights of a linear map, however many dimensions they have.
UNDECAYED = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag, nn.PReLU)

# Queries, keys and values, or the gates of a cell, lie in one weight.
STACKED = {nn.MultiheadAttention: 3, nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    unit_norm: bool = True,
    lr: float | None = None,
    gain_rate: float = 1.0,
    matrices: bool = False,
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
        matrices: whether weights of linear maps get groups of their own, by their layout, which
            :class:`normprop.training.Muon` needs to know: ``"matrices": (count, transposed)``, the number of groups
            of a convolution or of gates of a cell, and whether the convolution is transposed.

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
    layouts: dict[nn.Parameter, tuple[int, bool]] = {}
    for module in model.modules():
        frozen = isinstance(module, (*UNDECAYED, NormPropLayer) if unit_norm else UNDECAYED)
        if gain_rate != 1 and isinstance(module, NormPropLayer) and module.orthogonal:
            fast |= {parameter for parameter in (module.gain, module.bias) if parameter is not None}
        own: Mapping[str, bool] = getattr(module, "parameter_decay", {})
        for name, parameter in module.named_parameters(recurse=False):
            decayed = own.get(name, not frozen and parameter.ndim >= 2)
            decays[parameter] = decays.get(parameter, True) and decayed
            if matrices and parameter.ndim >= 2 and (decayed or isinstance(module, nn.Linear | _ConvNd)):
                layouts.setdefault(parameter, _layout(module, name))
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for parameter, decayed in decays.items():
        layout = layouts.get(parameter)
        kind = not decayed, parameter in fast, layout or ()
        group = groups.setdefault(kind, {"params": [], "weight_decay": weight_decay if decayed else 0.0})
        group["params"].append(parameter)
        if lr is not None:
            group["lr"] = lr * (gain_rate if parameter in fast else 1.0)
        if layout is not None:
            group["matrices"] = layout
    return [groups[kind] for kind in sorted(groups)]


def _layout(module: nn.Module, name: str) -> tuple[int, bool]:
    """Number of matrices one below the other in a weight, and whether it has the layout of a transposed convolution."""
    if isinstance(module, _ConvNd):
        return module.groups, isinstance(module, _ConvTransposeNd)
    if name.startswith(("in_proj_weight", "weight_ih", "weight_hh")):
        return next((count for kind, count in STACKED.items() if isinstance(module, kind)), 1), False
    return 1, False
