"""Networks by name, the reference ones and people's own."""

import importlib
import re
import sys
from collections.abc import Sequence

from torch import nn

from normprop.errors import ConfigError
from normprop.models.lstm import lstm
from normprop.models.mlp import mlp
from normprop.models.nin import nin
from normprop.models.resnet import resnet, resnet18
from normprop.models.two_view import two_view
from normprop.models.unet import unet
from normprop.models.vit import vit


def create(name: str, shape: Sequence[int], num_classes: int, norm: str = "normprop", width: float = 1.0) -> nn.Module:
    """Build a network by name for samples of a given shape.

    Args:
        name: ``"nin"``, ``"mlp"``, ``"vit"``, ``"two-view"``, ``"lstm"``, ``"resnet18"``, ``"resnet8"``,
            ``"resnet14"``, ..., ``"unet"``, ``"unet3d"`` or your own ``"package.module:factory"``: called as
            ``factory(norm=...)``, with the current directory importable.
        shape: shape of a sample, (C, H, W), (F,), or (C, D, H, W) for ``"unet3d"``.
        num_classes: number of outputs.
        norm: name of the method (:func:`normprop.norms.names`).
        width: multiplies the number of channels or hidden features of a reference network.

    Returns:
        A network from (N, *shape) to logits (N, num_classes), of ``"unet"`` and ``"unet3d"`` for every pixel or voxel,
        (N, num_classes, H, W) and (N, num_classes, D, H, W).

    Raises:
        ConfigError: for an unknown name, or samples that the network cannot take.

    Example:
        >>> type(create("resnet8", (3, 32, 32), 10, width=0.25)).__name__
        'Sequential'
    """
    if ":" in name:
        return _own(name, norm)
    if name == "mlp":
        return mlp(shape, num_classes, norm=norm, width=width)
    known = re.fullmatch(r"nin|vit|two-view|lstm|unet|unet3d|resnet(\d+)", name)
    if known is None:
        raise ConfigError(
            f"no model {name!r}; there are nin, mlp, vit, two-view, lstm, unet, unet3d, resnet18, resnet8, resnet14, "
            "... and package.module:factory"
        )
    if name == "unet3d":
        if len(shape) != 4:
            raise ConfigError(f"model 'unet3d' takes volumes (C, D, H, W), but samples have shape {tuple(shape)}")
        return unet(shape[0], num_classes, norm=norm, width=width)
    if len(shape) != 3:
        raise ConfigError(f"model {name!r} takes images (C, H, W), but samples have shape {tuple(shape)}; use mlp")
    if name == "nin":
        return nin(shape[0], num_classes, norm=norm, width=width)
    if name == "lstm":
        return lstm(shape, num_classes, norm=norm, width=width)
    if name == "unet":
        return unet(shape[0], num_classes, norm=norm, width=width, dims=2)
    if name == "two-view":
        return two_view(shape[0], num_classes, norm=norm, width=width)
    if name == "vit":
        return vit(shape, num_classes, norm=norm, width=width)
    if name == "resnet18":
        return resnet18(shape[0], num_classes, norm=norm, width=width)
    return resnet(int(known[1]), shape[0], num_classes, norm=norm, width=width)


def _own(name: str, norm: str) -> nn.Module:
    """Call ``package.module:factory`` with ``norm=``."""
    module_name, _, factory_name = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module is there but something it imports is not
        raise ConfigError(f"model {name!r}: there is no module {error.name!r} here or among the installed") from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise ConfigError(f"model {name!r}: {module_name} has no callable {factory_name!r}")
    model = factory(norm=norm)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {name!r}: the factory returned {type(model).__name__}, not a torch.nn.Module")
    return model
