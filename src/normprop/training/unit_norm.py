"""The unit-norm constraint: after each update every filter of a NormProp layer goes back to length 1."""

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from normprop.nn import NormPropLayer


def constrain(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    r"""Keep the filters of NormProp layers at unit length: :math:`W_i \leftarrow W_i / \|W_i\|` after each step.

    A layer's function does not depend on the length of its filters, so this changes no output; it keeps the size of
    the angular step from shrinking as filters grow. Layers with ``center=True`` are centred as well. The constraint is
    applied once here and then after every ``optimizer.step()``, to the layers of ``model`` whose weight this optimiser
    updates; a step that a ``GradScaler`` skips and a weight without gradient are left alone. Gradients and the
    optimiser's state are not touched. A model without NormProp layers is left as it is.

    Args:
        optimizer: any torch optimiser, with any parameter groups; Lightning Fabric's wrapper works as well.
        model: the network.

    Returns:
        A handle; ``handle.remove()`` ends the constraint.

    Source:
        Arpit et al. 2016, section 3.3.

    Example:
        >>> import torch
        >>> from normprop.nn import Linear
        >>> model = Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> handle = constrain(optimizer, model)
        >>> model(torch.randn(2, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> bool(torch.allclose(model.weight.norm(dim=1), torch.ones(3)))
        True
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    # By weight, so that a weight which several layers share is rescaled once.
    layers = {
        id(layer.weight): layer
        for layer in model.modules()
        if isinstance(layer, NormPropLayer) and id(layer.weight) in held
    }
    for layer in layers.values():
        layer.normalize_weight_()

    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Fused optimisers skip inside their kernel: a GradScaler calls step() all the same and sets found_inf.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        for layer in layers.values():
            if layer.weight.grad is not None:
                layer.normalize_weight_()

    return optimizer.register_step_post_hook(after_step)
