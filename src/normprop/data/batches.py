"""Batches and augmentation on tensors, a whole batch at a time, on its device."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from normprop.data.dataset import Split
from normprop.errors import ConfigError


def batches(
    split: Split,
    batch_size: int,
    *,
    shuffle: bool,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    drop_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over a split in batches; the order is drawn when this is called.

    Args:
        split: the images and labels.
        batch_size: samples per batch; the last batch may be smaller.
        shuffle: draw a new random order.
        generator: where the order is drawn from; None: torch's own.
        device: where the batches shall be; None: where the split is.
        drop_last: leave out a last batch that is smaller than the others.

    Returns:
        An iterator of images, float32 (uint8 divided by 255), and labels, int64. Batches are copies of the split.

    Raises:
        ConfigError: if the batch size is not positive.

    Example:
        >>> split = Split(torch.full((5, 1, 2, 2), 255, dtype=torch.uint8), torch.arange(5))
        >>> [(images.mean().item(), labels.tolist()) for images, labels in batches(split, 2, shuffle=False)]
        [(1.0, [0, 1]), (1.0, [2, 3]), (1.0, [4])]
    """
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size}; expected a positive number")
    total = len(split)
    end = total - total % batch_size if drop_last else total
    if shuffle:
        drawn_on = generator.device if generator is not None else split.labels.device
        order = torch.randperm(total, generator=generator, device=drawn_on).to(split.labels.device)
    else:
        order = torch.arange(total, device=split.labels.device)
    target = split.labels.device if device is None else torch.device(device)
    return (_batch(split, order[start : start + batch_size], target) for start in range(0, end, batch_size))


def _batch(split: Split, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The samples of one batch, as floats on a device."""
    images = split.images[index].to(device)
    if images.dtype == torch.uint8:
        images = images.to(torch.float32).div_(255)
    return images, split.labels[index].to(device)


def augment(images: Tensor, generator: torch.Generator | None = None, flip: bool = True, pad: int = 4) -> Tensor:
    """Mirror each image left to right with probability 1/2, and cut it at a random place after padding with zeros.

    Args:
        images: (B, C, H, W), any type.
        generator: where flips and places are drawn from, for each image anew; None: torch's own.
        flip: whether to mirror.
        pad: zeros added on each side before an HxW window is cut out; 0: no cutting.

    Returns:
        The moved images, of the same shape, type and device; `images` itself stays as it was.

    Raises:
        ConfigError: if the images are not (B, C, H, W) or `pad` is negative.

    Source:
        Lee, Xie, Gallagher, Zhang, Tu, Deeply-supervised nets, 2015; He, Zhang, Ren, Sun, Deep residual learning,
        2016, section 4.2 (pad 4, random crop, flip).

    Example:
        >>> augment(torch.ones(8, 3, 32, 32), torch.Generator().manual_seed(0)).shape
        torch.Size([8, 3, 32, 32])
    """
    if images.ndim != 4:
        raise ConfigError(f"augmentation of a tensor of shape {tuple(images.shape)}; expected images (B, C, H, W)")
    if pad < 0:
        raise ConfigError(f"pad {pad}; expected 0 or more pixels")
    count, _, height, width = images.shape
    drawn_on = generator.device if generator is not None else images.device
    if flip:
        mirrored = torch.rand(count, 1, 1, 1, generator=generator, device=drawn_on) < 0.5
        images = torch.where(mirrored.to(images.device), images.flip(-1), images)
    if pad:
        offsets = torch.randint(2 * pad + 1, (2, count), generator=generator, device=drawn_on).to(images.device)
        # A view of all windows; indexing it copies the chosen one of each image.
        windows = F.pad(images, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
        images = windows[torch.arange(count, device=images.device), :, offsets[0], offsets[1]]
    return images
