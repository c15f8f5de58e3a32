"""Folders of images by class: both layouts, grey and colour, sizes, and one line for everything else."""

import numpy as np
import pytest
import torch
from PIL import Image

from normprop.data import load
from normprop.data.folder import load as load_folder
from normprop.errors import ConfigError, DataError

RNG = np.random.default_rng(0)


def draw(path, mode="RGB", size=(6, 4), value=None):
    """An image of (width, height) of one value, or random; returns its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8) if value is None else np.full(shape, value, np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return pixels


def values(split):
    return sorted(int(image[0, 0, 0]) for image in split.images)


def test_train_and_test_folders(tmp_path):
    pixels = {name: draw(tmp_path / name) for name in ("train/cat/a.png", "train/dog/b.png", "test/dog/c.png")}
    data = load(tmp_path)
    assert (data.name, data.classes, data.shape) == (tmp_path.name, ("cat", "dog"), (3, 4, 6))
    assert data.train.images.dtype == torch.uint8
    for label, name in enumerate(["train/cat/a.png", "train/dog/b.png"]):
        image = data.train.images[data.train.labels == label]
        np.testing.assert_array_equal(image[0].permute(1, 2, 0).numpy(), pixels[name])
    assert data.test.labels.tolist() == [1]
    assert len(data.validation) == 0


def test_validation_folder(tmp_path):
    for i, name in enumerate(["train/cat/a.png", "train/dog/b.png", "test/dog/c.png", "val/cat/d.png"]):
        draw(tmp_path / name, value=i)
    data = load(tmp_path).split()
    assert (values(data.train), values(data.test), values(data.validation)) == ([0, 1], [2], [3])


def test_every_fifth_image_of_a_class_is_for_test(tmp_path):
    for i in range(12):
        draw(tmp_path / "cat" / f"{i:02d}.png", value=i)
        draw(tmp_path / "dog" / f"{i:02d}.png", value=100 + i)
    data = load(tmp_path)
    assert values(data.test) == [4, 9, 104, 109]
    assert values(data.train) == [i + j for i in (0, 100) for j in range(12) if j % 5 != 4]
    for split in (data.train, data.test):
        assert [int(image[0, 0, 0]) // 100 for image in split.images] == split.labels.tolist()
        assert torch.bincount(split.labels[: len(split) // 2]).tolist() == [len(split) // 4] * 2
    assert torch.equal(data.train.images, load(tmp_path).train.images)


@pytest.mark.parametrize(
    ("modes", "channels"), [(["L", "1"], 1), (["L", "LA"], 1), (["RGB", "RGBA"], 3), (["L", "RGB"], 3), (["P", "P"], 3)]
)
def test_grey_and_colour(modes, channels, tmp_path):
    for mode, name in zip(modes, ("cat", "dog"), strict=True):
        for part in ("train", "test"):
            draw(tmp_path / part / name / "a.png", mode=mode, value=255)
    data = load(tmp_path)
    assert data.shape == (channels, 4, 6)
    assert data.train.images.min() == data.train.images.max() == 255


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".ppm", ".tif", ".TIFF", ".webp", ".jpg", ".JPEG"])
def test_formats(suffix, tmp_path):
    for name in ("train/cat", "train/dog", "test/cat"):
        draw(tmp_path / name / f"a{suffix}", value=77)
    images = load(tmp_path).train.images
    assert (images.int() - 77).abs().max() <= 2  # JPEG and WebP round


def test_size_resizes_and_is_height_by_width(tmp_path):
    for name, size in {"train/cat": (6, 4), "train/dog": (31, 17), "test/cat": (5, 5)}.items():
        draw(tmp_path / name / "a.png", size=size, value=90)
    with pytest.raises(DataError, match=r"17x31 pixels, but .*cat/a.png has 4x6; expected one size"):
        load(tmp_path)
    data = load(tmp_path, size=(8, 12))
    assert data.shape == (3, 8, 12)
    assert data.train.images.min() == data.train.images.max() == 90


def test_size_keeps_the_picture(tmp_path):
    pixels = np.zeros((40, 20), np.uint8)
    pixels[:, 10:] = 200
    for name in ("train/cat", "train/dog", "test/cat"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / name / "a.png")
    image = load(tmp_path, size=(10, 30)).train.images[0, 0]
    assert image[:, :13].max() == 0
    assert image[:, 17:].min() == 200


def test_hidden_files_are_passed_over(tmp_path):
    for name in ("train/cat/a.png", "train/dog/b.png", "test/dog/c.png"):
        draw(tmp_path / name)
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "cat" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    assert len(load(tmp_path).train) == 2


def whole(root):
    for name in ("train/cat/a.png", "train/dog/b.png", "test/dog/c.png"):
        draw(root / name)


def write(name, content):
    def change(root):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    return change


def cut(root):
    path = root / "train/dog/b.png"
    path.write_bytes(path.read_bytes()[:-30])


def two_frames(root):
    frame = Image.new("L", (6, 4))
    frame.save(root / "train/dog/b.tif", save_all=True, append_images=[frame])


def sixteen_bits(root):
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(root / "train/dog/c.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "train/dog/b.png: damaged image ("),
        (write("train/dog/b.png", b""), "train/dog/b.png: damaged image (cannot identify image file"),
        (write("train/dog/b.jpg", b"text"), "train/dog/b.jpg: damaged image ("),
        (write("train/dog/b.txt", b"text"), "train/dog/b.txt: not an image (.png"),
        (write("train/dog/more/b.png", b"x"), "train/dog/more: not an image"),
        (two_frames, "train/dog/b.tif: 2 frame(s) of mode L; expected one 8-bit image"),
        (sixteen_bits, "train/dog/c.png: 1 frame(s) of mode I;16; expected one 8-bit image"),
        (lambda root: (root / "train/cow").mkdir(), "train/cow: no images; expected"),
        (lambda root: draw(root / "test/cow/a.png"), "test: class 'cow' is not in training; expected cat, dog"),
        (lambda root: draw(root / "test/dog/d.png", size=(6, 5)), "test/dog/d.png: 5x6 pixels, but"),
        (lambda root: (root / "test").rename(root / "val"), "train/cat: not an image"),
    ],
)
def test_damage_gives_one_line(change, message, tmp_path):
    whole(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert str(tmp_path / message) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layouts_that_are_none_give_one_line(tmp_path):
    layout = r"expected <folder>/train/<class>/ and <folder>/test/<class>/, or <folder>/<class>/"
    with pytest.raises(DataError, match=f"no class folders; {layout}"):
        load(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        load_folder(tmp_path / "absent")
    draw(tmp_path / "cat" / "a.png")
    with pytest.raises(DataError, match=f"fewer than five images in every class; {layout}"):
        load(tmp_path)
    for i in range(5):
        draw(tmp_path / "cat" / f"{i}.png")
    with pytest.raises(DataError, match="1 class; expected at least 2"):
        load(tmp_path)


def test_size_is_for_folders(tmp_path):
    np.savez(tmp_path / "own.npz", x_train=np.zeros(1))
    for name in ("digits", str(tmp_path / "own.npz"), "absent"):
        with pytest.raises(ConfigError, match="size is given, but only the images of a folder are resized"):
            load(name, size=(8, 8))
