"""People's own pictures: a folder of images by class."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from normprop.data.dataset import Dataset, Split
from normprop.data.order import mixed
from normprop.errors import DataError, requires

with requires("data"):
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_LAYOUT = "<folder>/train/<class>/ and <folder>/test/<class>/, or <folder>/<class>/, with images in them"
_GREY = ("1", "L", "LA")
_COLOUR = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")


def load(root: Path, size: tuple[int, int] | None = None) -> Dataset:
    """Read images by class: `root/train/<class>/` and `root/test/<class>/`, or `root/<class>/`.

    Without `train` and `test`, every fifth image of a class, in the order of the file names, is a test image.
    `root/val/<class>/` beside `train` and `test` becomes the validation split. Images are stored in a fixed order with
    all classes everywhere. All grey images give one channel, else all become RGB; transparency is dropped. Hidden
    files are passed over; any other file that is no 8-bit image is an error.

    Args:
        root: the folder.
        size: height and width to resize all images to (bilinear, antialiased, the aspect is not kept); None: all
            images must share one size.

    Returns:
        The data set, images uint8 (N, 1 or 3, H, W), named after the folder.

    Raises:
        DataError: if a folder is missing or empty, an image is damaged, or sizes differ.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("cat/1.png", "cat/2.png", "cat/3.png", "cat/4.png", "cat/5.png", "dog/1.png"):
        ...         (Path(folder) / name).parent.mkdir(exist_ok=True)
        ...         Image.new("RGB", (32, 24)).save(Path(folder) / name)
        ...     data = load(Path(folder))
        >>> data.classes, data.shape, len(data.train), len(data.test)
        (('cat', 'dog'), (3, 24, 32), 5, 1)
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected {_LAYOUT}")
    parts = _parts(root)
    classes = tuple(parts["train"])
    if len(classes) < 2:
        raise DataError(f"{root}: {len(classes)} class; expected at least 2 in {_LAYOUT}")
    for part, files in parts.items():
        if unknown := set(files) - set(classes):
            raise DataError(f"{root / part}: class {min(unknown)!r} is not in training; expected {', '.join(classes)}")
    everything = [path for files in parts.values() for paths in files.values() for path in paths]
    shape = _common_shape(everything, size)
    return Dataset(root.resolve().name, classes, *(_read_split(files, classes, shape) for files in parts.values()))


def _parts(root: Path) -> dict[str, dict[str, list[Path]]]:
    """The image files of training, test and perhaps validation, in this order, by class."""
    if (root / "train").is_dir() and (root / "test").is_dir():
        return {part: _by_class(root / part) for part in ("train", "test", "val") if (root / part).is_dir()}
    files = _by_class(root)
    train = {name: [path for i, path in enumerate(paths) if i % 5 != 4] for name, paths in files.items()}
    test = {name: paths[4::5] for name, paths in files.items()}
    if not any(test.values()):
        raise DataError(f"{root}: fewer than five images in every class; expected {_LAYOUT}")
    return {"train": train, "test": test}


def _by_class(root: Path) -> dict[str, list[Path]]:
    """The image files of every class folder, sorted by name."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"{root}: no class folders; expected {_LAYOUT}")
    return {folder.name: _images(folder) for folder in folders}


def _images(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in paths:
        if path.is_dir() or path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path}: not an image ({', '.join(SUFFIXES)}); expected {_LAYOUT}")
    if not paths:
        raise DataError(f"{folder}: no images; expected {_LAYOUT}")
    return paths


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """An image; whatever fails while it is read is said to be damage."""
    try:
        with Image.open(path) as image:
            if (frames := getattr(image, "n_frames", 1)) > 1 or image.mode not in _GREY + _COLOUR:
                raise DataError(f"{path}: {frames} frame(s) of mode {image.mode}; expected one 8-bit image")
            yield image
    except DataError:
        raise
    except Exception as error:  # decoders of damaged files raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: damaged image ({reason}); expected a readable image") from error


def _common_shape(paths: list[Path], size: tuple[int, int] | None) -> tuple[int, int, int]:
    """Channels, height and width of the stored images, from the headers alone."""
    sizes, channels = [], 1
    for path in paths:
        with _open(path) as image:
            sizes.append((image.height, image.width))
            channels = 3 if image.mode in _COLOUR else channels
    if size is not None:
        return channels, *size
    for path, (height, width) in zip(paths, sizes, strict=True):
        if (height, width) != sizes[0]:
            raise DataError(
                f"{path}: {height}x{width} pixels, but {paths[0]} has {sizes[0][0]}x{sizes[0][1]}; expected one size "
                "(size=(height, width) resizes all images)"
            )
    return channels, *sizes[0]


def _read_split(files: dict[str, list[Path]], classes: tuple[str, ...], shape: tuple[int, int, int]) -> Split:
    """Decode the images of one part in a fixed mixed order."""
    pairs = [(path, classes.index(name)) for name in classes for path in files.get(name, [])]
    labels = np.array([label for _, label in pairs], np.int64)
    order = mixed(labels)
    images = torch.empty(len(pairs), *shape, dtype=torch.uint8)
    for row, number in enumerate(order):
        images[row] = _decode(pairs[number][0], shape)
    return Split(images, torch.from_numpy(labels[order]))


def _decode(path: Path, shape: tuple[int, int, int]) -> torch.Tensor:
    """One image as uint8 (C, H, W)."""
    channels, height, width = shape
    with _open(path) as image:
        decoded = image.convert("L" if channels == 1 else "RGB")
    if decoded.size != (width, height):
        decoded = decoded.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(decoded).reshape(height, width, channels)).permute(2, 0, 1)
