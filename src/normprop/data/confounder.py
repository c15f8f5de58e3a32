"""A planted confounder: one number per image, visible in both halves of it, that may go with the label."""

import torch
from torch import Tensor

from normprop.data.dataset import Split
from normprop.errors import ConfigError


def draw(labels: Tensor, num_classes: int, correlation: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw a confounder for each image: uniform on [0, 1] in all, more or less so given the label.

    With probability ``correlation`` it is drawn from the label's own stretch [label, label + 1] / num_classes,
    otherwise from all of [0, 1]. If the K classes are equally frequent, its correlation coefficient with the label is
    ``correlation`` sqrt(1 - 1 / K^2), and without the label it is uniform for every ``correlation``.

    Args:
        labels: int64 (N,), from 0 to num_classes - 1.
        num_classes: number of classes.
        correlation: from 0, independent of the label, to 1, which gives the label away.
        generator: where the numbers are drawn from; None: torch's own.

    Returns:
        float32 (N,).

    Raises:
        ConfigError: for a correlation outside [0, 1].

    Source:
        Ours.

    Example:
        >>> draw(torch.tensor([0, 3]), 4, correlation=1.0, generator=torch.Generator().manual_seed(0)).mul(4).floor()
        tensor([0., 3.])
    """
    if not 0 <= correlation <= 1:
        raise ConfigError(f"confounder: the correlation with the label must be from 0 to 1, got {correlation}")
    own, anywhere, coin = torch.rand(3, len(labels), generator=generator).to(labels.device)
    return torch.where(coin < correlation, (labels + own) / num_classes, anywhere)


def plant(images: Tensor, confounder: Tensor, strength: float = 0.5) -> Tensor:
    r"""Blend horizontal stripes into images, as bright as the confounder: :math:`(1 - s) x + s z p`.

    The pattern p is 1 in every second row and 0 in the others, so that any left and any right part of an image show it
    alike. Blending keeps the range of values, and nothing is cut off: the images are exactly linear in z.

    Args:
        images: (N, C, H, W), uint8 with values 0..255 or float with values 0..1.
        confounder: z, (N,), from 0 to 1.
        strength: s, from 0, which changes nothing, to 1, which leaves the stripes alone.

    Returns:
        Images of the same type; uint8 is rounded to the nearest.

    Raises:
        ConfigError: for a strength outside [0, 1], or what is not a batch of images.

    Source:
        Ours.

    Example:
        >>> plant(torch.ones(1, 1, 2, 3), torch.tensor([0.5]), strength=0.5)
        tensor([[[[0.7500, 0.7500, 0.7500],
                  [0.5000, 0.5000, 0.5000]]]])
    """
    if not 0 <= strength <= 1:
        raise ConfigError(f"confounder: strength must be from 0 to 1, got {strength}")
    if images.ndim != 4:
        raise ConfigError(f"confounder: expected images (N, C, H, W), got shape {tuple(images.shape)}")
    whole = images.dtype == torch.uint8
    values = images.float() if whole else images
    stripes = (torch.arange(images.shape[2], device=images.device) % 2 == 0).to(values.dtype).view(-1, 1)
    bright = confounder.to(values.dtype).view(-1, 1, 1, 1) * (255 if whole else 1)
    blend = torch.lerp(values, bright * stripes, strength)
    return blend.round().to(torch.uint8) if whole else blend


def planted(
    split: Split, num_classes: int, correlation: float, strength: float, generator: torch.Generator
) -> tuple[Split, Tensor]:
    """Draw a confounder for a split of images and plant it.

    Args:
        split: images and labels.
        num_classes: number of classes.
        correlation: of the confounder with the label, see :func:`draw`.
        strength: of the stripes, see :func:`plant`.
        generator: where the confounder is drawn from.

    Returns:
        The changed split, and the confounder, (N,).

    Raises:
        ConfigError: for what cannot work.

    Example:
        >>> split = Split(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]))
        >>> changed, z = planted(split, 2, correlation=1.0, strength=1.0, generator=torch.Generator())
        >>> torch.equal(changed.images[:, 0, 0, 0], z)
        True
    """
    confounder = draw(split.labels, num_classes, correlation, generator)
    return Split(plant(split.images, confounder, strength), split.labels), confounder
