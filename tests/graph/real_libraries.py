"""What torchvision, MONAI and transformers offer, by their registries where they have one."""

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import nn


@dataclass(frozen=True)
class Candidate:
    """A model that may have batch norm: how to make it, and what its input looks like."""

    name: str
    architecture: str
    construct: Callable[[], nn.Module]
    channels: int = 3
    dims: int = 2


# Holds the stubs below: a torch.library.Library takes its operators along when it goes.
_STUBS: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled operators do not fit the installed torch.

    Its import asks for two operators by name. Where they are missing, declarations stand for them; no model of
    classification or segmentation calls them.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _STUBS.append(library)
        import torchvision
    return torchvision


def torchvision_models() -> Iterator[Candidate]:
    """Every classification and segmentation model; an architecture is a file of torchvision's."""
    models = import_torchvision().models
    for module in (models, models.segmentation):
        for name in models.list_models(module=module):
            build = models.get_model_builder(name)
            # The backbone's weights would be downloaded by default, the model's own are given for clarity.
            weights = {"weights", "weights_backbone"} & inspect.signature(build).parameters.keys()
            architecture = build.__module__.rpartition(".")[2]
            yield Candidate(name, architecture, partial(build, **dict.fromkeys(weights)))


def monai_models() -> Iterator[Candidate]:
    """U-Nets with batch norm, in two and three dimensions; MONAI has no registry, and its defaults are other norms."""
    from monai.networks import nets

    coder = {"in_channels": 1, "out_channels": 2, "channels": (8, 16, 32), "strides": (2, 2)}
    basic = {"in_channels": 1, "out_channels": 2, "features": (8, 8, 16, 16, 32, 8), "norm": "batch"}
    dyn = {"in_channels": 1, "out_channels": 2, "norm_name": "batch", "filters": (8, 16, 32)}
    dyn |= {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2)}
    seg = {"in_channels": 1, "out_channels": 2, "init_filters": 8, "norm": "batch"}
    settings = [
        (nets.UNet, "", {**coder, "norm": "batch"}),
        (nets.UNet, "residual", {**coder, "norm": "batch", "num_res_units": 2}),
        (nets.AttentionUnet, "", coder),
        (nets.BasicUNet, "", basic),
        (nets.BasicUNet, "interpolate", {**basic, "upsample": "nontrainable"}),
        (nets.BasicUNetPlusPlus, "", basic),
        (nets.DynUNet, "", dyn),
        (nets.DynUNet, "residual", {**dyn, "res_block": True}),
        (nets.DynUNet, "supervised", {**dyn, "deep_supervision": True}),
        (nets.SegResNet, "", seg),
        (nets.SegResNet, "transposed", {**seg, "upsample_mode": "deconv"}),
        (nets.SegResNet, "pixelshuffle", {**seg, "upsample_mode": "pixelshuffle"}),
        (nets.SegResNetDS, "", seg),
        (nets.VNet, "", {"in_channels": 1, "out_channels": 2}),
        (nets.HighResNet, "", {"in_channels": 1, "out_channels": 2}),
    ]
    for dims in (2, 3):
        for constructor, variant, options in settings:
            architecture = f"{constructor.__name__}-{dims}d"
            name = f"{architecture}-{variant}" if variant else architecture
            construct = partial(constructor, spatial_dims=dims, **options)
            yield Candidate(name, architecture, construct, channels=1, dims=dims)


# Small settings of convolutional networks whose defaults are large.
_SMALL: dict[str, dict[str, dict[str, object]]] = {
    "resnet": {
        f"small-{kind}": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": kind}
        for kind in ("basic", "bottleneck")
    },
    "regnet": {
        f"small-{kind}": {
            "embedding_size": 8,
            "hidden_sizes": [16, 32],
            "depths": [1, 2],
            "groups_width": 8,
            "layer_type": kind,
        }
        for kind in ("x", "y")
    },
    "mobilenet_v1": {"small": {"depth_multiplier": 0.25}},
    "mobilenet_v2": {"small": {"depth_multiplier": 0.35}},
    "efficientnet": {"small": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320}},
}


def transformers_models() -> Iterator[Candidate]:
    """Every image classifier and semantic segmenter, in default and, of some, in small settings."""
    # Where torchvision is installed transformers imports it, and fails where that fails.
    if importlib.util.find_spec("torchvision"):
        import_torchvision()
    import transformers

    registries = (
        transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        transformers.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    )
    for registry in registries:
        for config, models in registry.items():
            for model in models if isinstance(models, tuple) else (models,):
                for variant, options in {"": {}, **_SMALL.get(config.model_type, {})}.items():
                    name = f"{model.__name__}-{variant}" if variant else model.__name__
                    yield Candidate(name, config.model_type, partial(_from_config, model, config, options))


def _from_config(model: Callable[..., nn.Module], config: Callable[..., object], options: dict) -> nn.Module:
    return model(config(**options))


LIBRARIES: dict[str, Callable[[], Iterator[Candidate]]] = {
    "torchvision": torchvision_models,
    "monai": monai_models,
    "transformers": transformers_models,
}
