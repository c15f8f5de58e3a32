"""A segmentation task from published files: objects of Fashion-MNIST pasted on photographs of CIFAR-10."""

from pathlib import Path

import torch
from torch import Tensor

from normprop.data import cifar, idx
from normprop.data.dataset import Dataset, Split

NAME = "pasted"
_OBJECT = 32  # grey value from which a pixel belongs to the object; what is darker is Fashion-MNIST's background


def load(data_dir: Path) -> Dataset:
    """Paste the n-th object on the n-th photograph, at a place and in a colour drawn for it.

    Images are uint8 (N, 3, 32, 32); labels (N, 32, 32) say of every pixel whether it is the object's. The same files
    give the same images: 50,000 for training, 10,000 for testing.

    Args:
        data_dir: directory with the folders of CIFAR-10 and Fashion-MNIST.

    Returns:
        The data set, of the classes "photograph" and "object".

    Raises:
        DataError: if a file is missing or damaged.

    Source:
        Ours.

    Example:
        >>> load(Path("/nowhere"))
        Traceback (most recent call last):
        normprop.errors.DataError: cifar10: /nowhere/cifar-10-batches-bin or ...
    """
    photographs = cifar.load(cifar.CIFAR10, data_dir)
    objects = idx.load(idx.FASHION_MNIST, data_dir)
    parts = []
    for seed, (below, above) in enumerate(((photographs.train, objects.train), (photographs.test, objects.test))):
        count = min(len(below), len(above))
        generator = torch.Generator().manual_seed(seed)
        parts.append(Split(*paste(below.images[:count], above.images[:count], generator)))
    return Dataset(NAME, ("photograph", "object"), *parts)


def paste(photographs: Tensor, objects: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Paste grey objects on photographs, each at a random place, with a random gain on each colour.

    Args:
        photographs: uint8 (N, 3, H, W).
        objects: uint8 (N, 1, h, w), h <= H and w <= W, dark where there is no object.
        generator: where places and colours are drawn from; None: torch's own.

    Returns:
        The images, uint8 (N, 3, H, W), and the class of every pixel, int64 (N, H, W): 1 for the object, 0 elsewhere.

    Source:
        Ours.

    Example:
        >>> image, mask = paste(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.full((1, 1, 4, 4), 255).byte())
        >>> mask.sum(), bool((image >= 63).all())
        (tensor(16), True)
    """
    count, _, height, width = photographs.shape
    tall, wide = objects.shape[2:]
    tops = torch.randint(height - tall + 1, (count, 1), generator=generator) + torch.arange(tall)
    lefts = torch.randint(width - wide + 1, (count, 1), generator=generator) + torch.arange(wide)
    gains = 0.25 + 0.75 * torch.rand(count, 3, 1, 1, generator=generator)
    rows = torch.arange(count).view(-1, 1, 1), tops.unsqueeze(2), lefts.unsqueeze(1)
    masks = torch.zeros(count, height, width, dtype=torch.int64)
    masks[rows] = (objects[:, 0] >= _OBJECT).long()
    painted = torch.zeros_like(photographs).permute(0, 2, 3, 1)  # a view, in which colours come last
    painted[rows] = (objects * gains).to(torch.uint8).permute(0, 2, 3, 1)
    return torch.where(masks.unsqueeze(1).bool(), painted.permute(0, 3, 1, 2), photographs), masks
